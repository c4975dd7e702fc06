"""Importers of published formats and of thumbs: who won, what became the prompt, what options do, what is rejected."""

from __future__ import annotations

import pytest
from imports import EXPORTS, assistant, by_rank, gpt, human, made, one, read, real, said, user, vote
from rows import jsonl

from data_tools.importers.table import detect


def parts(role, text, **more):
    """A turn of LLaMA-Factory v1."""
    return {"role": role, "content": [{"type": "text", "value": text}], **more}


# ---- pairs whose field names say which is the better -----------------------------------------------------------------

PAIRS = {
    "llamafactory-preference": {
        "chosen_messages": [parts("user", "Fruit?"), parts("assistant", "Pear.", loss_weight=1.0)],
        "rejected_messages": [parts("user", "Fruit?"), parts("assistant", "Car.", loss_weight=1.0)],
    },
    "axolotl-preference": {"messages": [user("Fruit?")], "chosen": assistant("Pear."), "rejected": assistant("Car.")},
    "medicalgpt": {"question": "Fruit?", "response_rejected": "Car.", "response_chosen": "Pear."},
    "cvalues": {"prompt": "Fruit?", "neg_resp": "Car.", "pos_resp": "Pear.", "pos_type": "a", "neg_type": "b"},
    "stack-exchange-paired": {"qid": 1, "question": "Fruit?", "response_j": "Pear.", "response_k": "Car."},
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_is_detected_and_the_better_answer_wins(tmp_path, name):
    assert detect([jsonl(tmp_path / "in.jsonl", [PAIRS[name]])])[0] == name
    record = one(tmp_path, name, PAIRS[name])
    assert by_rank(record) == {1: ["Pear."], 2: ["Car."]}
    assert said(record) == [("user", "Fruit?")]


def test_axolotls_argilla_type_has_its_system_turn_before_the_instruction(tmp_path):
    row = {"system": "Be brief.", "instruction": "Fruit?", "chosen_response": "Pear.", "rejected_response": "Car."}
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "axolotl-preference"
    record = one(tmp_path, "axolotl-preference", row)
    assert (said(record), by_rank(record)[1]) == ([("system", "Be brief."), ("user", "Fruit?")], ["Pear."])


@pytest.mark.parametrize("field", ["question", "input", "prompt"])
def test_axolotls_types_with_chosen_and_rejected_text_are_trl_rows(tmp_path, field):
    row = {"system": "Be brief.", field: "Fruit?", "chosen": "Pear.", "rejected": "Car."}
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "trl-preference"
    record = one(tmp_path, "trl-preference", row)
    assert (said(record), by_rank(record)[1]) == ([("system", "Be brief."), ("user", "Fruit?")], ["Pear."])


def test_the_history_of_medicalgpt_is_part_of_the_prompt(tmp_path):
    row = {**PAIRS["medicalgpt"], "system": "Be brief.", "history": [["Hi", "Hello"]]}
    assert said(one(tmp_path, "medicalgpt", row)) == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Fruit?"),
    ]  # fmt: skip


def test_demonstrations_of_llamafactory_v1_are_read_by_their_loss_weights(tmp_path):
    turns = [
        parts("user", "Fruit?", loss_weight=0.0), parts("assistant", "Pear.", loss_weight=0.0),
        parts("user", "Another?", loss_weight=0.0), parts("assistant", "Plum.", loss_weight=1.0),
    ]  # fmt: skip
    assert detect([jsonl(tmp_path / "in.jsonl", [{"messages": turns}])])[0] == "openai-chat"
    record = one(tmp_path, "openai-chat", {"messages": turns})
    assert (len(record.messages), record.answer) == (3, "Plum.")


def test_a_tool_call_among_the_parts_of_llamafactory_v1_is_rejected_by_that_name(tmp_path):
    call = {"role": "assistant", "content": [{"type": "tool_call", "value": "{}"}]}
    row = {**PAIRS["llamafactory-preference"], "chosen_messages": [parts("user", "Fruit?"), call]}
    assert made(tmp_path, "llamafactory-preference", row)[1] == ["chosen_messages: a tool call or a tool's turn"]


