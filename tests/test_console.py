"""Text of others is data: nothing of it is markup, and no control character of it reaches the terminal or a page."""

from __future__ import annotations

import json

import pytest

from rlhf.core import console
from rlhf.core.errors import UserError

HOSTILE = "x\\[/red] [bold]\\[x^2\\][/] :smile: \x1b[31m \x9b31m \x07 \u202egpj.exe"
SHOWN = r"x\[/red] [bold]\[x^2\][/] :smile: "


def safe(text):
    return not any(letter in text for letter in ("\x1b", "\x9b", "\x07", "\u202e"))


@pytest.mark.parametrize(
    "print_it",
    [
        console.say,
        console.warn,
        lambda text: console.table(text, [text], [[text]]),
        lambda text: console.out().print(text, style="red"),
        lambda text: console.StepBar(text, 2).note(text),
    ],
    ids=["say", "warn", "table", "print", "bar"],
)
def test_a_text_is_printed_as_it_is_without_its_control_characters(capsys, print_it):
    print_it(HOSTILE)
    printed = "".join(capsys.readouterr())
    assert SHOWN in printed
    assert safe(printed)


def test_json_escapes_what_a_terminal_could_obey_and_keeps_the_value(capsys):
    console.print_json({HOSTILE: "é 猫"})
    printed = capsys.readouterr().out
    assert safe(printed)
    assert "é 猫" in printed
    assert json.loads(printed) == {HOSTILE: "é 猫"}


def test_wide_spaces_and_joiners_of_scripts_are_no_control_characters():
    text = "a\u00a0b\u3000c می\u200cخواهم \N{WOMAN}\u200d\N{PERSONAL COMPUTER}\n\t"
    assert console.printable(text) == text


def test_an_error_shows_a_hostile_value_as_text(capsys):
    from rlhf.cli.errors import print_error

    print_error(UserError(f"{HOSTILE}: unknown key", HOSTILE, HOSTILE))
    printed = capsys.readouterr().err
    assert printed.count(SHOWN.strip()) == 3
    assert safe(printed)
