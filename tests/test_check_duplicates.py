"""Duplicates: records, prompts across splits, near-duplicates, evaluation prompts, stock answers."""

from __future__ import annotations

import numpy as np
import pytest
from check_rows import ranking
from rows import dataset, jsonl, prompts, write

from data_tools.check.metrics import NO_NEAR, NO_SPLITS
from data_tools.check.report import check
from data_tools.statistics import duplicates, sample
from data_tools.statistics.facts import gathered
from rlhf.data.schema import Demonstration, Message

LONG = "Please explain to me in a few simple words how the {} in my old kitchen came to work so well after all"


def value(report, name):
    return report[name].found.value


def test_records_that_repeat_in_everything_are_counted(tmp_path):
    rows = [ranking("p", "xy", (1, 2), "a")] * 3 + [ranking("p", "xy", (1, 2), "b"), ranking("p", "yx", (1, 2), "a")]
    found = check(write(tmp_path / "d", rows).path)["duplicate-records"].found
    assert (found.value, found.n) == (2 / 5, 5)


def test_prompts_in_two_splits_are_counted_and_shown(tmp_path):
    rows = [ranking(p, "xy", (1, 2), split=s) for p, s in (("p", "train"), ("p", "eval"), ("q", "train"), ("r", None))]
    report = check(write(tmp_path / "d", rows).path)
    assert value(report, "prompts-across-splits") == 1
    assert [e.texts for e in report.examples if e.metric == "prompts-across-splits"] == [[("prompt", "p")]]


def test_one_split_has_no_leaks_to_look_for(tmp_path):
    report = check(write(tmp_path / "d", [ranking("p", "xy", (1, 2), split="train")]).path)
    assert report["prompts-across-splits"].why == report["near-duplicates-across-splits"].why == NO_SPLITS


def test_near_duplicates_are_found_within_and_across_splits(tmp_path):
    texts = [
        (LONG.format("oven"), "train"),
        (LONG.format("oven").upper() + "!", "train"),
        (LONG.format("oven") + "?", "eval"),
    ]
    texts += [("How deep is the sea?", "train"), ("Why is the sky blue?", "eval")]
    report = check(write(tmp_path / "d", [ranking(t, "xy", (1, 2), split=s) for t, s in texts]).path)
    assert value(report, "near-duplicates-within-splits") == 1 / 5  # beyond the first of its split
    assert value(report, "near-duplicates-across-splits") == 3
    assert value(report, "prompts-across-splits") == 0
    (example,) = [e for e in report.examples if e.metric == "near-duplicates-across-splits"]
    assert {label for label, _ in example.texts} == {"prompt (train)", "prompt (eval)"}


def test_no_near_leaves_that_search_out_and_says_so(tmp_path):
    report = check(write(tmp_path / "d", [ranking("p", "xy", (1, 2))]).path, near=False)
    assert report["near-duplicates-within-splits"].why == NO_NEAR
    assert value(report, "near-identical-pairs") == 0


def test_evaluation_prompts_in_train_are_contamination_and_those_in_eval_are_not(tmp_path):
    known = [LONG.format("oven"), "How deep is the sea?", "Why is the sky blue?"]
    evaluation = jsonl(tmp_path / "e.jsonl", [{"prompt": text} for text in known])
    rows = [("How deep is the sea?", "train"), ("Why is the sky blue?", "eval"), (LONG.format("oven") + "?", None)]
    data = write(tmp_path / "d", [ranking(t, "xy", (1, 2), split=s) for t, s in [*rows, ("Who?", "train")]])
    report = check(data.path, against=[evaluation, dataset(tmp_path / "f", prompts(3))])
    exact, near = (report[name].found for name in ("contaminated-prompts", "near-contaminated-prompts"))
    assert (exact.value, exact.n, near.value) == (1, 3, 1)
    shown = {e.metric: e.texts for e in report.examples}
    assert shown["contaminated-prompts"] == [("prompt", "How deep is the sea?")]
    assert shown["near-contaminated-prompts"][1][1] == LONG.format("oven")


def test_stock_answers_are_counted_over_prompts(tmp_path):
    refusal = "I am sorry, but I cannot help you with that kind of request."
    rows = [ranking(f"q{i}", [refusal, f"answer {i}"], (1, 2)) for i in range(3)]
    rows += [ranking("q3", ["own", "other"], (1, 2)), ranking("q3", ["own", "third"], (1, 2))]  # again, for one prompt
    report = check(write(tmp_path / "d", rows).path)
    assert value(report, "repeated-answers") == 3 / 10
    assert value(report, "near-duplicate-answers") == pytest.approx(3 / 9)
    assert ("answer, 3 times", refusal) in [e.texts[0] for e in report.examples]


def test_pairs_that_hardly_differ_are_counted(tmp_path):
    rows = [ranking("p", [LONG.format("oven"), LONG.format("oven") + "!"], (1, 2)), ranking("q", ["x", "y"], (1, 2))]
    assert value(check(write(tmp_path / "d", rows).path), "near-identical-pairs") == 1 / 2


def test_demonstrations_and_prompts_are_checked_for_what_they_have(tmp_path):
    turn = (Message("user", "Hm?"),)
    report = check(write(tmp_path / "d", [Demonstration(turn, answer="x"), Demonstration(turn, answer="x")]).path)
    assert value(report, "duplicate-records") == 1 / 2
    assert report["agreement"].why == "only datasets of rankings have this metric"
    report = check(dataset(tmp_path / "p", prompts(4)))
    assert report["answer-length"].found is None
    assert value(report, "near-duplicates-within-splits") == 0


def test_a_large_dataset_is_sampled_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "MOST_RECORDS", 30)
    monkeypatch.setattr(sample, "MOST_PROMPTS", 20)
    splits = ["train"] * 80 + ["eval"] * 6
    rows = [ranking(f"How much is {i} and {i * i}?", ["x", f"y{i}"], (1, 2), split=s) for i, s in enumerate(splits)]
    data = write(tmp_path / "d", rows)
    report = check(data.path)
    assert report["near-duplicates-across-splits"].found.n == 20
    assert report["near-identical-pairs"].found.n == 30
    assert {m.name for m in report.measured if m.sampled} >= {"near-duplicates-across-splits", "near-identical-pairs"}
    assert not report["longer-wins"].sampled
    with gathered(data.path) as facts:
        held_out = facts.columns.split[facts.texts.prompts] == 1
        assert held_out.sum() == 6  # evaluation prompts are first served
    assert report.as_dict() == check(data.path).as_dict()


def test_repeats_are_the_later_ones():
    share, rows = duplicates.repeats(np.array([7, 5, 7, 7], np.uint64))
    assert (share.value, rows.tolist()) == (1 / 2, [2, 3])


def test_a_long_text_keeps_both_ends():
    text = "a" * sample.CUT + "b"
    assert sample._cut(text).startswith("aaa")
    assert sample._cut(text).endswith("ab")
    assert len(sample._cut(text)) == sample.CUT + 1
