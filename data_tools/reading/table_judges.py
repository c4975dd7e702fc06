"""Who won in a row of a table: by ranks, boxes, a choice, best and worst, a listed order, or the order of columns."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from data_tools.reading.judgements import TIE, ChoiceValues, choice_meanings, means_tie, named_answer, score
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord, brief

NOTHING = "Nothing was preferred; leave it out."


class TableJudge(NamedTuple):
    """What says who won in a row of a table."""

    columns: Sequence[str]
    """The columns that it reads, other than the answers."""
    ranks: Callable[[Mapping[str, str], list[str]], dict[str, float]]
    """Of a row and the answers that are not empty: a number for each answer that is ranked, the lowest = the best."""


def _by_ranks(answers: list[str], columns: list[str], highest_best: bool) -> TableJudge:
    """A column of each answer holds its number."""

    def ranks(row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        given = {name: row[column].strip() for name, column in zip(answers, columns)}
        if not any(given.values()):
            raise BadRecord("ranks: no answer was given", brief(given), NOTHING)
        if set(map(str.lower, given.values())) - {""} <= BOXES.keys():
            return _ticked(given, there)
        sign = -1 if highest_best else 1
        return {name: sign * score(text, "ranks") for name, text in given.items() if text}  # type: ignore[operator]

    return TableJudge(columns, ranks)


BOXES = {"true": True, "yes": True, "x": True, "on": True, "false": False, "no": False, "off": False}


def _ticked(given: dict[str, str], there: list[str]) -> dict[str, float]:
    """Rank 1 for answers whose box is ticked, 2 for the others. If any box is ticked, an empty cell is unticked."""
    ticked = {name: BOXES.get(text.lower(), False) for name, text in given.items() if text or name in there}
    if not any(ticked.values()):
        raise BadRecord("ranks: no answer is ticked", brief(given), NOTHING)
    return {name: 1 if yes else 2 for name, yes in ticked.items()}


def _by_choice(columns: list[str], values: dict[str, str], answers: list[str]) -> TableJudge:
    """A column holds which answer is the best, and a second one perhaps which is the worst.

    Args:
        values: What a value means: an answer's column, or a tie.
    """

    def named(row: Mapping[str, str], column: str, option: str) -> str:
        """The answer, or `TIE`, that a column names. Bare numbers need a meaning: some tools count from 0."""
        value = row[column].strip()
        if not value:
            raise BadRecord(f"{option}: no answer was given", remedy=NOTHING)
        found = values.get(value.lower())
        if found is None and not value.isdecimal():
            found = named_answer(value, {name: row[name] for name in answers}, values)
        if found is None:
            known = f"{brief(value)}; known are {', '.join(map(brief, values))}"
            remedy = "Say what it means: --option choice_values=VALUE=ANSWER,..."
            raise BadRecord(f"{option}: an unknown value", known, remedy)
        return found

    def ranks(row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        best, *worst = (named(row, column, option) for column, option in zip(columns, ("choice", "worst")))
        for last in worst:
            if (best == TIE) != (last == TIE) or (best == last != TIE):
                raise BadRecord("choice and worst: contradict each other", brief(f"best {best}, worst {last}"))
        among = there if best == TIE else [best, *worst, *there]
        return {name: 1 if best in (name, TIE) else 3 if name in worst else 2 for name in among}

    return TableJudge(columns, ranks)


def _by_order(column: str, known: dict[str, str]) -> TableJudge:
    """A column lists the answers, best first."""

    def ranks(row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        text = row[column].strip().strip("[]()")
        if not text:
            raise BadRecord("ranking: no answer was given", remedy=NOTHING)
        if means_tie(text):
            return dict.fromkeys(there, 1)
        found: dict[str, float] = {}
        for index, group in enumerate(re.split("[>,;]", text)):
            for part in group.split("="):
                name = known.get(part.strip().strip("\"'").lower())
                if name is None:
                    raise BadRecord("ranking: names an unknown answer", f"{brief(part)} in {brief(text)}")
                if name in found:
                    raise BadRecord("ranking: names an answer twice", brief(text))
                found[name] = index
        return found

    return TableJudge([column], ranks)


def judge_of(
    answers: list[str],
    ranks: list[str],
    highest_best: bool,
    choice: str | None,
    choice_values: ChoiceValues | None,
    worst: str | None,
    ranking: str | None,
    best_first: bool,
) -> TableJudge | None:
    """What says who won, by the options of the import; None where no option does.

    Raises:
        UserError: The options contradict each other, or name answers that are not there.
    """
    options = (("ranks", ranks), ("choice", choice), ("ranking", ranking), ("best_first", best_first))
    given = [name for name, value in options if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: only one of them can say who won")
    if given and not answers:
        raise UserError(f"{given[0]}: of which answers?", remedy="Name their columns: --option answers=COLUMN,COLUMN")
    for option in [
        name for name, value in (("choice_values", choice_values), ("worst", worst)) if value and not choice
    ]:
        raise UserError(f"{option}: of which column is the best?", remedy="Name it: --option choice=COLUMN")
    by_letter = dict(zip(string.ascii_lowercase, answers)) | {name.lower(): name for name in answers}
    if ranks:
        if len(ranks) != len(answers):
            raise UserError(
                f"ranks: {len(ranks)} columns for {len(answers)} answers", remedy="Name one for each answer."
            )
        return _by_ranks(answers, ranks, highest_best)
    if choice:
        meanings = choice_meanings(choice_values, answers) if choice_values else {**by_letter, TIE: TIE}
        return _by_choice([choice, worst] if worst else [choice], meanings, answers)
    if best_first:
        return TableJudge((), lambda row, there: {name: index for index, name in enumerate(answers) if name in there})
    by_number = {str(index + 1): name for index, name in enumerate(answers)}
    return _by_order(ranking, by_number | by_letter) if ranking else None