SAFE = {
    "prompt": "Jar?", "response_0": "Hammer.", "response_1": "Hot water.", "response_0_source": "m0",
    "is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip


def test_in_saferlhf_the_better_and_the_safer_response_are_two_judgements(tmp_path):
    assert by_rank(one(tmp_path, "pku-saferlhf", SAFE)) == {1: ["Hammer."], 2: ["Hot water."]}
    record = one(tmp_path, "pku-saferlhf", SAFE, by="safer")
    assert by_rank(record) == {1: ["Hot water."], 2: ["Hammer."]}
    assert [candidate.author for candidate in record.candidates] == ["m0", ""]
    contradiction = {**SAFE, "safer_response_id": 0}
    reasons = made(tmp_path, "pku-saferlhf", contradiction, {**SAFE, "safer_response_id": -1}, by="safer")[1]
    assert ["contradicts" in reasons[0], reasons[1]] == [True, "safer_response_id: not one of 0, 1"]
    more = {"prompt_source": "p", "response_0_severity_level": 2, "response_0_sha256": "ab", "response_1_sha256": "cd"}
    assert by_rank(one(tmp_path, "pku-saferlhf", {**SAFE, **more}))[1] == ["Hammer."], "as the published files have it"
    single = {name: SAFE[name] for name in ("prompt", "response_0", "response_1", "better_response_id")}
    assert made(tmp_path, "pku-saferlhf", single, by="safer")[1] == ["safer_response_id: missing"]


# ---- K answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["subset", "domain"])
def test_lists_of_chosen_and_rejected_are_one_ranking_with_ties(tmp_path, group):
    row = {"id": "1", "prompt": "Colour?", "chosen": ["Red.", "Blue."], "rejected": ["Pi.", "No.", "Car."], group: "g"}
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "reward-bench-2"
    record = one(tmp_path, "reward-bench-2", row)
    assert by_rank(record) == {1: ["Red.", "Blue."], 2: ["Pi.", "No.", "Car."]}
    assert (record.informative_pairs, record.group) == (6, "g")
    assert record.source == {"subset": "reward-bench-2", "domain": "rm-bench"}[group]
    row = {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"subset": "Ties", "id": "tied:7"}
    assert one(tmp_path, "reward-bench-2", row).source == "reward-bench-2/tied:7"
    styles = row | {"chosen": ["a", "b", "c"], "subset": "alpacaeval"}
    assert one(tmp_path, "reward-bench-2", styles).source == "rm-bench"
    assert one(tmp_path, "reward-bench-2", styles | {"num_correct": 3}).source == "reward-bench-2"
    wrong = [{**row, "num_correct": 1}, {**row, "chosen": []}, {**row, "rejected": ["Red."]}]
    assert made(tmp_path, "reward-bench-2", *wrong)[1] == [
        "num_correct: not the number of answers", "chosen: no answer in the list",
        "ranks: identical candidates have different ranks",
    ]  # fmt: skip


def test_the_seven_answers_of_nectar_are_one_ranking(tmp_path):
    answers = [{"answer": f"a{rank}", "model": f"m{rank}", "rank": float(rank)} for rank in (3, 1, 2, 5, 4, 7, 5)]
    answers[-1]["answer"] = "another a5"
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Fruit?\n\nAssistant: ", "answers": answers}
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "nectar"
    record = one(tmp_path, "nectar", row)
    assert record.ranks == (3, 1, 2, 5, 4, 6, 5)
    assert said(record) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Fruit?")]
    assert (record.candidates[1].author, record.annotator) == ("m1", "gpt-4")
    assert made(tmp_path, "nectar", {**row, "answers": [{"answer": "a", "rank": 0}]})[1] == [
        "rank: not a number from 1 to 1000"
    ]


def model(turn, text, score=None, chosen=False):
    return {"turn": turn, "role": "model", "content": text, "model_name": "m", "score": score, "if_chosen": chosen}


def asked(turn, text):
    return {"turn": turn, "role": "user", "content": text}


PRISM = {
    "user_id": "u1",
    "opening_prompt": "Fruit?",
    "choice_attributes": {"fluency": 80},
    "open_feedback": "Fine.",
    "conversation_history": [
        asked(0, "Fruit?"), model(0, "Car.", 10), model(0, "Pear.", 90, True), model(0, "Plum.", 90),
        asked(1, "Another?"), model(1, "Apple.", 50, True), model(1, "Bus.", 20),
    ],
}  # fmt: skip


def test_each_turn_of_prism_is_a_ranking_after_the_chosen_answers(tmp_path):
    (first, second), reasons = made(tmp_path, "prism", PRISM)
    assert (by_rank(first), by_rank(second)) == (
        {1: ["Pear.", "Plum."], 2: ["Car."]}, {1: ["Apple."], 2: ["Bus."]},
    )  # fmt: skip
    assert said(second) == [("user", "Fruit?"), ("assistant", "Pear."), ("user", "Another?")]
    assert ([c.score for c in first.candidates], first.annotator, reasons) == ([10, 90, 90], "u1", [])
    (first, _), _ = made(tmp_path, "prism", PRISM, by="chosen")
    assert by_rank(first) == {1: ["Pear."], 2: ["Car.", "Plum."]}


def test_turns_of_prism_without_a_usable_choice_are_rejected_one_by_one(tmp_path):
    history = PRISM["conversation_history"]
    contradiction = {**PRISM, "conversation_history": [history[0], model(0, "Car.", 95), *history[2:]]}
    unchosen = {**PRISM, "conversation_history": [*history[:2], model(0, "Pear.", 90), *history[4:]]}
    records, reasons = made(tmp_path, "prism", contradiction, unchosen)
    assert [len(record.messages) for record in records] == [3, 1]
    assert [reason.split(":")[0] for reason in reasons] == [
        "if_chosen", "the turn before has no answer, or several, to go on with",
    ]  # fmt: skip


def utterances(name, by="u1"):
    """The rows of utterances.jsonl that say the same as PRISM; each names the question that it answers."""
    questions = {turn["turn"]: turn["content"] for turn in PRISM["conversation_history"] if turn["role"] == "user"}
    answers = [turn for turn in PRISM["conversation_history"] if turn["role"] == "model"]
    return [
        {
            "conversation_id": name, "user_id": by, "interaction_id": f"{name}-{at}", "within_turn_id": at,
            "conversation_type": "unguided", "turn": turn["turn"], "model_name": "m", "score": turn["score"],
            "user_prompt": questions[turn["turn"]], "model_response": turn["content"], "if_chosen": turn["if_chosen"],
        }
        for at, turn in enumerate(answers)
    ]  # fmt: skip


def test_utterances_of_prism_are_read_as_their_conversations(tmp_path):
    first, second = utterances("c1"), utterances("c2", "u2")
    mixed = [row for pair in zip(first[::-1], second) for row in pair]
    assert detect([jsonl(tmp_path / "in.jsonl", first)])[0] == "prism"
    expected, _ = made(tmp_path, "prism", PRISM)
    records, reasons = made(tmp_path, "prism", *first)
    assert (records, reasons) == (expected, [])
    records, reasons = made(tmp_path, "prism", *mixed)
    by_person = {name: [by_rank(r) for r in records if r.annotator == name] for name in ("u1", "u2")}
    assert by_person["u2"] == [by_rank(record) for record in expected]
    assert [{rank: sorted(texts) for rank, texts in each.items()} for each in by_person["u1"]] == by_person["u2"]
    assert reasons == []


def test_an_utterance_without_its_place_and_two_questions_of_a_turn_are_rejected(tmp_path):
    lost = {name: value for name, value in utterances("c1")[0].items() if name != "turn"}
    rows = utterances("c2")
    rows[1]["user_prompt"] = "Car?"
    records, reasons = made(tmp_path, "prism", lost, *rows)
    assert reasons == [
        "turn: missing", "a turn that is not one question and its answers",
        "the turn before has no answer, or several, to go on with",
    ]  # fmt: skip
    assert records == []


# ---- thumbs ----------------------------------------------------------------------------------------------------------


def test_thumbs_for_one_prompt_are_one_ranking_wherever_in_the_file_they_are(tmp_path):
    rows = [
        {"prompt": "Fruit?", "completion": "Pear.", "label": True},
        {"prompt": "Tree?", "completion": "Oak.", "label": True},
        {"prompt": "Fruit?", "completion": "Car.", "label": False},
        {"prompt": [user("Fruit?")], "completion": [assistant("Plum.")], "label": True},
        {"prompt": "Fruit?", "completion": "Car.", "label": False},
    ]
    assert detect([jsonl(tmp_path / "in.jsonl", rows)])[0] == "kto"
    record, reasons = made(tmp_path, "kto", *rows)
    assert [by_rank(ranking) for ranking in record] == [{1: ["Pear.", "Plum."], 2: ["Car."]}]
    assert reasons == ["all thumbs for this prompt point in one direction"]
    records, reasons = made(tmp_path, "kto", *rows, become="demonstrations")
    assert [record.answer for record in records] == ["Pear.", "Oak.", "Plum."]
    assert reasons == ["a thumbs down is no demonstration"] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Fruit?"), assistant("Pear.")], "label": True},
        {"conversations": [human("Fruit?"), gpt("Pear.")], "kto_tag": True},
        {"instruction": "Fruit?", "input": "", "output": "Pear.", "kto_tag": True},
        {"question": "Fruit?", "completion": "Pear.", "label": True},
    ],
    ids=lambda row: next(iter(row)),
)
def test_every_form_of_thumbs_is_recognised_and_read(tmp_path, row):
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "kto"
    record = one(tmp_path, "kto", row, become="demonstrations")
    assert (said(record), record.answer) == ([("user", "Fruit?")], "Pear.")


