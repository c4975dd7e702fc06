"""Judgements in words and scores: which answer a value names, what means a tie, and whether scores agree with it;
which item of a list in Label Studio a rating belongs to."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

from data_tools.reading.annotation_exports import names, stem_and_ending
from rlhf.core.errors import UserError, nearest
from rlhf.data.schema import BadRecord, brief

TIE = "tie"
_TIES = {
    "tie", "ties", "tied", "draw", "equal", "equals", "equally", "same", "equally good",
    "equally bad", "both good", "both bad", "bothbad", "tie bothbad", "tie both bad", "both equal", "both equally good",
    "both equally bad", "both same", "no difference", "no preference", "neither better", "none better",
}  # fmt: skip
_FILLERS = {"a", "an", "the", "is", "are", "it", "s", "answers", "responses", "about", "of", "them"}
_BETTER = re.compile(r"\s+(is )?((much|slightly|clearly|significantly) )?(better|wins|won|best|preferred)$")
_PLACE = re.compile(r"(?:(?P<word>[a-z][a-z _.-]*?)(?:[\s_.-]+|(?=[0-9])))?(?P<place>[0-9]{1,3}|[a-z]|left|right)")
_ANSWER_WORDS = {
    "answer", "response", "model", "assistant", "option", "output", "completion", "candidate", "reply", "text",
    "summary", "generation", "choice", "side",
}  # fmt: skip

SCORE_WORDS = ("score", "rating")


ChoiceValues = str | dict[str | int, str]
"""An option: VALUE=ANSWER,VALUE=ANSWER as text, or a mapping. An answer is a column or field, or `tie`."""


# ---- values that name an answer --------------------------------------------------------------------------------------


def choice_meanings(option: ChoiceValues | None, answers: Sequence[str] = ()) -> dict[str, str]:
    """Value in lower case -> the answer that it means, or `TIE`, by the option `choice_values`.

    Args:
        answers: What may be meant; empty where only the rows say it.

    Raises:
        UserError: A part is not VALUE=ANSWER, or means none of the answers.
    """
    if isinstance(option, str):
        pairs = [part.rpartition("=") for part in names(option)]
        if wrong := [part for value, equals, part in pairs if not (equals and value)]:
            raise UserError(f"choice_values: {wrong[0]!r} is not VALUE=ANSWER")
        option = {value: meant for value, _, meant in pairs}
    values = {str(value).strip().lower(): meant.strip() for value, meant in (option or {}).items()}
    if answers and (wrong := [meant for meant in values.values() if meant not in (*answers, TIE)]):
        raise UserError(
            f"choice_values: {wrong[0]!r} is none of the answers", remedy=nearest(wrong[0], [*answers, TIE])
        )
    return values


def means_tie(value: Any) -> bool:
    """Whether a value says in usual words that no answer is better: tie, equal, both are bad, no preference."""
    if not isinstance(value, str) or len(value) > 100:
        return False
    words = re.findall(r"[a-z]+", value.lower())
    return bool(words) and " ".join(word for word in words if word not in _FILLERS) in _TIES


def named_answer(value: Any, answers: Mapping[str, Any], meanings: Mapping[str, str]) -> str | None:
    """The answer that a value names, `TIE`, or None where it names neither.

    Without a meaning of its own (`choice_values`) a value names an answer by the answer's name, the answer's whole
    text, its letter (A = the first), its number from 1, `left` or `right` (of two), also after a word and before
    "is better": ``Response 2``, ``model_a``, ``B is slightly better``. A tie is what `means_tie` knows.

    Args:
        value: Text or a number.
        answers: Name -> text, in the order shown.
        meanings: As `choice_meanings` gives them.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    said = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if said.lower() in meanings:
        return meanings[said.lower()]
    by_name = _BETTER.sub("", said.lower())
    exact = [name for name in answers if name.lower() in (said.lower(), by_name)] or [
        name for name, text in answers.items() if isinstance(text, str) and text.strip() == said
    ]
    if exact:
        return exact[0] if len(exact) == 1 else None
    if means_tie(said):
        return TIE
    match = _PLACE.fullmatch(by_name)
    if match is None or (match["word"] or "") not in {
        "",
        *_ANSWER_WORDS,
        *(stem_and_ending(name)[0] for name in answers),
    }:
        return None
    same = [name for name in answers if stem_and_ending(name)[1] == match["place"]]
    if len(same) == 1:
        return same[0]
    places = [list(string.ascii_lowercase[: len(answers)]), [str(index + 1) for index in range(len(answers))]]
    places += [["left", "right"]] if len(answers) == 2 else []
    at = [place.index(match["place"]) for place in places if match["place"] in place]
    return list(answers)[at[0]] if at else None


# ---- scores ----------------------------------------------------------------------------------------------------------


