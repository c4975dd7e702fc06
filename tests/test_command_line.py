"""The command line in provenance records."""

from __future__ import annotations

import sys

import pytest

from rlhf.cli.errors import print_error
from rlhf.core.command_line import command_line, without_credentials
from rlhf.core.errors import UserError


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/rlhf", "data", "filter", "a", "--where", "k > 2"], "rlhf data filter a --where 'k > 2'"),
        (["/home/me/stages/cli.py", "data", "mix", "a", "b"], "rlhf data mix a b"),
        (["prepare.py", "a"], "prepare.py a"),
        (["rlhf", "data", "split", "a", "--out", "b", "--seed", "3", "--json"], "rlhf data split a --seed 3"),
        (["rlhf", "data", "split", "a", "--out=b"], "rlhf data split a"),
        (["rlhf", "pull", "c", "--url", "http://me:secret@host:80/a"], "rlhf pull c --url http://host:80/a"),
        (["rlhf", "pull", "c", "--url=https://token@host"], "rlhf pull c --url=https://host"),
    ],
)
def test_the_command_line_is_what_a_shell_would_take(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:p@ss@host/x", "http://host/x"),
        ("see https://me:secret@a.b and http://c.d/e", "see https://a.b and http://c.d/e"),
        ("s3+http://key@bucket", "s3+http://bucket"),
        ("http://host/a@b", "http://host/a@b"),
        ("mail me@host", "mail me@host"),
        ("http://host?q=a@b", "http://host?q=a@b"),
    ],
)
def test_urls_lose_their_credentials(text, expected):
    assert without_credentials(text) == expected


def test_an_error_is_printed_without_credentials(capsys):
    print_error(UserError("http://me:secret@host: no answer", "http://me:secret@host", "try http://me:secret@other"))
    printed = capsys.readouterr().err
    assert "secret" not in printed and "http://host: no answer" in printed and "http://other" in printed
