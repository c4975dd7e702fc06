"""Prodigy's choice tasks and doccano's answers."""

from __future__ import annotations

import json

import pytest
from imports import EXPORTS, by_rank, made, one, read, real, said

from data_tools.importers import IMPORTERS
from data_tools.importers.table import read_head


def choice(accept, **fields):
    options = [{"id": index, "text": text} for index, text in enumerate(("Car.", "Pear.", "Plum."))]
    row = {"text": "Name a fruit.", "options": options, "accept": accept, "answer": "accept", "_view_id": "choice"}
    return {**row, "_input_hash": 1, "_task_hash": 2, **fields}


def why(tmp_path, name, *rows):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return IMPORTERS[name].traits["detect"](read_head(path))


# ---- Prodigy ---------------------------------------------------------------------------------------------------------


def test_the_accepted_option_wins_over_all_others(tmp_path):
    record = one(tmp_path, "prodigy", choice([1], _annotator_id="ann", _timestamp=1714644672))
    assert by_rank(record) == {1: ["Pear."], 2: ["Car.", "Plum."]}
    assert said(record) == [("user", "Name a fruit.")]
    assert (record.annotator, record.time, record.shown) == ("ann", "2024-05-02T10:11:12+00:00", True)


def test_an_option_that_means_a_tie_is_no_answer(tmp_path):
    options = [{"id": 0, "text": "Car."}, {"id": 1, "text": "Pear."}, {"id": "tie", "text": "Both are equal"}]
    assert one(tmp_path, "prodigy", choice(["tie"], options=options)).ranks == (1, 1)
    record = one(tmp_path, "prodigy", choice([1], options=options))
    assert by_rank(record) == {1: ["Pear."], 2: ["Car."]}
    assert made(tmp_path, "prodigy", choice([1, "tie"], options=options)) == ([], ["a tie and an answer were accepted"])
    two = [{"id": 0, "text": "They are not."}, {"id": 1, "text": "Both are equal"}]
    assert one(tmp_path, "prodigy", choice([1], options=two)).ranks == (2, 1), "of two options it is an answer"


def test_several_accepted_options_are_tied(tmp_path):
    assert one(tmp_path, "prodigy", choice([2, 1], _session_id="set-ben")).ranks == (2, 1, 1)
    assert one(tmp_path, "prodigy", choice([2, 1], _session_id="set-ben")).annotator == "set-ben"
    assert one(tmp_path, "prodigy", choice(["0", 1, 2])).ranks == (1, 1, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (choice([1], answer="reject"), "the task was answered with reject"),
        (choice([1], answer="ignore"), "the task was answered with ignore"),
        (choice([1], answer=None), "answer: not one of accept, reject, ignore"),
        (choice([]), "no option was accepted"),
        (choice(None), "no option was accepted"),
        (choice([5]), "an accepted id is none of the options"),
        (choice([[]]), "accept: ids are not text or numbers"),
        (choice([1, []]), "accept: ids are not text or numbers"),
        (choice([1], options=[1, 2]), "options: not a list of {id, text}"),
        (choice([1], options=[{"id": 1, "text": "a"}, 2]), "options: not a list of {id, text}"),
        (choice([1], options=[{"id": 1, "text": "a"}] * 2), "two options have one id"),
        (choice([1], options=[{"id": 1, "text": "a"}]), "candidates: fewer than two answers"),
        (choice([1], options=[{"id": 1, "text": "a"}, {"id": 2}]), "candidates.text: not text"),
        (choice([1], text=""), "no prompt is found"),
        (choice([1], _timestamp="now"), "_timestamp: not seconds since 1970"),
        (choice([1], _timestamp=1e300), "_timestamp: not seconds since 1970"),
        (choice([1], _annotator_id={"a": 1}), "annotator: not text or a number"),
    ],
)
def test_tasks_without_a_preference(tmp_path, row, reason):
    assert made(tmp_path, "prodigy", row) == ([], [reason])


def test_the_prompt_may_be_in_another_field(tmp_path):
    chat = [{"role": "user", "content": "Hello?"}]
    assert said(one(tmp_path, "prodigy", choice([1], text="x", turns=chat), prompt="turns")) == [("user", "Hello?")]


@real
@pytest.mark.parametrize("name", ["github-issues-DOCUMENTATION", "reddit-INSULT"])
def test_authentic_textcat_rows_rank_no_answers(name):
    path = EXPORTS / "prodigy" / f"annotated_{name}-textcat.jsonl"
    records, rejects = read("prodigy", path)
    assert records == []
    assert [reject.reason for reject in rejects] == ["not a choice task: it has no options"] * 40
    assert [format.name for format in IMPORTERS if format.traits["detect"](read_head(path))] == []


def test_labels_are_not_taken_for_answers(tmp_path):
    assert why(tmp_path, "prodigy", choice([1]), choice([2], text="Another?")) is None
    other = choice([0], options=[{"id": 0, "text": "a"}, {"id": 1, "text": "b"}])
    assert "choice tasks" in why(tmp_path, "prodigy", choice([1]), other)


# ---- doccano ---------------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(("suffix", "lines"), [("jsonl", [2, 3, 4]), ("json", [3, 4, 5])])
def test_authentic_fixtures_of_doccano(suffix, lines):
    records, rejects = read("doccano", EXPORTS / "doccano" / f"seq2seq_example.{suffix}")
    assert [(said(record), record.answer) for record in records] == [([("user", "exampleA")], "label1")]
    assert [reject.line for reject in rejects] == lines
    assert [reject.reason for reject in rejects] == [
        "the text has no answer", "messages.content: not text", "the text has no answer",
    ]  # fmt: skip


def test_every_answer_is_a_demonstration(tmp_path):
    records, reasons = made(
        tmp_path, "doccano", {"text": "a", "label": ["b", "", 1, "c"]}, {"text": "a", "label": "b"}, 1
    )
    assert [record.answer for record in records] == ["b", "c"]
    assert reasons == ["answer: empty", "answer: not text", *["not an object with a text and a list of answers"] * 2]


def test_classes_are_not_taken_for_answers(tmp_path):
    sentence = {"text": "Name a fruit.", "label": ["A pear is a fruit."]}
    assert "whole sentences" in why(tmp_path, "doccano", sentence)
    assert why(tmp_path, "doccano", {"text": "Good.", "label": ["positive"]}, sentence) is None
    assert why(tmp_path, "doccano", {"text": "Good.", "label": [[0, 4, "positive"]]}) is None
