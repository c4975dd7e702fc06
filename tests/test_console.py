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


def test_the_columns_of_a_narrow_table_keep_their_words_whole_as_long_as_all_words_fit():
    rows = [["run", "doctor"], ["a/path/of/twenty-four/ch", "clipping-saturated, never-ends"], ["b", "-"]]
    assert console._column_widths(rows, 60) == [24, 30]  # all fits
    assert console._column_widths(rows, 50) == [24, 26]  # between the words of the second column
    assert console._column_widths(rows, 43) == [24, 19]  # one word a line
    assert console._column_widths(rows, 30) == [15, 15]  # nothing else is left but to break words
    assert console._column_widths([["run", "x"], ["p" * 90, "one two"]], 60) == [53, 7]  # what long words leave


def test_widths_count_lines_of_a_cell_and_the_cells_of_wide_letters():
    assert console._column_widths([["a", "b"], ["日本語", "one\ntwo"]], 80) == [6, 3]
    assert console._column_widths([["", "b"], ["", "\x1b[31m"]], 80) == [1, 5]


def test_a_table_fits_where_its_columns_do(capsys):
    console.table("t", ["run", "doctor"], [["a/path", "clipping-saturated, " * 9]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110 and sum(line.count("clipping-saturated") for line in lines) == 9
