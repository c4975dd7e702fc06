"""The command line in provenance records."""

from __future__ import annotations

import sys

import pytest

from rlhf.core.command_line import command_line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/rlhf", "data", "filter", "a", "--where", "k > 2"], "rlhf data filter a --where 'k > 2'"),
        (["/home/me/stages/cli.py", "data", "mix", "a", "b"], "rlhf data mix a b"),
        (["prepare.py", "a"], "prepare.py a"),
        (["rlhf", "data", "split", "a", "--out", "b", "--seed", "3", "--json"], "rlhf data split a --seed 3"),
        (["rlhf", "data", "split", "a", "--out=b"], "rlhf data split a"),
    ],
)
def test_the_command_line_is_what_a_shell_would_take(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected
