"""`rlhf data dedup`: one record of those that are the same, none that is in an evaluation set, all accounted for."""

from __future__ import annotations

import json

import pytest
from rows import DEMONSTRATION, RANKING, dataset, jsonl, last_line, prompts, run, tree

from data_tools.curate.dedup import dedup_dataset
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset

LONG = "Please tell me how I should peel a clove of garlic quickly without a knife"


def sources(path):
    return [record.source for record in open_dataset(path).records()]


def numbered(rows):
    """The rows, each with its position as the source."""
    return [{**row, "source": str(index)} for index, row in enumerate(rows)]


def dropped(folder):
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("by", "expected"), [("record", ["0", "1", "3", "4"]), ("answers", ["0", "3", "4"]), ("prompt", ["0", "4"])]
)
def test_the_same_record_the_same_answers_and_the_same_prompt_are_three_things(tmp_path, by, expected):
    turned = {**RANKING, "candidates": RANKING["candidates"][::-1], "ranks": [2, 1, 1]}
    other_answers = {**RANKING, "candidates": ["Fig.", "Car."], "ranks": [1, 2]}
    rows = numbered([RANKING, turned, RANKING, other_answers, {**RANKING, "prompt": "Name a nut."}])
    said = dedup_dataset(dataset(tmp_path / "d", rows), tmp_path / "n", by=by)
    assert sources(tmp_path / "n") == expected
    assert (said["read"], said["written"], said["dropped"]) == (5, len(expected), {"duplicate": 5 - len(expected)})


def test_two_annotators_rankings_of_one_prompt_are_two_records(tmp_path):
    rows = [{**RANKING, "annotator": name} for name in ("kim", "jon", "kim")]
    assert dedup_dataset(dataset(tmp_path / "d", rows), tmp_path / "n")["written"] == 2


def test_of_the_same_the_first_stays_or_the_best(tmp_path):
    rows = numbered(
        [
            {**RANKING, "weight": 0.5},  # 2 pairs told apart
            {**RANKING, "weight": 0.5, "ranks": [1, 2, 3]},  # 3 pairs
            {**RANKING, "weight": 0.5, "ranks": [3, 2, 1]},  # 3 pairs, later
            {**RANKING, "weight": 0.25, "ranks": [2, 1, 3]},
        ]
    )
    parent = dataset(tmp_path / "d", rows)
    for keep, expected in [("first", ["0"]), ("best", ["1"])]:
        dedup_dataset(parent, tmp_path / keep, by="prompt", keep=keep)
        assert sources(tmp_path / keep) == expected
    kept = next(iter(open_dataset(tmp_path / "best").records()))
    assert [row["same_as"] for row in dropped(tmp_path / "best")] == [kept.id] * 3


def test_near_prompts_are_the_same_when_asked_for(tmp_path):
    near = f"  {LONG.upper()}?? "
    parent = dataset(tmp_path / "d", numbered([{"prompt": LONG}, {"prompt": "Why?"}, {"prompt": near}]))
    assert dedup_dataset(parent, tmp_path / "n", by="prompt")["written"] == 3
    said = dedup_dataset(parent, tmp_path / "n", by="prompt", near=0.8, overwrite=True)
    assert (said["written"], said["dropped"]) == (2, {"near": 1})
    assert sources(tmp_path / "n") == ["0", "1"]
    ids = [record.id for record in open_dataset(parent).records()]
    assert dropped(tmp_path / "n") == [{"id": ids[2], "why": "near", "same_as": ids[0], "prompt": near}]


def test_near_answers_to_the_same_prompt_are_the_same_and_other_answers_are_not(tmp_path):
    answers = [LONG, LONG.upper(), "Crush it under a plate, then shake it in a jar."]
    rows = numbered([{**DEMONSTRATION, "answer": answer} for answer in answers])
    dedup_dataset(dataset(tmp_path / "d", rows), tmp_path / "n", by="answers", near=0.8)
    assert sources(tmp_path / "n") == ["0", "2"]


def test_prompts_of_an_evaluation_set_are_left_out_whatever_its_kind(tmp_path):
    evaluation = dataset(tmp_path / "e", [{**RANKING, "prompt": "Question 1?"}, {**RANKING, "prompt": LONG}])
    more = jsonl(tmp_path / "more.jsonl", [{"prompt": "Question 3?"}, {"prompt": ""}])
    parent = dataset(tmp_path / "d", numbered([*prompts(5), {"prompt": LONG + "!"}, {"prompt": "Question 0?"}]))
    words = ["dedup", parent, "--against", evaluation, "--against", more, "--out", tmp_path / "n", "--json"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    said = last_line(result)
    assert (said["read"], said["written"], said["dropped"]) == (7, 4, {"against": 2, "duplicate": 1})
    assert sources(tmp_path / "n") == ["0", "2", "4", "5"]
    assert "1 bad rows in it were not compared" in result.output
    result = run(*words, "--near", 0.8, "--overwrite")
    assert last_line(result)["dropped"] == {"against": 3, "duplicate": 1}
    assert sources(tmp_path / "n") == ["0", "2", "4"]
    origin = open_dataset(tmp_path / "n", verify=True).manifest["origin"]
    assert [p["path"] for p in origin["parents"]] == [str(parent), str(evaluation), str(more)]
    expected = f"rlhf data dedup {parent} --against {evaluation} --against {more} --near 0.8"
    assert origin["command"] == expected
    assert origin["dropped"] == {"against": 3, "duplicate": 1}


def test_a_prompt_that_is_near_to_one_near_the_evaluation_set_stays(tmp_path):
    words = [f"w{i}" for i in range(40)]
    steps = [" ".join([*words[2 * step :], *(f"x{i}" for i in range(2 * step))]) for step in range(3)]
    evaluation = dataset(tmp_path / "e", [{"prompt": steps[0]}])
    parent = dataset(tmp_path / "d", [{"prompt": step} for step in steps[1:]])
    assert dedup_dataset(parent, tmp_path / "n", near=0.85, against=[evaluation])["dropped"] == {"against": 1}
    assert [record.messages[0].content for record in open_dataset(tmp_path / "n").records()] == [steps[2]]


def test_the_same_records_give_the_same_bytes_and_bad_rows_are_counted(tmp_path):
    parent = jsonl(tmp_path / "d.jsonl", [*prompts(30), {"prompt": ""}, *prompts(40)])
    for name in ("a", "b"):
        said = dedup_dataset(parent, tmp_path / name, by="prompt", near=0.9)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert (said["read"], said["written"], said["dropped"], said["rejected"]) == (71, 40, {"duplicate": 30}, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "prompts"}, "cannot compare by 'prompts'"),
        ({"keep": "last"}, "'last' is not a rule"),
        ({"keep": "best"}, "prompts have no quality to compare"),
        ({"near": 0.8}, "--near: compares prompts or answers"),
        ({"near": 0.1, "by": "prompt"}, r"not from 0\.5 to 1"),
        ({"against": ["d"]}, "no record is left out of 3"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_nothing_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "d", prompts(3))
    with pytest.raises(UserError, match=message):
        dedup_dataset("d", "n", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
