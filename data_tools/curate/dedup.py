"""Dedup: one record of each group of duplicates, and no prompt of an evaluation set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.io.derive import Derivation
from data_tools.io.rejects import by_count, warn_rejected
from data_tools.statistics.near import near_groups, near_matches, prompt_text
from rlhf.core import console
from rlhf.core.errors import UserError, nearest
from rlhf.data.schema import Demonstration, Proposal, Ranking, Record, content_hash
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new

BY = ("record", "prompt", "answers")
KEEP = ("first", "best")
DROPPED_FILE = "dropped.jsonl"
SHOWN_CHARS = 200


def _answers(record: Record) -> list[str]:
    if isinstance(record, Demonstration):
        return [record.answer]
    return sorted(candidate.text for candidate in record.candidates) if isinstance(record, Proposal) else []


def _key(record: Record, by: str) -> str:
    if by == "record":
        return record.id
    return record.prompt_id if by == "prompt" else content_hash(record.prompt_id, _answers(record))


def _text(record: Record, by: str) -> str:
    parts = [prompt_text(record)]
    return "\n".join(parts if by == "prompt" else parts + _answers(record))


def _worth(record: Record) -> tuple[float, ...]:
    """Higher is better: the weight, then the pairs with different ranks."""
    return (record.weight, record.informative_pairs) if isinstance(record, Ranking) else ()


class _Pass:
    """Facts about the records from one pass, by position. Memory grows with the number of records, not with texts."""

    def __init__(self, parent: Dataset, by: str) -> None:
        self._parent, self._by = parent, by
        self.keys: list[str] = []
        self.ids: list[str] = []
        self.prompts: list[str] = []
        self.worths: list[tuple[float, ...]] = []

    def texts(self) -> Iterator[tuple[str, str]]:
        """(key, text) of every record; fills the lists on the way."""
        for record in self._parent.records(on_reject=lambda _: None):  # counted when the records are written
            self.keys.append(_key(record, self._by))
            self.ids.append(record.id)
            self.prompts.append(record.prompt_id)
            self.worths.append(_worth(record))
            yield self.keys[-1], _text(record, self._by)


def _prompt_texts(dataset: Dataset) -> Iterator[tuple[str, str]]:
    for record in dataset.records(on_reject=lambda _: None):
        yield record.prompt_id, prompt_text(record)


def _texts_of_others(others: Sequence[Dataset]) -> Iterator[tuple[str, str]]:
    for dataset in others:
        bad = Counter[str]()
        for record in dataset.records(on_reject=lambda row: bad.update([row.reason])):  # noqa: B023
            yield record.prompt_id, prompt_text(record)
        if bad:
            console.warn(f"{dataset.path}: {bad.total():,} bad rows in it were not compared")


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
        with open(made.folder / DROPPED_FILE, "w", encoding="utf-8") as file:
            for position, record in enumerate(parent.records(on_reject=made.rejects)):
                if position not in fates:
                    made.write(record)
                    continue
                why, same = fates[position]
                dropped[why] += 1
                shown = prompt_text(record)[:SHOWN_CHARS]
                row = {"id": record.id, "why": why, "same_as": same, "prompt": shown}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not made.written:
            raise UserError(f"{path}: no record is left out of {dropped.total():,}", remedy="Is it the set itself?")
        made.origin["dropped"] = counts = by_count(dropped)
    rejected, reasons = made.rejects.count, by_count(made.rejects.reasons)
    read = made.written + dropped.total() + rejected
    totals = {"read": read, "written": made.written, "dropped": counts, "rejected": rejected, "reasons": reasons}
    return {"out": str(out), "kind": parent.kind, "by": by, **totals}


def _fates(
    parent: Dataset, others: Sequence[Dataset], by: str, near: float | None, keep: str
) -> dict[int, tuple[str, str]]:
    """Position of every record that is left out -> why, and the id of the record (or prompt) that it is the same as."""
    seen = _Pass(parent, by)
    groups = (
        {key: key for key, _ in seen.texts()} if near is None or by == "record" else near_groups(seen.texts(), near)
    )
    known = _matches(parent, others, near)
    kept: dict[str, int] = {}
    for position, key in enumerate(seen.keys):
        if seen.prompts[position] in known:
            continue
        best = kept.setdefault(groups[key], position)
        if keep == "best" and seen.worths[position] > seen.worths[best]:
            kept[groups[key]] = position
    fates = {}
    for position, key in enumerate(seen.keys):
        prompt = seen.prompts[position]
        if prompt in known:
            fates[position] = ("against", known[prompt])
        elif kept[groups[key]] != position:
            best = kept[groups[key]]
            fates[position] = ("duplicate" if seen.keys[best] == key else "near", seen.ids[best])
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
    folder = Path(summary["out"])
    whys = {"duplicate": "the same as another", "near": "a near duplicate of another", "against": "in the other sets"}
    rows = [[whys[why], count] for why, count in summary["dropped"].items()]
    if rows:
        console.table("left out", ["why", "records"], rows)
    left_out = sum(summary["dropped"].values())
    line = f"read {summary['read']:,} = written {summary['written']:,} + left out {left_out:,}"
    line += f" + rejected {summary['rejected']:,}" if summary["rejected"] else ""
    listed = f"; what was left out is listed in {folder / DROPPED_FILE}" if left_out else ""
    console.say(f"{line} -> {summary['out']} ({summary['kind']}s){listed}")
    warn_rejected(summary)
