"""Who won in a row of a table: by ranks, boxes, a choice, best and worst, a listed order, or the order of columns."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_tools.reading.annotation_exports import brief
from data_tools.reading.judgements import TIE, ChoiceValues, choice_meanings, means_tie, named_answer, score
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord


class Judge(Protocol):
    """What says who won in a row of a table."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it reads, other than the answers."""

    def ranks(self, row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        """A number for each answer that is ranked, the lowest = the best; `there` are those that are not empty."""


@dataclass(frozen=True)
class _Ranks:
    """A column of each answer holds its number."""

    answers: list[str]
    columns: list[str]
    highest_best: bool

    def ranks(self, row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        given = {name: row[column].strip() for name, column in zip(self.answers, self.columns)}
        if not any(given.values()):
            raise BadRecord("ranks: no answer was given", brief(given), "Nothing was preferred; leave it out.")
        if set(map(str.lower, given.values())) - {""} <= BOXES.keys():
            return _ticked(given, there)
        sign = -1 if self.highest_best else 1
        return {name: sign * score(text, "ranks") for name, text in given.items() if text}


BOXES = {"true": True, "yes": True, "x": True, "on": True, "false": False, "no": False, "off": False}


def _ticked(given: dict[str, str], there: list[str]) -> dict[str, float]:
    """Rank 1 for answers whose box is ticked, 2 for the others. If any box is ticked, an empty cell is unticked."""
    ticked = {name: BOXES.get(text.lower(), False) for name, text in given.items() if text or name in there}
    if not any(ticked.values()):
        raise BadRecord("ranks: no answer is ticked", brief(given), "Nothing was preferred; leave it out.")
    return {name: 1 if yes else 2 for name, yes in ticked.items()}


@dataclass(frozen=True)
class _Choice:
    """A column holds which answer is the best."""

    columns: list[str]
    values: dict[str, str]
    """What a value of the column means: an answer's column, or a tie."""
    answers: list[str]

    def ranks(self, row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        best = self._named(row, self.columns[0], "choice")
        if len(self.columns) == 1:
            return {name: 1 if best in (name, TIE) else 2 for name in ([] if best == TIE else [best]) + there}
        worst = self._named(row, self.columns[1], "worst")
        if (best == TIE) != (worst == TIE) or (best == worst != TIE):
            raise BadRecord("choice and worst: contradict each other", brief(f"best {best}, worst {worst}"))
        named = [] if best == TIE else [best, worst]
        return {name: 1 if best in (name, TIE) else 3 if name == worst else 2 for name in named + there}

    def _named(self, row: Mapping[str, str], column: str, option: str) -> str:
        """The answer, or `TIE`, that a column names. Bare numbers need a meaning: some tools count from 0."""
        value = row[column].strip()
        if not value:
            raise BadRecord(f"{option}: no answer was given", remedy="Nothing was preferred; leave it out.")
        best = self.values.get(value.lower())
        if best is None and not value.isdecimal():
            best = named_answer(value, {name: row[name] for name in self.answers}, self.values)
        if best is None:
            known = f"{brief(value)}; known are {', '.join(map(brief, self.values))}"
            raise BadRecord(
                f"{option}: an unknown value", known, "Say what it means: --option choice_values=VALUE=ANSWER,..."
            )
        return best


@dataclass(frozen=True)
class _Order:
    """A column lists the answers, best first."""

    columns: list[str]
    known: dict[str, str]

    def ranks(self, row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        text = row[self.columns[0]].strip().strip("[]()")
        if not text:
            raise BadRecord("ranking: no answer was given", remedy="Nothing was preferred; leave it out.")
        if means_tie(text):
            return dict.fromkeys(there, 1)
        groups = [re.split("=", group) for group in re.split("[>,;]", text)]
        ranks: dict[str, float] = {}
        for index, group in enumerate(groups):
            for part in group:
                name = self.known.get(part.strip().strip("\"'").lower())
                if name is None:
                    raise BadRecord("ranking: names an unknown answer", f"{brief(part)} in {brief(text)}")
                if name in ranks:
                    raise BadRecord("ranking: names an answer twice", brief(text))
                ranks[name] = index
        return ranks


@dataclass(frozen=True)
class _BestFirst:
    """The answers are named best first."""

    answers: list[str]
    columns: tuple[str, ...] = ()

    def ranks(self, row: Mapping[str, str], there: list[str]) -> dict[str, float]:
        return {name: index for index, name in enumerate(self.answers) if name in there}


def judge_of(
    answers: list[str],
    ranks: list[str],
    highest_best: bool,
    choice: str | None,
    choice_values: ChoiceValues | None,
    worst: str | None,
    ranking: str | None,
    best_first: bool,
) -> Judge | None:
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
        return _Ranks(answers, ranks, highest_best)
    if choice:
        meanings = choice_meanings(choice_values, answers) if choice_values else {**by_letter, TIE: TIE}
        return _Choice([choice, worst] if worst else [choice], meanings, answers)
    if best_first:
        return _BestFirst(answers)
    by_number = {str(index + 1): name for index, name in enumerate(answers)}
    return _Order([ranking], by_number | by_letter) if ranking else None
