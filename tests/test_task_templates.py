"""Templates of tasks: what they make of a row, worked by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from rows import jsonl
from task_datasets import made

from data_tools.tasks.families import families, load_family
from data_tools.tasks.make import Options, make_tasks
from rlhf.data.store import open_dataset

SNLI = [
    {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
    {"premise": "A dog runs.", "hypothesis": "The dog is brown.", "label": "neutral"},
    {"premise": "A dog runs.", "hypothesis": "The dog sleeps.", "label": 2},
]


def test_labels_become_the_words_of_the_template(tmp_path):
    rows = jsonl(tmp_path / "snli.jsonl", SNLI)
    summary = make_tasks([rows], tmp_path / "d", family="inference", options=Options(("must-it-hold",)))
    assert (summary.read, summary.written, summary.rejected) == (3, 3, 0)
    start = 'Suppose that this is true: "A dog runs."\nDoes it follow that "{}"?\n- yes\n- one cannot tell\n- no'
    assert made(tmp_path / "d") == [
        (start.format("An animal moves."), "yes"),
        (start.format("The dog is brown."), "one cannot tell"),
        (start.format("The dog sleeps."), "no"),
    ]
    record = next(iter(open_dataset(tmp_path / "d").records()))
    assert (record.group, record.source, record.split) == ("snli", "inference/must-it-hold", None)


def test_choices_are_listed_with_letters_and_joined(tmp_path):
    rows = jsonl(tmp_path / "r.jsonl", [{"text": "Great!", "label": 1}])
    make_tasks(
        [rows], tmp_path / "d", family="classification", choices="bad, good", options=Options(all_templates=True)
    )
    found = {record.source: record for record in open_dataset(tmp_path / "d").records()}
    assert len(found) == 6
    full = found["classification/lettered-in-full"]
    assert full.messages[0].content == "What fits this text?\n(A) bad\n(B) good\n\nThe text: Great!"
    assert full.answer == "(B) good"
    assert found["classification/lettered"].answer == "B"
    assert "Labels: bad, good\n" in found["classification/label-it"].messages[0].content
    assert {found[f"classification/{name}"].answer for name in ("which-of", "sort-it", "last-word")} == {"good"}


def test_a_row_uses_the_templates_that_leave_nothing_of_it_out(tmp_path):
    family = load_family("qa")
    rows = [
        {"question": "Who?", "answer": "Ada."},
        {"question": "Who?", "answer": "Ada.", "context": "Ada did."},
        {"question": "Who?", "answer": "b", "choices": ["a", "b"]},
        {"question": "Who?", "answer": "b", "choices": ["a", "b"], "context": "b did."},
    ]
    make_tasks([jsonl(tmp_path / "r.jsonl", rows)], tmp_path / "d", family="qa", options=Options(all_templates=True))
    used = Counter(record.source.split("/")[1] for record in open_dataset(tmp_path / "d").records())
    assert used == {template.name: 1 for template in family.templates}
    for prompt, _ in made(tmp_path / "d"):
        assert prompt.count("Who?") == 1


@pytest.mark.parametrize("name", families())
def test_every_template_of_ours_can_be_used_and_does_not_tell_the_answer(name, tmp_path):
    family = load_family(name)
    with_choices = {"choices": ["this one", "that one"], family.answer: "that one"} if not family.choices else {}
    row = {field: f"<{field}>" for field in (*family.fields, *family.optional)}
    rows = []
    for optional in ([], family.optional):
        kept = {field: text for field, text in row.items() if field in family.fields or field in optional}
        answers = [{family.answer: family.choices[1]}] if family.choices else [{}, with_choices]
        rows += [kept | answer for answer in answers]
    file = jsonl(tmp_path / "r.jsonl", rows)
    make_tasks([file], tmp_path / "d", templates=family.file, options=Options(all_templates=True))
    records = list(open_dataset(tmp_path / "d").records())
    assert {record.source for record in records} == {f"{name}/{template.name}" for template in family.templates}
    for record in records:
        text = record.messages[0].content
        assert f"<{family.answer}>" not in text and record.answer
        for field in set(family.fields) - {family.answer}:
            assert text.count(f"<{field}>") == 1, f"{record.source} leaves out {field}"


def test_reasons_come_before_the_answer_where_there_are_some(tmp_path):
    rows = jsonl(
        tmp_path / "r.jsonl",
        [{"question": "2 + 2?", "answer": 4, "rationale": "Two and two."}, {"question": "1?", "answer": "One."}],
    )
    ask = ("2 + 2?", "4"), ("1?", "One.")
    reasoned = ("Reason step by step, then answer.\n2 + 2?", "Two and two.\nThe answer is 4.")
    for cot, expected in [("auto", [reasoned, ask[1]]), ("never", list(ask)), ("both", [ask[0], reasoned, ask[1]])]:
        make_tasks([rows], tmp_path / cot, family="qa", options=Options(("ask",), cot=cot))
        assert made(tmp_path / cot) == expected
    assert next(iter(open_dataset(tmp_path / "auto").records())).source == "qa/ask+cot"
