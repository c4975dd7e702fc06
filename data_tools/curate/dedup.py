"""Dedup: one record of each group of duplicates, and no prompt of an evaluation set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.io.derive import Derivation, show_counts
from data_tools.io.rejects import by_count
from data_tools.statistics.near import near_groups, near_matches, prompt_text
from rlhf.core import console
from rlhf.core.errors import UserError, nearest
from rlhf.data.schema import Ranking, Record, content_hash
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new

BY = ("record", "prompt", "answers")
KEEP = ("first", "best")
DROPPED_FILE = "dropped.jsonl"
SHOWN_CHARS = 200


def _key(record: Record, by: str) -> str:
    if by == "record":
        return record.id
    return record.prompt_id if by == "prompt" else content_hash(record.prompt_id, sorted(record.answers))


def _text(record: Record, by: str) -> str:
    parts = [prompt_text(record)]
    return "\n".join(parts if by == "prompt" else [*parts, *sorted(record.answers)])


def _worth(record: Record) -> tuple[float, ...]:
    """Higher is better: the weight, then the pairs with different ranks."""
    return (record.weight, record.informative_pairs) if isinstance(record, Ranking) else ()


class _Seen(NamedTuple):
    """What is kept of a record."""

    key: str
    id: str
    prompt: str
    worth: tuple[float, ...]


def _prompt_texts(dataset: Dataset) -> Iterator[tuple[str, str]]:
    for record in dataset.records(on_reject=lambda _: None):
        yield record.prompt_id, prompt_text(record)


def _texts_of_others(others: Sequence[Dataset]) -> Iterator[tuple[str, str]]:
    for dataset in others:
        for record in dataset.records():
            yield record.prompt_id, prompt_text(record)
        if dataset.rejects:
            console.warn(f"{dataset.path}: {len(dataset.rejects):,} bad rows in it were not compared")


def dedup_dataset(
    path: str | Path,
    out: str | Path,
    *,
    by: str = "record",
    near: float | None = None,
    keep: str = "first",
    against: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one record of those that are the same; the others are listed in the new dataset's `dropped.jsonl`.

    Args:
        by: What makes two records the same: `record` (all that its id is made of; rankings of one prompt by two
            annotators differ), `prompt`, or `answers` (prompt and answers, in any order).
        near: With `prompt` and `answers`, and for `against`: texts with this Jaccard similarity are the same too, as
            `data_tools.statistics.near` finds them; what is near to one that is near is the same as well.
        keep: Which of them stays: the `first`, or the `best`, for rankings: the one of the highest weight, then the
            one with the most untied pairs, then the first.
        against: Evaluation sets, of any kind of record: a record whose prompt is in one of them is left out.
        overwrite: Replace a dataset of that name.

    Returns:
        out, kind, by, read, written, dropped (by why: duplicate, near, against), rejected and reasons (bad rows of a
        JSONL dataset); `read` = `written` + the sum of `dropped` + `rejected`.

    Raises:
        UserError: Options that do not go together, no record left, or a dataset that cannot be read or written.
    """
    if by not in BY:
        raise UserError(f"--by: cannot compare by {by!r}", remedy=nearest(by, BY))
    if keep not in KEEP:
        raise UserError(f"--keep: {keep!r} is not a rule", remedy=nearest(keep, KEEP))
    if near is not None and by == "record" and not against:
        why = "Whole records are compared exactly: two annotators' rankings of one prompt are not the same."
        raise UserError("--near: compares prompts or answers", why, "Add --by prompt or --by answers.")
    parent, others = open_dataset(path), [open_dataset(other) for other in against]
    if keep == "best" and parent.kind != "ranking":
        raise UserError(f"--keep best: {parent.kind}s have no quality to compare", remedy="Use --keep first.")
    check_new(out, overwrite)
    fates = _fates(parent, others, by, near, keep)
    dropped: Counter[str] = Counter()
    with Derivation(out, parent.kind, [parent, *others], judgements=True, overwrite=overwrite) as made:
        with open(made.partial / DROPPED_FILE, "w", encoding="utf-8") as file:
            for position, record in enumerate(parent.records(on_reject=made.rejects)):
                if position not in fates:
                    made.write(record)
                    continue
                why, same = fates[position]
                dropped[why] += 1
                shown = prompt_text(record)[:SHOWN_CHARS]
                row = {"id": record.id, "why": why, "same_as": same, "prompt": shown}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not made.count:
            raise UserError(f"{path}: no record is left out of {dropped.total():,}", remedy="Is it the set itself?")
        made.origin["dropped"] = counts = by_count(dropped)
    return made.summary(dropped=counts) | {"by": by}


def _fates(
    parent: Dataset, others: Sequence[Dataset], by: str, near: float | None, keep: str
) -> dict[int, tuple[str, str]]:
    """Position of every record that is left out -> why, and the id of the record (or prompt) that it is the same as."""
    seen: list[_Seen] = []

    def texts() -> Iterator[tuple[str, str]]:
        for record in parent.records(on_reject=lambda _: None):  # counted when the records are written
            seen.append(_Seen(_key(record, by), record.id, record.prompt_id, _worth(record)))
            yield seen[-1].key, _text(record, by)

    groups = {key: key for key, _ in texts()} if near is None or by == "record" else near_groups(texts(), near)
    known = _matches(parent, others, near)
    kept: dict[str, int] = {}
    for position, one in enumerate(seen):
        if one.prompt not in known:
            best = kept.setdefault(groups[one.key], position)
            if keep == "best" and one.worth > seen[best].worth:
                kept[groups[one.key]] = position
    fates = {}
    for position, one in enumerate(seen):
        if one.prompt in known:
            fates[position] = ("against", known[one.prompt])
        elif (best := kept[groups[one.key]]) != position:
            fates[position] = ("duplicate" if seen[best].key == one.key else "near", seen[best].id)
    return fates


def _matches(parent: Dataset, others: Sequence[Dataset], near: float | None) -> dict[str, str]:
    """Id of every prompt that is in `others`, exactly or nearly -> the id of that prompt there."""
    if not others:
        return {}
    if near is not None:
        return near_matches(_prompt_texts(parent), _texts_of_others(others), near)
    return {prompt: prompt for prompt, _ in _texts_of_others(others)}


def show(summary: Mapping[str, Any]) -> None:
    """Print what `dedup_dataset` returns."""
    whys = {"duplicate": "the same as another", "near": "a near duplicate of another", "against": "in the other sets"}
    rows = [[whys[why], count] for why, count in summary["dropped"].items()]
    if rows:
        console.table("left out", ["why", "records"], rows)
    listed = f"; what was left out is listed in {Path(summary['out']) / DROPPED_FILE}" if rows else ""
    show_counts(summary, "left out", "dropped", listed)
