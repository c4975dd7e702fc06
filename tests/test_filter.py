"""`rlhf data filter`: by expression and by tokens; what is left out is counted."""

from __future__ import annotations

import json

import pytest
import tiny
from rows import DEMONSTRATION, RANKING, dataset, jsonl, last_line, prompts, run

from data_tools.curate.filter import fields, filter_dataset
from rlhf.core.errors import UserError
from rlhf.data.schema import KINDS
from rlhf.data.store import open_dataset

RANKINGS = [
    {**RANKING, "annotator": "kim", "seconds": 4, "group": "fruit", "source": "tool"},  # ranks 1, 1, 2
    {**RANKING, "annotator": "jon", "ranks": [1, 2, 3], "weight": 0.25},
    {"prompt": "Yes or no?", "candidates": ["Yes.", {"text": "No!!!", "author": "m", "author_kind": "model"}],
     "ranks": [2, 1], "annotator": "kim", "split": "eval"},
]  # fmt: skip


def kept(folder, rows, where):
    """Positions of the rows that are kept."""
    rows = [{**row, "source": str(index)} for index, row in enumerate(rows)]
    filter_dataset(dataset(folder / "parent", rows), folder / "kept", where=where, overwrite=True)
    return sorted(int(record.source) for record in open_dataset(folder / "kept").records())


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("annotator == 'kim'", [0, 2]),
        ("k > 2 and not ties", [1]),
        ("ties == 1", [0]),
        ("seconds is not none and seconds < 5", [0]),
        ("weight < 1 or split == 'eval'", [1, 2]),
        ("prompt == 'Yes or no?'", [2]),
        ("answer_chars == 5 and turns == 1", [0, 1, 2]),  # 'Pear.' and 'No!!!'
        ("prompt_chars < 13", [2]),  # 'Name a fruit.' has 13
        ("candidates|selectattr('rank', 'eq', 1)|map(attribute='author_kind')|first == 'model'", [2]),
        ("candidates[0].chars > candidates[1].chars or ranks[0] == 2", [2]),
        ("group is none and messages[0].role == 'user' and not shown and merged == []", [1, 2]),
        ("prompt is search('(?i)YES')", [2]),
    ],
)
def test_rankings_are_kept_for_which_the_expression_holds(tmp_path, where, expected):
    assert kept(tmp_path, RANKINGS, where) == expected


def test_every_kind_has_its_fields(tmp_path):
    demonstrations = [{**DEMONSTRATION, "author": "ines"}, {**DEMONSTRATION, "answer": "A pear, I think."}]
    assert kept(tmp_path, demonstrations, "author == 'ines' and answer|length < 6 and answer_chars == 5") == [0]
    proposals = [{"prompt": "a?", "candidates": ["x", "y", "z"]}, {"prompt": "b?", "candidates": ["x", "y"]}]
    assert kept(tmp_path, proposals, "k == 2 and candidates[0].rank is none") == [1]
    assert kept(tmp_path, prompts(3), "prompt.startswith('Question 1')") == [1]
    assert not {"ranks", "answer", "answer_chars"} & fields("prompt").keys()
    assert all(fields(kind) for kind in KINDS)


def test_what_is_left_out_is_counted_in_the_manifest(tmp_path):
    parent = jsonl(tmp_path / "d.jsonl", [*prompts(5), {"prompt": ""}])
    result = run("filter", parent, "--where", "prompt != 'Question 3?'", "--out", tmp_path / "f", "--json")
    assert result.exit_code == 0, result.output
    said = last_line(result)
    assert (said["read"], said["written"], said["filtered"], said["rejected"]) == (6, 4, 1, 1)
    assert said["reasons"] == {"messages.content: empty": 1}
    assert "read 6 = written 4 + left out 1 + rejected 1" in result.stdout
    assert json.loads((tmp_path / "f" / "rejected.jsonl").read_text())["line"] == 6
    origin = open_dataset(tmp_path / "f", verify=True).manifest["origin"]
    assert origin["command"] == f"rlhf data filter {parent} --where 'prompt != '\"'\"'Question 3?'\"'\"''"
    assert (origin["filtered"], origin["written"], origin["rejected"]) == (1, 4, 1)
    assert origin["parents"] == [{"path": str(parent), "fingerprint": open_dataset(parent).fingerprint}]


def test_an_expression_that_fails_on_records_writes_nothing_and_names_the_first(tmp_path):
    parent = dataset(tmp_path / "d", RANKINGS)
    with pytest.raises(UserError, match="fails on 2 records; nothing was written") as caught:
        filter_dataset(parent, tmp_path / "f", where="seconds < 5")
    second = list(open_dataset(parent).records())[1]
    assert f"First: record {second.id}: '<' not supported" in caught.value.why
    assert "seconds is none or" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "annotater == 'kim'"}, "there is no field 'annotater'"),
        ({"where": "answer == 'x'"}, "there is no field 'answer'"),  # of demonstrations, not of rankings
        ({"where": "k >"}, "not an expression"),
        ({"where": "tokens < 10"}, "`tokens` needs --tokenizer"),
        ({"max_tokens": 10}, "--max-tokens: needs --tokenizer"),
        ({}, "nothing to filter by"),
        ({"where": "k == 17"}, "no record is left out of 3"),
        ({"where": "k == 2", "tokenizer": "nowhere"}, "no tokenizer there"),
    ],
)
def test_conditions_that_make_no_sense_are_refused_and_nothing_is_written(tmp_path, options, message):
    parent = dataset(tmp_path / "d", RANKINGS)
    with pytest.raises(UserError, match=message):
        filter_dataset(parent, tmp_path / "f", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_bad_expression_is_refused_before_a_row_is_read(tmp_path):
    parent = dataset(tmp_path / "d", RANKINGS)
    shard = parent / "shard-00000.parquet"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="damaged"):
        filter_dataset(parent, tmp_path / "f", where="k == 2")
    with pytest.raises(UserError, match="there is no field 'x'"):
        filter_dataset(parent, tmp_path / "f", where="x")


def test_tokens_are_those_of_the_tokenizer_without_a_template(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "t")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "and the red dog?"}]  # fmt: skip
    rows = [
        {"messages": chat, "candidates": ["a cat", "a cat and a dog in the garden"], "ranks": [1, 2]},
        {"prompt": "the cat", "candidates": ["a", "b"], "ranks": [1, 2]},
    ]
    parent = dataset(tmp_path / "d", rows)

    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt, answer = sum(count(turn["content"]) for turn in chat), count("a cat and a dog in the garden")
    options = {"tokenizer": tmp_path / "t"}
    where = f"prompt_tokens == {prompt} and answer_tokens == {answer} and tokens == {prompt + answer}"
    assert filter_dataset(parent, tmp_path / "f", where=where, **options, overwrite=True)["written"] == 1
    for limits, written in [
        ({"max_tokens": prompt + answer}, 2),
        ({"max_tokens": prompt + answer - 1}, 1),
        ({"min_tokens": prompt + answer}, 1),
        ({"min_tokens": 1, "max_tokens": prompt + answer - 1, "where": "k == 2"}, 1),
    ]:
        assert filter_dataset(parent, tmp_path / "f", **options, **limits, overwrite=True)["written"] == written
    result = run(
        "filter", parent, "--out", tmp_path / "f", "--tokenizer", tmp_path / "t", "--max-tokens", 99, "--overwrite"
    )
    assert result.exit_code == 0, result.output
    command = open_dataset(tmp_path / "f").manifest["origin"]["command"]
    assert command == f"rlhf data filter {parent} --tokenizer {tmp_path / 't'} --max-tokens 99"
