"""The small form of tests/faults/kills.py, which kills commands at random moments."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from faults import kills

pytestmark = pytest.mark.slow


def test_killed_commands_go_on_to_the_same_result() -> None:
    found = kills.faults(2, 0, ["rank", "sft"])
    assert sum(tally.kills for tally in found.values()) == 2
    assert not [fault for tally in found.values() for fault in tally.faults]
    assert all(tally.same == tally.folders > 0 for tally in found.values())


def test_another_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    kind = kills.Kind(("--version",), lambda place: next(count))
    monkeypatch.setattr(kills, "prepare", lambda place: {"version": kind})
    found = kills.faults(1, 0)["version"]
    assert found.same == 0 and "another result" in found.faults[0]


def test_a_recorded_series_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kills.Kind(("--version",), lambda place: "same")
    monkeypatch.setattr(kills, "prepare", lambda place: {"version": kind})
    record = tmp_path / "record.jsonl"
    first = kills.faults(2, 0, record=record)["version"]
    lines = record.read_text("utf-8").splitlines()
    assert len(lines) == first.folders and sum(json.loads(line)["kills"] for line in lines) == first.kills == 2
    second = kills.faults(4, 0, record=record)["version"]
    assert second.kills == 4 and second.folders > first.folders
    assert record.read_text("utf-8").splitlines()[: len(lines)] == lines
    assert kills.recorded(record)["version"] == second
