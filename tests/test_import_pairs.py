"""Importers of pairs and comparisons: who won, who wrote, what became the prompt, which rows are set aside."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from imports import DATA, EXPORTS, assistant, best, by_rank, gpt, human, made, one, read, real, said, user
from rows import jsonl

from data_tools.importers import IMPORTERS
from data_tools.io.rejects import Rejects
from data_tools.reading.unread import role_of

# ---- HH-RLHF and TRL -------------------------------------------------------------------------------------------------


@real
def test_in_hh_rlhf_the_chosen_answer_wins():
    records, _ = read("hh-rlhf", EXPORTS / "hh_rlhf" / "harmless_test.first20.jsonl")
    assert best(records[0]).startswith("No, sorry!  All of these involve a pen")
    assert len(records[0].messages) == 5
    assert not any(record.shown for record in records)


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("text", ["Hello\n\nHuman: a\n\nAssistant: d", "d", ["d"], None])
def test_a_side_of_hh_rlhf_that_is_no_transcript_is_rejected_alone(tmp_path, side, text):
    records, reasons = made(tmp_path, "hh-rlhf", HH | {side: text}, HH)
    assert ([best(record) for record in records], len(reasons)) == (["b"], 1)


@real
def test_in_ukp_pairs_the_chosen_argument_wins():
    records, _ = read("trl-preference", DATA / "preferences" / "ukpconvarg1_strict_pairs.jsonl.gz")
    assert best(records[0]).startswith("Bottled water consumption has grown exponentially")
    assert said(records[0])[0][1].startswith('Debate: "Ban Plastic Water Bottles"')


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, [("user", "Sky?")]),
        (
            {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
            [("user", "Sky?")],
        ),
        ({"prompt": [user("Sky?")], "chosen": "Blue.", "rejected": "Green."}, [("user", "Sky?")]),
        (
            {
                "chosen": [{"role": "system", "content": "Short."}, user("Sky?"), assistant("Blue.")],
                "rejected": [{"role": "system", "content": "Short."}, user("Sky?"), assistant("Green.")],
            },
            [("system", "Short."), ("user", "Sky?")],
        ),
        (
            {
                "prompt": "Sky?", "chosen": [user("Sky?"), assistant("Blue.")],
                "rejected": [user("Sky?"), assistant("Green.")],
            },
            [("user", "Sky?")],
        ),
        (
            {
                "prompt": [user("Hi")], "chosen": [assistant("Hello"), user("Sky?"), assistant("Blue.")],
                "rejected": [assistant("Hello"), user("Sky?"), assistant("Green.")],
            },
            [("user", "Hi"), ("assistant", "Hello"), ("user", "Sky?")],
        ),
        ({"chosen": "The sky is Blue.", "rejected": "The sky is Green."}, [("user", "The sky is")]),
        ({"chosen": "The sky is\nBlue.", "rejected": "The sky is\n  Green."}, [("user", "The sky is")]),
    ],
    ids=["text", "messages", "mixed", "implicit", "repeated", "continued", "implicit text", "line break"],
)  # fmt: skip
def test_every_form_of_a_trl_row_gives_the_same_pair(tmp_path, row, prompt):
    record = one(tmp_path, "trl-preference", row)
    assert said(record) == prompt
    assert by_rank(record) == {1: ["Blue."], 2: ["Green."]}


@pytest.mark.parametrize(
    ("one_score", "other_score"), [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")]
)
def test_scores_stay_with_the_pair_and_equal_ones_are_a_tie(tmp_path, one_score, other_score):
    pair = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}
    for name, row in (
        ("trl-preference", pair),
        ("alpaca-ranked", {"instruction": "Sky?", **pair}),
        ("sharegpt-preference", {
            "conversations": [{"from": "human", "value": "Sky?"}],
            **{side: {"from": "gpt", "value": pair[side]} for side in ("chosen", "rejected")},
        }),
    ):  # fmt: skip
        won = one(tmp_path, name, {**row, one_score: 9.0, other_score: "2"})
        assert (won.ranks, [candidate.score for candidate in won.candidates]) == ((1, 2), [9, 2]), name
        tied = one(tmp_path, name, {**row, one_score: 8, other_score: 8.0})
        assert (tied.ranks, [candidate.score for candidate in tied.candidates]) == ((1, 1), [8, 8]), name
        assert one(tmp_path, name, {**row, one_score: 1, other_score: None}).ranks == (1, 2), name
        assert made(tmp_path, name, {**row, one_score: 2, other_score: 9}, {**row, one_score: "high"}) == (
            [], ["the scores contradict who won", f"{one_score}: not a number"],
        ), name  # fmt: skip


def test_a_prompt_that_the_answers_repeat_may_differ_in_outer_white_space(tmp_path):
    row = {"prompt": "Sky? ", "chosen": [user("Sky?"), assistant("Blue.")]}
    record = one(tmp_path, "trl-preference", {**row, "rejected": [user("Sky?\n"), assistant("Green.")]})
    assert said(record) == [("user", "Sky?")]
    assert record.ranks == (1, 2)


def test_a_text_is_not_cut_inside_a_word(tmp_path):
    record = one(tmp_path, "trl-preference", {"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert (said(record), by_rank(record)) == ([("user", "The sky is")], {1: ["blue"], 2: ["black"]})
    record = one(tmp_path, "trl-preference", {"chosen": "The sky is blue", "rejected": "The sky is blue today"})
    assert by_rank(record) == {1: ["blue"], 2: ["blue today"]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "transcript of HH-RLHF",
        ),
        ({"chosen": "Blue.", "rejected": "Green."}, "no prompt is found"),
        ({"chosen": "It is blue.", "rejected": "It is green."}, "no prompt is found"),
        ({"chosen": '{"a": {"b": 1}}', "rejected": '{"a": {"b": 2}}'}, "JSON that is no chat"),
        ({"chosen": '["to", "be", "or", 1]', "rejected": '["to", "be", "or", 2]'}, "JSON that is no chat"),
        ({"prompt": "", "question": "a", "query": "b", "chosen": "c", "rejected": "d"}, "which is the prompt?"),
        (
            {"prompt": [{"role": "system", "content": "a"}, user("b")], "system": "c", "chosen": "d", "rejected": "e"},
            "two system turns",
        ),
        ({"prompt": "\n\nHuman: a", "chosen": "b\n\nHuman: c", "rejected": "d"}, "an answer with a transcript inside"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "fewer than two distinct answers"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "candidates.text: empty"),
        ({"prompt": "a", "chosen": "b"}, "rejected: missing"),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "one is text, the other is not"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "chosen: not a list of turns"),
        ({"chosen": [], "rejected": []}, "chosen: not one answer"),
        (
            {"prompt": "a", "chosen": [assistant("b"), user("c")], "rejected": [assistant("d")]},
            "chosen: not one answer",
        ),
        ({"prompt": "a", "chosen": [assistant(None, tool_calls=[{}])], "rejected": [assistant("d")]}, "a tool call or"),
    ],
)
def test_a_trl_row_that_is_no_pair_is_rejected(tmp_path, row, reason):
    records, reasons = made(tmp_path, "trl-preference", row)
    assert records == []
    assert [reason in told for told in reasons] == [True]


@pytest.mark.parametrize("asked", ["question", "query", "input", "instruction", "prompt"])
def test_the_prompt_is_read_from_the_field_that_holds_it_with_the_system_turn(tmp_path, asked):
    answers = {"chosen": "To sort them, compare them.", "rejected": "To sort them, look."}
    row = {"system": "Be careful.", asked: "Sort 3, 1, 2.", **answers}
    record = one(tmp_path, "trl-preference", row)
    assert said(record) == [("system", "Be careful."), ("user", "Sort 3, 1, 2.")]
    assert by_rank(record) == {1: [answers["chosen"]], 2: [answers["rejected"]]}
    assert said(one(tmp_path, "trl-preference", {**row, "system": ""})) == [("user", "Sort 3, 1, 2.")]


def test_instruction_and_input_are_one_prompt_after_the_history(tmp_path):
    row = {"history": [["a", "b"]], "instruction": "Sort.", "input": "3, 1", "chosen": "1, 3", "rejected": "3, 1"}
    assert said(one(tmp_path, "trl-preference", row)) == [("user", "a"), ("assistant", "b"), ("user", "Sort.\n\n3, 1")]


def test_a_chat_as_json_text_is_read_and_never_cut(tmp_path):
    chats = {name: json.dumps({"messages": [user("Name a fruit."), assistant(text)]})
             for name, text in (("chosen", "A pear."), ("rejected", "A bus."))}  # fmt: skip
    record = one(tmp_path, "trl-preference", chats)
    assert (said(record), by_rank(record)) == ([("user", "Name a fruit.")], {1: ["A pear."], 2: ["A bus."]})


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {
                "prompt": "\n\nHuman: A fruit?\n\nAssistant: Which colour?\n\nHuman: Green.\n\nAssistant:",
                "response": " A lime.", "chosen": " A lime.", "rejected": " A bus.",
            },
            [("user", "A fruit?"), ("assistant", "Which colour?"), ("user", "Green.")],
        ),
        (
            {"prompt": "\n\nHuman: A fruit?\n\n", "chosen": "Assistant: A lime.", "rejected": "Assistant: A bus."},
            [("user", "A fruit?")],
        ),
    ],
    ids=["rm-static", "marked answers"],
)  # fmt: skip
def test_human_and_assistant_marks_in_a_prompt_are_turns(tmp_path, row, prompt):
    record = one(tmp_path, "trl-preference", row)
    assert (said(record), by_rank(record)) == (prompt, {1: ["A lime."], 2: ["A bus."]})


def test_a_transcript_inside_one_text_is_rejected_by_that_name(tmp_path):
    marked = "\n\nHuman: Name a fruit.\n\nAssistant: A pear."
    row = {"question": {"full_text": marked}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": -1}
    assert made(tmp_path, "webgpt", row)[1] == ["a transcript inside one text"]
    assert made(tmp_path, "flan", {"prompt": "Why?", "completion": marked})[1] == ["a transcript inside one text"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("system_prompt", "system turn"), ("userQuestion", "prompt"), ("response_a", "answer"), ("images", "media"),
        ("better_response_id", "judgement"), ("winner_model_a", "judgement"), ("score_chosen", "judgement"),
        ("prompt_id", None), ("chosen_model", None), ("num_responses", None), ("source", None), ("language", None),
    ],
)  # fmt: skip
def test_the_name_of_a_field_says_what_it_could_hold(name, role):
    assert role_of(name) == role


LOST = {
    "a picture in a turn": ("trl-preference", {"prompt": [{**user("a"), "images": ["x.png"]}]}, "prompt.images"),
    "a score in an answer": ("trl-preference", {"chosen": [{**assistant("b"), "score": 3}]}, "chosen.score"),
    "a prompt in details": ("trl-preference", {"details": {"more": [{"question": "why?"}]}}, "details.more.question"),
    "an answer of a tool": ("sharegpt", {"conversations": [
        {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "output": "c"},
    ]}, "conversations.output"),
}  # fmt: skip
PAIR = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}


@pytest.mark.parametrize(("format", "more", "field"), LOST.values(), ids=LOST)
def test_a_field_of_an_object_that_is_not_read_rejects_the_row_by_its_path(tmp_path, format, more, field):
    row = {**(PAIR if format == "trl-preference" else {}), **more}
    plain = json.loads(json.dumps(row), object_hook=lambda o: {k: v for k, v in o.items() if k != field.split(".")[-1]})
    records, reasons = made(tmp_path, format, plain, row, plain, row)
    assert [reason.split(":")[0] for reason in reasons] == [field] * 2
    assert len(records) == 2
    for ignored in (field, field.split(".")[-1], field.split(".")[0]):
        rejects = Rejects(tmp_path / "rejected.jsonl", ignored_fields=[ignored])
        assert len(list(IMPORTERS.pick({"name": format})(jsonl(tmp_path / "in.jsonl", [plain, row]), rejects))) == 2
        assert rejects.count == 0


def test_rows_that_are_gathered_are_looked_into_too(tmp_path):
    up, down = ({"messages": [user("a"), assistant(text)], "label": text == "b"} for text in ("b", "c"))
    pictured = {**up, "messages": [{**user("a"), "image": "x.png"}, assistant("d")]}
    (record,), reasons = made(tmp_path, "kto", up, pictured, down)
    assert by_rank(record) == {1: ["b"], 2: ["c"]}
    assert [reason.split(":")[0] for reason in reasons] == ["messages.image"]


def test_what_an_object_repeats_or_leaves_empty_is_no_loss(tmp_path):
    more = {"extra_info": {"answer": "x"}, "other": {"prompt": "b", "images": [], "system": ""}}
    records, reasons = made(tmp_path, "trl-preference", {**PAIR, **more}, PAIR)
    assert (len(records), reasons) == (2, [])


# ---- OpenAI and ShareGPT pairs ---------------------------------------------------------------------------------------


@real
def test_in_openai_preferences_the_preferred_output_wins():
    ((record,), _) = read("openai-preference", EXPORTS / "openai_chat" / "preference_dpo.documented.json")
    assert best(record).startswith("Einstein is renowned for his theory of relativity")
    assert said(record) == [("user", "What is Einstein famous for?")]


@pytest.mark.parametrize(
    ("names", "numbers", "ranks"),
    [
        (("preferred_output_score", "non_preferred_output_score"), (4, 2), (1, 2)),
        (("score_preferred_output", "score_non_preferred_output"), (3, 3), (1, 1)),
        (("preferred_output_score", "non_preferred_output_score"), (2, 4), None),
    ],
)
def test_scores_of_an_openai_pair_stay_with_the_candidates(tmp_path, names, numbers, ranks):
    row = {"input": {"messages": [user("a")]}, "preferred_output": [assistant("b")]}
    row |= {"non_preferred_output": [assistant("c")], **dict(zip(names, numbers))}
    records, reasons = made(tmp_path, "openai-preference", row)
    if ranks is None:
        assert reasons == ["the scores contradict who won"]
    else:
        assert (records[0].ranks, tuple(c.score for c in records[0].candidates)) == (ranks, numbers)


def test_an_openai_output_of_several_messages_is_rejected(tmp_path):
    row = {"input": {"messages": [user("a")]}, "preferred_output": [assistant("b"), assistant("c")]}
    _, reasons = made(tmp_path, "openai-preference", {**row, "non_preferred_output": [assistant("d")]})
    assert reasons == ["preferred_output: not one answer of the assistant"]


def test_text_parts_are_text_and_a_developer_speaks_as_the_system(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"input": {"messages": [{"role": "developer", "content": "Short."}, user(parts)]}}
    row |= {"preferred_output": [assistant("c")], "non_preferred_output": [assistant("d")]}
    assert said(one(tmp_path, "openai-preference", row)) == [("system", "Short."), ("user", "a\nb")]
    row["input"]["messages"][1] = user([{"type": "image_url", "image_url": {"url": "x"}}])
    assert made(tmp_path, "openai-preference", row)[1] == ["input.messages: a turn that is not text"]


@real
def test_in_llama_factory_pairs_the_chosen_answer_wins():
    records, rejects = read("sharegpt-preference", EXPORTS / "sharegpt" / "llamafactory_dpo_sharegpt.json")
    assert (len(records), rejects) == (10, [])
    assert best(records[0]).startswith("That sounds like a fun and engaging idea!")
    assert [role for role, _ in said(records[1])] == ["system", "user"]


def test_the_answers_of_a_sharegpt_pair_may_be_text(tmp_path):
    record = one(tmp_path, "sharegpt-preference", {"conversations": [human("a")], "chosen": "b", "rejected": "c"})
    assert (said(record), by_rank(record)) == ([("user", "a")], {1: ["b"], 2: ["c"]})


def test_a_tool_in_a_sharegpt_pair_is_rejected(tmp_path):
    row = {
        "conversations": [human("a"), {"from": "function_call", "value": "{}"}],
        "chosen": gpt("b"),
        "rejected": gpt("c"),
    }
    assert made(tmp_path, "sharegpt-preference", row)[1] == ["conversations: a tool call or a tool's turn"]


# ---- published comparisons -------------------------------------------------------------------------------------------


@real
def test_in_summaries_the_choice_wins_as_an_index_from_0():
    ((record,), _) = read("summarize-from-feedback", EXPORTS / "summarize_from_feedback" / "comparison.json")
    assert best(record).startswith("we suspect other party involved of speeding")
    assert [(c.author, c.author_kind) for c in record.candidates] == [("sup4_ppo_rm3_kl10", "model"), ("ref", "person")]
    assert record.annotator == "ikNmucwunMnYJCQpnq6ZYb57OW7NiD"
    assert record.split == "train"
    prompt = said(record)[0][1]
    assert prompt.startswith("SUBREDDIT: r/legaladvice\n\nTITLE: Anybody with knowledge")
    assert "\n\nPOST: I had a car accident" in prompt
    assert prompt.endswith("\n\nTL;DR:")


def test_choice_0_is_the_first_summary_and_a_field_that_is_null_is_absent(tmp_path):
    summaries = [{"text": "A.", "policy": "ref", "note": None}, {"text": "B.", "policy": None}]
    post = {"info": {"subreddit": "a", "title": "t", "post": "p", "article": None}, "summaries": summaries, "choice": 0}
    news = {**post, "info": {"article": "News.", "post": None, "title": None, "subreddit": None}, "worker": None}
    records, reasons = made(tmp_path, "summarize-from-feedback", post, news)
    assert reasons == []
    assert [best(record) for record in (*records, one(tmp_path, "summarize-from-feedback", post | {"choice": 1}))] == [
        "A.", "A.", "B.",
    ]  # fmt: skip
    assert [said(record)[0][1] for record in records] == [
        "SUBREDDIT: r/a\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", "Article: News.\n\nTL;DR:",
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([post, news]), tmp_path / "in.parquet")
    from_arrow, rejects = read("summarize-from-feedback", tmp_path / "in.parquet")
    assert (from_arrow, rejects) == (records, [])


@real
def test_ratings_of_one_summary_are_no_comparison():
    records, rejects = read("summarize-from-feedback", EXPORTS / "summarize_from_feedback" / "axis_eval.json")
    assert records == []
    assert [reject.reason for reject in rejects] == ["a rating of one summary, not a comparison"]


def webgpt_row(score_0, score_1):
    answers = {"answer_0": "a", "answer_1": "b", "score_0": score_0, "score_1": score_1}
    return {"question": {"full_text": "Why?", "id": "1"}, **answers}


def test_in_webgpt_the_higher_score_wins_and_equal_scores_tie(tmp_path):
    assert best(one(tmp_path, "webgpt", webgpt_row(0.25, -0.25))) == "a"
    assert best(one(tmp_path, "webgpt", webgpt_row(-1, 1))) == "b"
    assert one(tmp_path, "webgpt", webgpt_row(0, 0.0)).ranks == (1, 1)
    assert (
        made(tmp_path, "webgpt", webgpt_row(2, -2), webgpt_row(True, -1), webgpt_row("1", -1))[1]
        == ["score_0: not a number from -1 to 1"] * 3
    )


@real
def test_in_shp_a_label_of_0_means_that_b_won():
    ((record,), _) = read("shp", EXPORTS / "shp" / "row.documented.json")
    assert best(record).startswith("It's ironic to me that research has shown")
    assert (record.group, record.split) == ("askacademia", "train")
    assert [candidate.score for candidate in record.candidates] == [52, 54]


def test_in_shp_a_label_of_1_means_that_a_won_and_must_agree_with_the_votes(tmp_path):
    row = {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "domain": "ask_science"}
    record = one(tmp_path, "shp", row)
    assert (best(record), record.group, record.split) == ("a", "ask_science", None)
    votes = {"score_A": 3, "score_B": 9}
    assert made(tmp_path, "shp", {**row, **votes})[1] == ["the scores contradict who won"]
    assert one(tmp_path, "shp", {**row, "score_A": 3, "score_B": 3}).ranks == (1, 1)
    assert made(tmp_path, "shp", {**row, "labels": 2}, {**row, "labels": "1"})[1] == ["labels: not one of 0, 1"] * 2


@pytest.mark.parametrize(("preference", "ranks"), [(-3, (1, 2)), (-1, (1, 2)), (0, (1, 1)), (2, (2, 1))])
def test_in_helpsteer3_a_negative_preference_is_for_the_first(tmp_path, preference, ranks):
    row = {"context": [user("Why?")], "response1": "a", "response2": "b", "overall_preference": preference}
    third = one(tmp_path, "helpsteer3", row)
    row = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": preference}
    second = one(tmp_path, "helpsteer3", row)
    assert [(one.ranks, one.source) for one in (second, third)] == [(ranks, "helpsteer2"), (ranks, "helpsteer3")]


def test_a_preference_beyond_3_is_rejected(tmp_path):
    row = {"context": [user("Why?")], "response1": "a", "response2": "b", "overall_preference": -100}
    assert made(tmp_path, "helpsteer3", row)[1] == ["overall_preference: not a number from -3 to 3"]
