"""Importers of dataset formats: who won, who wrote, what became the prompt, and which rows are set aside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rows import jsonl

from data_tools.importers import IMPORTERS
from data_tools.importers.html_text import html_text

DATA = Path(__file__).parents[2] / "shared" / "data"
EXPORTS = DATA / "annotation_exports"
real = pytest.mark.skipif(not DATA.exists(), reason="../shared is absent")


def read(name, path, **options):
    """(records, rejects) of one file."""
    rejects = []
    return list(IMPORTERS.pick({"name": name, **options})(Path(path), rejects.append)), rejects


def made(tmp_path, name, *rows, **options):
    """(records, reasons) of a file of these rows."""
    records, rejects = read(name, jsonl(tmp_path / "in.jsonl", rows), **options)
    return records, [reject.reason for reject in rejects]


def one(tmp_path, name, row, **options):
    """The one record of a row."""
    ((record,), reasons) = made(tmp_path, name, row, **options)
    assert reasons == []
    return record


def by_rank(record):
    """Rank -> the texts that have it."""
    order: dict[int, list[str]] = {}
    for candidate, rank in zip(record.candidates, record.ranks):
        order.setdefault(rank, []).append(candidate.text)
    return order


def best(record):
    """The text that won."""
    ((text,), *_) = (by_rank(record)[1],)
    return text


def said(record):
    return [(message.role, message.content) for message in record.messages]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


# ---- HH-RLHF and TRL -------------------------------------------------------------------------------------------------


@real
def test_in_hh_rlhf_the_chosen_answer_wins():
    records, _ = read("hh-rlhf", EXPORTS / "hh_rlhf" / "harmless_test.first20.jsonl")
    assert best(records[0]).startswith("No, sorry!  All of these involve a pen")
    assert len(records[0].messages) == 5
    assert not any(record.shown for record in records)


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


def test_a_text_is_not_cut_inside_a_word(tmp_path):
    record = one(tmp_path, "trl-preference", {"chosen": "It is blue", "rejected": "It is black"})
    assert (said(record), by_rank(record)) == ([("user", "It is")], {1: ["blue"], 2: ["black"]})
    record = one(tmp_path, "trl-preference", {"chosen": "It is blue", "rejected": "It is blue today"})
    assert by_rank(record) == {1: ["blue"], 2: ["blue today"]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "transcript of HH-RLHF",
        ),
        ({"chosen": "Blue.", "rejected": "Green."}, "messages.content: empty"),
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
        ({"prompt": "a", "chosen": [assistant(None, tool_calls=[{}])], "rejected": [assistant("d")]}, "calls a tool"),
    ],
)
def test_a_trl_row_that_is_no_pair_is_set_aside(tmp_path, row, reason):
    records, reasons = made(tmp_path, "trl-preference", row)
    assert records == []
    assert [reason in told for told in reasons] == [True]


# ---- OpenAI and ShareGPT pairs ---------------------------------------------------------------------------------------


@real
def test_in_openai_preferences_the_preferred_output_wins():
    ((record,), _) = read("openai-preference", EXPORTS / "openai_chat" / "preference_dpo.documented.json")
    assert best(record).startswith("Einstein is renowned for his theory of relativity")
    assert said(record) == [("user", "What is Einstein famous for?")]


def test_an_openai_output_of_several_messages_is_set_aside(tmp_path):
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


def test_a_tool_in_a_sharegpt_pair_is_set_aside(tmp_path):
    row = {
        "conversations": [human("a"), {"from": "function_call", "value": "{}"}],
        "chosen": gpt("b"),
        "rejected": gpt("c"),
    }
    assert made(tmp_path, "sharegpt-preference", row)[1] == ["conversations: a turn that calls a tool or is one's"]


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
    assert made(tmp_path, "shp", {**row, **votes})[1] == ["labels: contradict score_A and score_B"]
    assert made(tmp_path, "shp", {**row, "labels": 2}, {**row, "labels": "1"})[1] == ["labels: not one of 0, 1"] * 2


@pytest.mark.parametrize(("preference", "ranks"), [(-3, (1, 2)), (-1, (1, 2)), (0, (1, 1)), (2, (2, 1))])
def test_in_helpsteer3_a_negative_preference_is_for_the_first(tmp_path, preference, ranks):
    row = {"context": [user("Why?")], "response1": "a", "response2": "b", "overall_preference": preference}
    assert one(tmp_path, "helpsteer3", row).ranks == ranks
    row = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": preference}
    assert one(tmp_path, "helpsteer3", row).ranks == ranks


def test_a_preference_beyond_3_is_set_aside(tmp_path):
    row = {"context": [user("Why?")], "response1": "a", "response2": "b", "overall_preference": -100}
    assert made(tmp_path, "helpsteer3", row)[1] == ["overall_preference: not a number from -3 to 3"]


# ---- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "ranks", "weight"),
    [
        (1, (1, 2), 1), (2.0, (2, 1), 1), (1.5, (1, 1), 1), (0, (1, 1), 1), (1.75, (2, 1), 0.5), (1.25, (1, 2), 0.5),
    ],
)  # fmt: skip
def test_in_alpaca_eval_1_is_the_first_2_the_second_and_between_is_a_probability(tmp_path, preference, ranks, weight):
    row = {"instruction": "Do it.", "input": "now", "output_1": "a", "output_2": "b", "preference": preference}
    record = one(tmp_path, "alpaca-eval", {**row, "generator_1": "m1", "generator_2": "m2", "annotator": "gpt4"})
    assert (record.ranks, record.weight, record.annotator) == (ranks, weight, "gpt4")
    assert [candidate.author for candidate in record.candidates] == ["m1", "m2"]
    assert said(record) == [("user", "Do it.\n\nnow")]


def test_a_failed_annotation_of_alpaca_eval_is_set_aside(tmp_path):
    row = {"instruction": "Do it.", "output_1": "a", "output_2": "b"}
    _, reasons = made(
        tmp_path, "alpaca-eval", row, *({**row, "preference": value} for value in (None, -1, 0.5, 3, False))
    )
    assert reasons == ["preference: none"] * 3 + ["preference: not a number from 1 to 2"] * 3


@real
def test_in_pandalm_every_annotator_makes_a_record_and_names_the_winner_from_1():
    records, rejects = read("pandalm", EXPORTS / "pandalm" / "testset_first10.json")
    assert (len(records), rejects) == (30, [])
    assert [record.annotator for record in records[:3]] == ["annotator1", "annotator2", "annotator3"]
    assert {best(record) for record in records[:3]} == {"If you have any questions, please let me know."}
    assert {best(record) for record in records[3:6]} == {"If you have any questions about my rate, please let me know."}
    assert [candidate.author for candidate in records[0].candidates] == ["bloom-7b", "llama-7b"]
    assert re.search(r"unnecessary words\.\n\nIf you have any questions about my rate or", said(records[0])[0][1])


@real
def test_in_the_other_form_of_pandalm_the_majority_is_the_label():
    path = DATA / "preferences" / "pandalm_human_test.jsonl"
    records, rejects = read("pandalm", path)
    assert len(records) + len(rejects) == 3 * 999
    assert {reject.reason for reject in rejects} == {"candidates.text: empty"}
    row = json.loads(path.open(encoding="utf-8").readline())
    assert row["label"] == 2 and best(records[0]) == row["response2"]


def test_in_pandalm_0_is_a_tie_and_each_judgement_counts_for_itself(tmp_path):
    row = {"instruction": "Do it.", "input": "", "response1": "a", "response2": "b"}
    judged = {"annotator1": 0, "annotator2": 2, "annotator10": 1, "annotator3": None, "annotator4": 7}
    records, reasons = made(tmp_path, "pandalm", {**row, **judged}, row, {**row, "annotators": []})
    assert [(record.annotator, record.ranks) for record in records] == [
        ("annotator1", (1, 1)), ("annotator2", (2, 1)), ("annotator10", (1, 2)),
    ]  # fmt: skip
    assert reasons == [
        "an annotator gave no judgement",
        "annotator: not one of 0, 1, 2",
        "no judgement",
        "no judgement",
    ]


# ---- ratings and lists -----------------------------------------------------------------------------------------------


def completion(response, *ratings, **more):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {aspect: {"Rating": rating} for aspect, rating in zip(aspects, ratings)}
    return {"model": f"m-{response}", "response": response, "annotations": annotations, **more}


def test_in_ultrafeedback_the_highest_rating_wins_by_the_aspect_that_was_chosen(tmp_path):
    row = {"instruction": "Do it.", "completions": [completion("a", "5", "4", "4", "1", overall_score=7)]}
    row["completions"].append(completion("b", "4", "4", "4", "4", overall_score=6.5))
    row["completions"].append(completion("c", "3", "4", "4", "5", overall_score=6.5))
    record = one(tmp_path, "ultrafeedback", row)
    assert by_rank(record) == {1: ["b", "c"], 2: ["a"]}, "means of 4 and 3.5"
    assert [candidate.score for candidate in record.candidates] == [3.5, 4, 4]
    assert [candidate.author for candidate in record.candidates] == ["m-a", "m-b", "m-c"]
    assert by_rank(one(tmp_path, "ultrafeedback", row, aspect="instruction_following")) == {
        1: ["a"],
        2: ["b"],
        3: ["c"],
    }
    assert by_rank(one(tmp_path, "ultrafeedback", row, aspect="helpfulness")) == {1: ["c"], 2: ["b"], 3: ["a"]}
    assert by_rank(one(tmp_path, "ultrafeedback", row, aspect="honesty")) == {1: ["a", "b", "c"]}
    assert by_rank(one(tmp_path, "ultrafeedback", row, aspect="overall_score")) == {1: ["a"], 2: ["b", "c"]}
    assert made(tmp_path, "ultrafeedback", row, aspect="fine-grained_score")[1] == [
        "fine-grained_score: a completion has no rating"
    ]


def test_an_aspect_that_did_not_apply_is_told(tmp_path):
    row = {
        "instruction": "Do it.",
        "completions": [completion("a", "5", "N/A", "4", "1"), completion("b", "4", "4", "4", "4")],
    }
    assert made(tmp_path, "ultrafeedback", row)[1] == ["honesty: a completion has no rating"]
    assert best(one(tmp_path, "ultrafeedback", row, aspect="instruction_following")) == "a"
    row["completions"][0]["annotations"]["instruction_following"]["Rating"] = "very good"
    assert made(tmp_path, "ultrafeedback", row, aspect="instruction_following")[1] == [
        "instruction_following: not a number from 1 to 5"
    ]


@real
def test_the_documented_completion_of_ultrafeedback_loses_to_a_better_rated_one(tmp_path):
    text = re.sub("//.*", "", (EXPORTS / "ultrafeedback" / "README_format.jsonc").read_text("utf-8"))
    first, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index('"completions"')))
    row = {"instruction": "I am going to cairo", "completions": [first, completion("Walk little.", "5", "5", "5", "5")]}
    record = one(tmp_path, "ultrafeedback", row)
    assert best(record) == "Walk little."
    assert (record.candidates[0].author, record.candidates[0].score) == ("falcon-40b-instruct", (2 + 3 + 3 + 3) / 4)


def steer(prompt, response, helpfulness, **more):
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 4 - helpfulness, **more}


def test_in_helpsteer_neighbours_with_one_prompt_are_one_ranking(tmp_path):
    rows = [
        steer("p", "a", 1),
        steer("p", "b", 4),
        steer("p", "c", 1),
        steer("q", "d", 2),
        steer("r", "e", 0),
        steer("r", "f", 3),
    ]
    records, rejects = read("helpsteer", jsonl(tmp_path / "in.jsonl", rows))
    assert [by_rank(record) for record in records] == [{1: ["b"], 2: ["a", "c"]}, {1: ["f"], 2: ["e"]}]
    assert [(reject.reason, reject.line) for reject in rejects] == [("candidates: fewer than two answers", 4)]
    assert json.loads(rejects[0].raw) == rows[3]
    ((record, _), _) = made(tmp_path, "helpsteer", *rows, aspect="correctness")
    assert by_rank(record) == {1: ["a", "c"], 2: ["b"]}


def test_a_bad_row_of_helpsteer_leaves_the_others_of_its_prompt(tmp_path):
    rows = [steer("p", "a", 1), {"prompt": "p"}, steer("p", "b", 9), steer("p", "c", 4), steer("q", "d", 2)]
    records, rejects = read("helpsteer", jsonl(tmp_path / "in.jsonl", rows))
    assert [best(record) for record in records] == ["c"]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (2, "response: missing"),
        (3, "helpfulness: not a number from 0 to 4"),
        (5, "candidates: fewer than two answers"),
    ]


def test_later_turns_of_a_helpsteer_prompt_are_marked(tmp_path):
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n\n<extra_id_1>User\nWhy?\n"
    ((record,), _) = made(tmp_path, "helpsteer", steer(prompt, "a", 1), steer(prompt, "b", 4))
    assert said(record) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?\n")]


def test_in_stack_exchange_the_highest_score_wins(tmp_path):
    answers = [
        {"text": f"<p>{text}</p>", "pm_score": score, "author": text} for text, score in (("a", -1), ("b", 6), ("c", 6))
    ]
    record = one(tmp_path, "stack-exchange", {"question": "<p>Why <b>me</b>?</p>", "answers": answers})
    assert said(record) == [("user", "Why me?")]
    assert by_rank(record) == {1: ["b", "c"], 2: ["a"]}
    assert [(c.author, c.author_kind) for c in record.candidates] == [(name, "person") for name in "abc"]
    record = one(tmp_path, "stack-exchange", {"question": "<p>Why?</p>", "answers": answers}, bodies="html")
    assert record.candidates[0].text == "<p>a</p>"


def test_html_becomes_what_a_reader_sees():
    html = (
        "<p>Use <code>a &lt; b</code>,\n see <a href='x'>the <em>docs</em></a>:</p>\n\n"
        "<pre><code>if a:\n    b()\n</code></pre>\n<ul>\n<li>one</li>\n<li>two</li>\n</ul><script>evil()</script>"
        "<p>line<br>break<img src=x></p>"
    )
    assert html_text(html) == ("Use `a < b`, see the docs:\n\n```\nif a:\n    b()\n```\n\n- one\n- two\n\nline\nbreak")
    assert html_text("no tags & no fuss < 3") == "no tags & no fuss < 3"
    assert html_text("</p></pre></script><p>unclosed") == "unclosed"


@real
def test_in_a_ranked_alpaca_list_the_first_wins_and_the_last_loses():
    records, _ = read("alpaca-ranked", EXPORTS / "alpaca" / "ranked_output_list.json")
    assert records[0].ranks == (1, 2, 3, 4)
    assert best(records[0]).startswith("根据维基百科")
    assert by_rank(records[0])[4] == ["能吃"]


def test_an_alpaca_list_with_a_repeated_answer_or_of_one_is_set_aside(tmp_path):
    row = {"instruction": "Do it."}
    rows = [{**row, "output": output} for output in (["a"], ["a", "b", "a"], ["a", ""], "a", ["a", 1])]
    _, reasons = made(tmp_path, "alpaca-ranked", *rows)
    assert reasons == [
        "candidates: fewer than two answers", "ranks: identical candidates are ranked apart", "candidates.text: empty",
        "output: not a list", "candidates.text: not text",
    ]  # fmt: skip
    assert best(one(tmp_path, "alpaca-ranked", {**row, "chosen": "a", "rejected": "b"})) == "a"


@real
def test_candidates_with_ranks_are_read_as_the_schema_s_own_rows():
    path = DATA / "preferences" / "oasst1_en_validation_ranked.jsonl"
    records, rejects = read("jsonl", path)
    assert (len(records), [reject.reason for reject in rejects]) == (
        415,
        ["ranks: identical candidates are ranked apart"],
    )
    first = json.loads(path.open(encoding="utf-8").readline())
    assert best(records[0]) == min(first["candidates"], key=lambda candidate: candidate["rank"])["text"]


# ---- demonstrations and prompts --------------------------------------------------------------------------------------


@real
def test_alpaca_demonstrations_hold_the_output_as_the_answer():
    records, _ = read("alpaca", EXPORTS / "alpaca" / "alpaca_demo.json")
    assert said(records[0]) == [("user", "Describe a process of making crepes.")]
    assert records[0].answer.startswith("Making crepes is an easy and delicious process!")


def test_an_alpaca_prompt_joins_instruction_and_input_after_system_and_history(tmp_path):
    row = {
        "instruction": "Translate.",
        "input": "pear",
        "output": "Birne",
        "system": "Short.",
        "history": [["Hi", "Hello"]],
    }
    record = one(tmp_path, "alpaca", row)
    assert said(record) == [
        ("system", "Short."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Translate.\n\npear"),
    ]
    bad = [
        {**row, **change} for change in ({"output": ["a", "b"]}, {"output": " "}, {"history": [1]}, {"instruction": 1})
    ]
    assert made(tmp_path, "alpaca", *bad)[1] == [
        "output: a list", "answer: empty", "history: not a list of [user, assistant]", "instruction: not text",
    ]  # fmt: skip


def test_dolly_keeps_the_category_as_group(tmp_path):
    row = {"instruction": "What?", "context": "A pear.", "response": "Fruit.", "category": "closed_qa"}
    record = one(tmp_path, "dolly", row)
    assert (said(record), record.answer, record.group) == ([("user", "What?\n\nA pear.")], "Fruit.", "closed_qa")
    assert one(tmp_path, "dolly", {**row, "context": None, "category": ""}).group is None


@pytest.mark.parametrize("fields", [("inputs", "targets"), ("input", "target"), ("prompt", "completion")])
def test_flan_rows_go_by_several_names(tmp_path, fields):
    record = one(tmp_path, "flan", dict(zip(fields, ("Is it?", "yes"))))
    assert (said(record), record.answer) == ([("user", "Is it?")], "yes")


def test_a_thumb_down_is_no_demonstration(tmp_path):
    reason = ["a thumb up or down for one answer"]
    assert made(tmp_path, "flan", {"prompt": "a", "completion": "b", "label": False})[1] == reason
    assert made(tmp_path, "openai-chat", {"messages": [user("a"), assistant("b")], "label": True})[1] == reason
    assert made(tmp_path, "sharegpt", {"conversations": [human("a"), gpt("b")], "label": False})[1] == reason


@real
def test_every_answer_of_a_sharegpt_chat_is_a_demonstration_unless_the_last_is_asked_for():
    path = EXPORTS / "sharegpt" / "fastchat_dummy_conversation.json"
    records, rejects = read("sharegpt", path)
    assert rejects == []
    assert said(records[0]) == [("user", "Who are you?")]
    assert records[0].answer.startswith("I am Vicuna")
    assert (len(records[1].messages), records[1].answer) == (3, "You too!")
    last, _ = read("sharegpt", path, turns="last")
    assert len(last) == 20 < len(records)
    assert last[0] == records[1]


def test_a_chat_that_begins_or_ends_at_the_wrong_turn_keeps_its_good_answers(tmp_path):
    row = {"conversations": [gpt("zero"), human("a"), gpt("one"), human("b"), gpt(""), human("c")]}
    records, reasons = made(tmp_path, "sharegpt", row)
    assert [record.answer for record in records] == ["one"]
    assert said(records[0]) == [("assistant", "zero"), ("user", "a")]
    assert reasons == [
        "an answer to nothing: no user's turn before it",
        "answer: empty",
        "the chat ends without an answer",
    ]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([human("a"), {"from": "observation", "value": "b"}], "conversations: a turn that calls a tool or is one's"),
        ([human("a"), {"from": "cat", "value": "b"}], "conversations: a role that is not one of"),
        ([human("a"), {"from": ["gpt"], "value": "b"}], "conversations: a role that is not one of"),
        ([human("a"), gpt(5)], "conversations: a turn that is not text"),
        (["a", "b"], "conversations: not a list of turns"),
        ([], "no turn of the assistant to learn"),
        ([human("a")], "no turn of the assistant to learn"),
    ],
)
def test_a_chat_that_cannot_be_read_is_set_aside_as_a_whole(tmp_path, turns, reason):
    records, reasons = made(tmp_path, "sharegpt", {"conversations": turns})
    assert records == []
    assert [told.startswith(reason) for told in reasons] == [True]


@real
def test_openai_chats_give_a_demonstration_for_every_answer():
    records, rejects = read("openai-chat", EXPORTS / "openai_chat" / "toy_chat_fine_tuning.first3.jsonl")
    assert (len(records), rejects) == (6, [])
    assert records[0].answer == "It's great that you're getting exercise outdoors!"
    assert said(records[0])[0][0] == "system"
    assert (records[4].answer, len(records[4].messages)) == ("It's easy to learn!", 8)


def test_an_answer_of_weight_0_is_context_only(tmp_path):
    row = {"messages": [user("a"), assistant("bad", weight=0), user("b"), assistant("good", weight=1)]}
    record = one(tmp_path, "openai-chat", row)
    assert (record.answer, said(record)[1]) == ("good", ("assistant", "bad"))
    assert made(tmp_path, "openai-chat", {"messages": row["messages"][:2]})[1] == ["no turn of the assistant to learn"]


def test_plain_text_is_a_prompt_a_line_or_a_paragraph(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffName a fruit.\r\n\r\nWrite a poem\nabout rain.\n \n\n".encode())
    records, _ = read("text", path)
    assert [said(record)[0][1] for record in records] == ["Name a fruit.", "Write a poem", "about rain."]
    records, _ = read("text", path, unit="paragraph")
    assert [said(record)[0][1] for record in records] == ["Name a fruit.", "Write a poem\nabout rain."]
    path.write_bytes(b"good\n\nb\xffd\nline\n\nlast")
    for unit, line in (("line", 3), ("paragraph", 3)):
        records, rejects = read("text", path, unit=unit)
        assert [(reject.reason, reject.line) for reject in rejects] == [("not UTF-8", line)]
        assert said(records[-1]) == [("user", "last")]