def test_an_answer_with_both_thumbs_contradicts_itself(tmp_path):
    row = {"prompt": "Fruit?", "completion": "Pear."}
    rows = [{**row, "label": True}, {**row, "label": False}, {**row, "label": "yes"}]
    assert made(tmp_path, "kto", *rows) == (
        [], ["label: not true or false", *["candidates: fewer than two distinct answers"] * 2],
    )  # fmt: skip


@real
def test_the_demonstration_file_of_llamafactorys_thumbs_is_read():
    records, rejects = read("kto", EXPORTS / "kto" / "kto_demo.json", become="demonstrations")
    assert records
    assert {reject.reason for reject in rejects} == {"a thumbs down is no demonstration"}


# ---- turns of tools --------------------------------------------------------------------------------------------------

CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "openai-chat",
            {
                "messages": [
                    user("Hi"), assistant("Hello"), user("Weather?"), CALL, {"role": "tool", "content": "Rain"},
                    assistant("It rains."),
                ],
                "tools": [{"name": "weather"}],
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    human("Hi"), gpt("Hello"), human("Weather?"), {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "Rain"}, gpt("It rains."),
                ],
                "tools": "[]",
            },
        ),
    ],
)  # fmt: skip
def test_a_chat_with_a_tools_turn_is_rejected_or_cut_before_it_by_choice(tmp_path, name, row):
    records, reasons = made(tmp_path, name, row)
    assert (records, ["a tool call or a tool's turn" in reason for reason in reasons]) == ([], [True])
    record = one(tmp_path, name, row, tools="cut")
    assert (said(record), record.answer) == ([("user", "Hi")], "Hello")
    field = next(iter(row))
    assert made(tmp_path, name, {field: row[field][2:]}, tools="cut")[1] == [
        "no answer before the first turn of a tool"
    ]


