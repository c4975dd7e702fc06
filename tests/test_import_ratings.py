"""Importers of judges' labels, of ratings and of ranked lists: who won, and which rows are set aside."""

from __future__ import annotations

import json
import re

import pytest
from imports import DATA, EXPORTS, best, by_rank, made, one, read, real, said
from rows import jsonl

from data_tools.reading.html_text import html_text

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


def test_a_failed_annotation_of_alpaca_eval_is_rejected(tmp_path):
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
    assert reasons == ["annotator: not one of 0, 1, 2", "no judgement", "no judgement"]


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


def test_a_completion_of_ultrafeedback_need_not_name_its_model(tmp_path):
    nameless = {key: value for key, value in completion("a", "1", "1", "1", "1").items() if key != "model"}
    row = {"instruction": "Do it.", "completions": [nameless, completion("b", "4", "4", "4", "4")]}
    assert [candidate.author for candidate in one(tmp_path, "ultrafeedback", row).candidates] == ["", "m-b"]


def test_an_aspect_that_did_not_apply_is_reported(tmp_path):
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
    assert [by_rank(record) for record in records] == [{1: ["c"], 2: ["a"]}]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (2, "response: missing"),
        (3, "helpfulness: not a number from 0 to 4"),
        (5, "candidates: fewer than two answers"),
    ]


def test_later_turns_of_a_helpsteer_prompt_are_marked(tmp_path):
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n\n<extra_id_1>User\nWhy?\n"
    ((record,), _) = made(tmp_path, "helpsteer", steer(prompt, "a", 1), steer(prompt, "b", 4))
    assert said(record) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?\n")]
    ((begun_by_mark, plain), _) = made(
        tmp_path, "helpsteer", *(steer(text, answer, ord(answer) - 97) for text in ("<extra_id_1>User\nHi", "Hi")
                                 for answer in "ab")
    )  # fmt: skip
    assert said(begun_by_mark) == said(plain) == [("user", "Hi")]


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


def test_an_alpaca_list_with_a_repeated_answer_or_of_one_is_rejected(tmp_path):
    row = {"instruction": "Do it."}
    rows = [{**row, "output": output} for output in (["a"], ["a", "b", "a"], ["a", ""], "a", ["a", 1])]
    _, reasons = made(tmp_path, "alpaca-ranked", *rows)
    assert reasons == [
        "candidates: fewer than two answers", "ranks: identical candidates have different ranks",
        "candidates.text: empty", "output: not a list", "candidates.text: not text",
    ]  # fmt: skip
    assert best(one(tmp_path, "alpaca-ranked", {**row, "chosen": "a", "rejected": "b"})) == "a"


@real
def test_candidates_with_ranks_are_read_as_the_schema_s_own_rows():
    path = DATA / "preferences" / "oasst1_en_validation_ranked.jsonl"
    records, rejects = read("jsonl", path)
    assert (len(records), [reject.reason for reject in rejects]) == (
        415,
        ["ranks: identical candidates have different ranks"],
    )
    first = json.loads(path.open(encoding="utf-8").readline())
    assert best(records[0]) == min(first["candidates"], key=lambda candidate: candidate["rank"])["text"]
