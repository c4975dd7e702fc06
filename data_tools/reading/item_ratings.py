"""Which item of a list in Label Studio a rating belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data_tools.reading.judgements import score
from rlhf.data.schema import BadRecord, brief

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
