"""The small form of tests/faults/kills.py, which kills commands at random moments."""

from __future__ import annotations

import itertools

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