def score(value: Any, name: str) -> float | None:
    """A score from a number or its text; None where there is none (null, or an empty text).

    Raises:
        BadRecord: It is something else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < 1e300:
        raise BadRecord(f"{name}: not a number", brief(value))
    return number


def chosen_and_rejected(row: Mapping[str, Any], answers: Sequence[str] = ("chosen", "rejected")) -> list[float | None]:
    """The scores of `chosen` and `rejected`: of `score_chosen`, `chosen_score`, `chosen-rating` or the like.

    Args:
        answers: The names of the two answers.

    Raises:
        BadRecord: One of them is no number.
    """
    found = ([score(row[name], name) for name in _score_names(answer) if name in row] for answer in answers)
    return [next((value for value in values if value is not None), None) for values in found]


@lru_cache(100)
def _score_names(answer: str) -> tuple[str, ...]:
    parts = [(word, between) for word in SCORE_WORDS for between in "_-"]
    return tuple(name for word, by in parts for name in (f"{word}{by}{answer}", f"{answer}{by}{word}"))


def ranks_with_scores(ranks: Sequence[int], scores: Sequence[float | None], names: Sequence[str]) -> tuple[int, ...]:
    """The ranks of answers, checked against their scores (higher = better). Equal scores of two answers are a tie.

    Of more answers equal scores leave the ranks as they are. Answers without a score are not compared.

    Args:
        ranks: As the row says who won; 1 = best.
        scores: One for each answer; None where it has none.
        names: What the row calls the answers, for the message.

    Raises:
        BadRecord: An answer has a higher score than one that is ranked before it.
    """
    known = sorted((rank, value, name) for rank, value, name in zip(ranks, scores, names) if value is not None)
    for (before, least, better), (after, value, worse) in combinations(known, 2):
        if before < after and value > least:
            seen = f"{better} has {least:g}, {worse} has {value:g}"
            raise BadRecord("the scores contradict who won", seen, "Leave the row out, or correct it.")
    return (1, 1) if len(ranks) == len(known) == 2 and scores[0] == scores[1] else tuple(ranks)


# ---- which item of a list in Label Studio a rating belongs to --------------------------------------------------------

ITEM_INDEX = "item_index"
"""Key of a result of a control with `perItem`: the place of the item that it is about, from 0."""


def item_stars(items: Sequence[str], controls: Sequence[tuple[Any, dict[str, Any]]]) -> dict[str, float]:
    """Id -> rating, for the items that have one.

    A rating belongs to the item whose id, or whose place from 1, its control's name ends in; one with `item_index` to
    the item at that place. Ratings that end in neither, such as one of the whole task, are not read.

    Args:
        items: The ids, in the order shown.
        controls: Name and value of each control.

    Raises:
        BadRecord: An item has two ratings, a rating is of no item, or id and place give two different items.
    """
    stars, named = list[tuple[str, float]](), list[tuple[str, float]]()
    for name, value in controls:
        number = score(value.get("rating"), "rating")
        if number is None:
            continue
        if (at := _index(value, len(items))) is not None:
            stars.append((items[at], number))
        elif ending := _ending(name, items):
            named.append((ending, number))
    endings = [ending for ending, _ in named]
    by_place = {str(at): item for at, item in enumerate(items, 1)}
    all_owners = ({item: item for item in items}, by_place)
    readings = [[owners[ending] for ending in endings] for owners in all_owners if owners.keys() >= set(endings)]
    if not readings:
        raise BadRecord("a rating belongs to no item of the list", brief(endings), _REMEDY)
    if any(reading != readings[0] for reading in readings):
        seen = f"ratings {brief(endings)}, ids {brief(list(items))}"
        raise BadRecord("does the number of a rating mean an id or a place?", seen, _REMEDY)
    stars += list(zip(readings[0], [number for _, number in named]))
    if len(dict(stars)) < len(stars):
        raise BadRecord("an item has several ratings", brief(sorted(item for item, _ in stars)), _REMEDY)
    return dict(stars)


_REMEDY = "Name the controls that count, without the ratings: --option control=NAME"


def _index(value: dict[str, Any], count: int) -> int | None:
    at = value.get(ITEM_INDEX)
    if at is None:
        return None
    if not isinstance(at, int) or not 0 <= at < count:
        raise BadRecord("a rating belongs to no item of the list", f"{ITEM_INDEX} {brief(at)}", _REMEDY)
    return at


def _ending(name: Any, items: Sequence[str]) -> str:
    """The id that is the last word of a control's name, or the number it ends in; empty where it ends in neither."""
    parts = re.findall(r"[^\s_.-]+", name) if isinstance(name, str) else []
    if parts and parts[-1] in items:
        return parts[-1]
    number = re.search(r"[0-9]+$", parts[-1]) if parts else None
    return number[0] if number else ""