# ---- the columns of the published files ------------------------------------------------------------------------------

ARENA = vote("model_a", turn=1, language="English")
COLUMNS = {
    "chatbot_arena_conversations": (
        ARENA,
        {
            "question_id": "q", "judge": "u", "anony": True, "tstamp": 1.5,
            "toxic_chat_tag": {"t5": {"flagged": False}},
            "openai_moderation": {"categories": {"hate": False}, "flagged": False},
        },
    ),
    "arena-human-preference-140k": (
        vote("both_bad", language="en"),
        {
            "id": "1", "evaluation_session_id": "s", "evaluation_order": 1,
            "full_conversation": [{"user": user("Fruit?")}],
            "conv_metadata": {"sum_assistant_a_tokens": 3}, "category_tag": {"math_v0.1": {"math": False}},
            "is_code": False, "timestamp": "2025-06-01",
        },
    ),
    "PKU-SafeRLHF": (
        SAFE,
        {
            "prompt_source": "p", "response_1_source": "m1", "response_0_harm_category": {"Violence": True},
            "response_1_harm_category": {"Violence": False}, "response_0_severity_level": 3,
            "response_1_severity_level": 0, "response_0_sha256": "ab", "response_1_sha256": "cd",
        },
    ),
    "prism-alignment": (
        PRISM,
        {
            "conversation_id": "c1", "survey_only": False, "conversation_type": "unguided", "conversation_turns": 2,
            "included_in_US_REP": True, "included_in_balanced_subset": False, "generated_datetime": "2023-12-02",
            "performance_attributes": {"fluency": 90}, "timing_duration_s": 20.5, "timing_duration_mins": 0.3,
        },
    ),
    "reward-bench-2": (
        {"prompt": "Colour?", "chosen": ["Red."], "rejected": ["Pi.", "No.", "Car."], "subset": "Focus"},
        {
            "id": "1", "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m", "m", "m", "m"],
            "additional_metadata": {"category": "c", "correct": None, "label": "l"},
        },
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: Fruit?\n\nAssistant: ",
            "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}],
        },
        {"turns": 1, "num_responses": 2, "source": ["lmsys-chat-1m"], "good_natured": True},
    ),
    "stack-exchange-paired": (
        PAIRS["stack-exchange-paired"],
        {"date": "2016/08/05", "metadata": ["https://stackoverflow.com/questions/1", "", ""]},
    ),
}  # fmt: skip
"""Dataset -> a row, and the columns that its files have besides (from its card)."""


@pytest.mark.parametrize("dataset", COLUMNS)
def test_the_other_columns_of_a_published_file_cost_no_row(tmp_path, dataset):
    row, more = COLUMNS[dataset]
    name = detect([jsonl(tmp_path / "in.jsonl", [{**row, **more}])])[0]
    (plain, _), (records, reasons) = made(tmp_path, name, row), made(tmp_path, name, {**row, **more})
    assert ([record.ranks for record in records], reasons) == ([record.ranks for record in plain], [])
