"""`auto` recognises a format by all of the first rows of a file, and by what their fields hold."""

from __future__ import annotations

import json

import pytest
from rows import jsonl

from data_tools.importers import IMPORTERS
from data_tools.importers.table import detect, read_head
from rlhf.core.errors import UserError


def rows_of(sample):
    """The rows of a sample in JSON or JSON lines; none of another sample."""
    for text in (f"[{','.join(sample.splitlines())}]", sample):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        found = found if isinstance(found, list) else [found]
        return found if all(isinstance(row, dict) for row in found) else []
    return []


SAMPLES = {row.name: rows for row in IMPORTERS if (rows := rows_of(row.traits["sample"]))}


def found(tmp_path, rows):
    head = read_head(jsonl(tmp_path / "in.jsonl", rows))
    return [row.name for row in IMPORTERS if row.traits["detect"](head)]


def test_there_are_samples():
    assert len(SAMPLES) > 30


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_of_its_format_alone(name, tmp_path):
    assert found(tmp_path, SAMPLES[name]) == [name]


@pytest.mark.parametrize("name", SAMPLES)
def test_one_row_of_another_shape_among_the_first_makes_the_format_unknown(name, tmp_path):
    assert found(tmp_path, [*SAMPLES[name], {"unrelated": 1}]) == []
    assert found(tmp_path, [{"unrelated": 1}, *SAMPLES[name]]) == []


@pytest.mark.parametrize(("name", "change"), [
    ("hh-rlhf", {"prompt": "Name a fruit."}),
    ("hh-rlhf", {"rejected": "Car."}),
    ("openassistant", {"prompt": "Name a fruit."}),
    ("stack-exchange", {"answers": "Use `sorted`."}),
    ("stack-exchange", {"answers": [{"text": "Use `sorted`."}]}),
])  # fmt: skip
def test_fields_of_the_right_names_that_hold_something_else_are_not_recognised(name, change, tmp_path):
    assert name not in found(tmp_path, [row | change for row in SAMPLES[name]])


def test_files_of_two_formats_and_a_file_of_none_are_refused_with_what_they_are(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", SAMPLES["alpaca"])
    other = jsonl(tmp_path / "b.jsonl", SAMPLES["dolly"])
    assert detect([first, first])[0] == "alpaca"
    with pytest.raises(UserError, match=r"different formats: .*a\.jsonl is alpaca because .*b\.jsonl is dolly because"):
        detect([first, other])
    with pytest.raises(UserError, match=r"no format is recognised") as refused:
        detect([jsonl(tmp_path / "c.jsonl", [{"unrelated": 1}])])
    assert "its first row has the fields 'unrelated'" in str(refused.value)
