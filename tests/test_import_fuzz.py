"""Any importer on any damaged file: a UserError or an account of every row, never a traceback."""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imports import AUTHENTIC

from data_tools.importers import IMPORTERS
from data_tools.importers.run import NothingUsable, import_dataset
from data_tools.importers.table import detect
from data_tools.io.rejects import FILE_NAME
from rlhf.core.errors import UserError
from rlhf.data.jsonl import open_bytes
from rlhf.data.store import open_dataset

DEEP = "@deep@"
"""Stands for a value nested too deeply, until the text is made: `json.dumps` cannot write one."""
JUNK = [
    None, True, False, 0, 1, -1, 1.5, 10**400, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "a", "N/A",
    "x" * 100_000, [], {}, [[]], [{}], [None], {"": None}, {"text": 1}, DEEP,
]  # fmt: skip
SCRAPS = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\x00",
    b'"',
    b"'",
    b"{",
    b"]",
    b"[",
    b"}",
    b",",
    b"\n",
    b"\\",
    b"\r",
]
GROUPING = {"helpsteer", "kto", "openassistant"}
"""Formats in which several rows make one record."""


def seeds(row):
    """Texts of the format: its sample, and the beginning of its authentic files."""
    texts = [row.traits["sample"].encode()]
    for file in AUTHENTIC.get(row.name, []):
        if file.exists() and file.stat().st_size < 500_000:
            texts.append(file.read_bytes())
        elif file.exists():
            with open_bytes(file) as lines:
                texts.append(b"".join(islice(lines, 5)))
    return texts


def values(text):
    """The JSON values in a file's text, at most 5; none where it is not JSON."""
    try:
        whole = json.loads(text)
        return (whole if isinstance(whole, list) else [whole])[:5]
    except ValueError:
        pass  # not one value
    try:
        return [json.loads(line) for line in text.splitlines()[:5] if line.strip()]
    except ValueError:
        return []


@st.composite
def damaged_values(draw, rows):
    """Rows with a few values dropped, doubled or replaced by something else."""
    rows = [copy.deepcopy(row) for row in draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3))]
    for _ in range(draw(st.integers(1, 4))):
        parent, keys = rows, list(range(len(rows)))
        key = draw(st.sampled_from(keys)) if keys else None
        while key is not None and isinstance(parent[key], (list, dict)) and parent[key] and draw(st.integers(0, 3)):
            parent = parent[key]
            key = draw(st.sampled_from(range(len(parent)) if isinstance(parent, list) else sorted(parent)))
        if key is None:
            break
        action = draw(st.sampled_from(["drop", "junk", "junk", "double"]))
        if action == "drop" and parent is not rows:
            del parent[key]
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    return rows


def as_text(rows, form):
    """The rows as a JSON file of one of the forms."""
    lines = [json.dumps(row).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000) for row in rows]
    if form == "lines" and not lines[0].startswith("["):  # what begins with a bracket is read as an array
        return "\n".join(lines).encode()
    return ("[\n" + ",\n".join(lines) + "\n]").encode()


@st.composite
def damaged_bytes(draw, texts):
    """A file's bytes with pieces cut out, cut off or put in."""
    data = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["put", "put", "cut out", "cut off"]))
        if action == "put":
            data = data[:at] + draw(st.sampled_from(SCRAPS) | st.binary(max_size=4)) + data[at:]
        else:
            data = data[:at] + (b"" if action == "cut off" else data[at + draw(st.integers(1, 40)) :])
    zipped = draw(st.sampled_from([None, None, gzip.compress, zstandard.compress]))
    if zipped:
        data = zipped(data)
        at = draw(st.integers(0, len(data)))
        data = draw(st.sampled_from([data, data[:at], data[:at] + b"\x00" + data[at + 1 :], data + b"rest"]))
    return data


def some_options(row):
    """Options that the sample needs, and any choice of those that are one of some words."""
    choices = {
        name: st.sampled_from(get_args(field.annotation))
        for name, field in row.options.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    needed = row.traits.get("sample_options", {})
    return st.fixed_dictionaries({}, optional=choices).map(lambda chosen: {**chosen, **needed})


def account(row, data, options):
    """Import the bytes; the number of rows read, or None where the file as a whole is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / f"in{row.traits['suffixes'][0]}", Path(folder) / "d"
        path.write_bytes(data)
        with suppress(UserError):
            detect([path])
        try:
            summary = import_dataset(row.name, [path], out, options=options, overwrite=True)
        except NothingUsable as error:
            summary = error.summary
            assert not out.exists()
            assert summary.written == 0
        except UserError:
            assert not out.exists()
            return None
        else:
            assert sum(1 for _ in open_dataset(out, verify=True).records()) == summary.written
            rejected = out / FILE_NAME
            lines = rejected.read_text("utf-8").splitlines() if rejected.exists() else []
            assert len([json.loads(line) for line in lines]) == summary.rejected
        assert summary.read == summary.written + summary.rejected == summary.written + sum(summary.reasons.values())
        return summary.read


def check_values(row, examples, **more):
    rows = [value for text in seeds(row) for value in values(text)]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **more)
    @given(damaged_values(rows), st.sampled_from(["lines", "array"]), some_options(row))
    def check(damaged, form, options):
        read = account(row, as_text(damaged, form), options)
        if read is not None and row.name not in GROUPING:
            assert read >= len(damaged), "a row is lost"

    check()


def check_bytes(row, examples, **more):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **more)
    @given(damaged_bytes(seeds(row)), some_options(row))
    def check(data, options):
        account(row, data, options)

    check()


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


OF_JSON = [row for row in IMPORTERS if values(row.traits["sample"])]


@each(OF_JSON)
def test_rows_with_dropped_swapped_huge_and_deep_values_are_accounted_for(row):
    check_values(row, 5, derandomize=True)


@each(IMPORTERS)
def test_files_that_are_cut_garbled_or_badly_compressed_are_accounted_for(row):
    check_bytes(row, 5, derandomize=True)


@pytest.mark.slow
@each(IMPORTERS)
def test_many_more_of_both(row):
    check_bytes(row, 50)
    if row in OF_JSON:
        check_values(row, 50)
