"""Stats: what one or several datasets hold, counted in one pass over each."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.core import console
from rlhf.data.schema import Demonstration, Proposal, Ranking, Record
from rlhf.data.store import open_dataset

SHOWN = 20


class Leaks:
    """Finds prompts that are in more than one split."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self.prompts: set[str] = set()

    def add(self, record: Record) -> None:
        if record.split and self._first.setdefault(record.prompt_id, record.split) != record.split:
            self.prompts.add(record.prompt_id)


class _Count:
    """Counters that a pass fills. Memory grows with records, prompts and answers, not with text."""

    def __init__(self) -> None:
        self.by: dict[str, Counter[str]] = {
            name: Counter() for name in ("kind", "split", "source", "group", "annotator", "author_kind")
        }
        self.k: Counter[int] = Counter()
        self.pairs = self.tied_pairs = self.with_tie = 0
        self.numbers = {"prompt": array("q"), "answer": array("q"), "seconds": array("d"), "weights": array("d")}
        self.records: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self.leaks = Leaks()

    def add(self, record: Record) -> None:
        by, numbers = self.by, self.numbers
        by["kind"][record.kind] += 1
        by["split"][record.split or "none"] += 1
        by["source"][record.source] += 1
        by["group"][record.group or "none"] += 1
        self.records[f"{record.kind} {record.id}"] += 1
        self.prompts[record.prompt_id] += 1
        self.leaks.add(record)
        numbers["prompt"].append(sum(len(message.content) for message in record.messages))
        numbers["answer"].extend(map(len, record.answers))
        if isinstance(record, Demonstration):
            by["annotator"][record.author] += 1
        elif isinstance(record, Proposal):
            size = len(record.candidates)
            self.k[size] += 1
            by["author_kind"].update(candidate.author_kind for candidate in record.candidates)
        if isinstance(record, Ranking):
            pairs = size * (size - 1) // 2
            by["annotator"][record.annotator] += 1
            self.pairs += pairs
            self.tied_pairs += pairs - record.informative_pairs
            self.with_tie += record.informative_pairs < pairs
            numbers["weights"].append(record.weight)
            numbers["seconds"].extend([] if record.seconds is None else [record.seconds])


def stats(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Count what the datasets hold together. Leaks are found across all of them.

    Returns:
        A plain dictionary: `datasets` (path, kind, count, fingerprint, rejected), `records`, `prompts` (distinct),
        counts by `kind`, `split`, `source`, `group`, `annotator` (of demonstrations: who wrote them) and
        `author_kind` (of candidates), `k` (number of candidates -> rankings and proposals), `ties` (`pairs`,
        `tied_pairs`, `tied_share` of the pairs, `rankings_with_tie`), `lengths` in characters (`prompt`: all turns;
        `answer`: mean, p50, p95, max), `seconds` (of the rankings that have them) and `weights` (of rankings) in the
        same way, `duplicates` (`records`: records beyond the first of the same content; `prompts`: beyond the first
        of the same prompt), and `leaks` (prompts in more than one split: count, and up to 20 ids).

    Raises:
        UserError: A dataset cannot be opened or read.
    """
    count = _Count()
    datasets = []
    for path in paths:
        dataset = open_dataset(path)
        before = count.records.total()
        for record in dataset.records():
            count.add(record)
        held = {"count": count.records.total() - before, "rejected": len(dataset.rejects)}
        datasets.append({"path": str(path), "kind": dataset.kind, **held, "fingerprint": dataset.fingerprint})
    leaks = sorted(count.leaks.prompts)
    spreads = {name: _spread(values) for name, values in count.numbers.items()}
    return {
        "datasets": datasets,
        "records": count.records.total(),
        "prompts": len(count.prompts),
        **{name: dict(counter.most_common()) for name, counter in count.by.items()},
        "k": dict(sorted(count.k.items())),
        "ties": {
            "pairs": count.pairs,
            "tied_pairs": count.tied_pairs,
            "tied_share": count.tied_pairs / count.pairs if count.pairs else None,
            "rankings_with_tie": count.with_tie,
        },
        "lengths": {name: spreads.pop(name) for name in ("prompt", "answer")},
        **spreads,
        "duplicates": {
            "records": count.records.total() - len(count.records),
            "prompts": count.prompts.total() - len(count.prompts),
        },
        "leaks": {"prompts": len(leaks), "examples": leaks[:SHOWN]},
    }


def _spread(values: array[float]) -> dict[str, float] | None:
    """Mean, nearest-rank median and 95th percentile, and maximum."""
    if not values:
        return None
    p50, p95, most = np.quantile(values, [0.5, 0.95, 1], method="inverted_cdf").tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p95": p95, "max": most}


def show(found: dict[str, Any]) -> None:
    """Print what `stats` returns."""
    rows = [[d["path"], d["kind"], d["count"], d["rejected"], d["fingerprint"][:16]] for d in found["datasets"]]
    console.table("datasets", ["path", "kind", "records", "bad rows", "fingerprint"], rows)
    for name in ("split", "source", "group", "annotator", "author_kind"):
        counts = found[name]
        if set(counts) - {"", "none"}:
            shown = list(counts.items())[:SHOWN]
            title = f"by {name}" + (f" (the {SHOWN} most frequent of {len(counts):,})" if len(counts) > SHOWN else "")
            console.table(title, [name, "count"], shown)
    if found["k"]:
        console.table("candidates", ["K", "records"], found["k"].items())
    ties = found["ties"]
    if ties["pairs"]:
        console.say(
            f"ties: {ties['tied_pairs']:,} of {ties['pairs']:,} pairs ({ties['tied_share']:.1%}), "
            f"in {ties['rankings_with_tie']:,} rankings"
        )
    spreads = [[name, *spread.values()] for name, spread in found["lengths"].items() if spread]
    console.table("length in characters", ["", "mean", "p50", "p95", "max"], spreads)
    for name, what in (("seconds", "seconds a ranking took"), ("weights", "weights of the rankings")):
        if found[name] and found[name]["max"] != found[name]["mean"]:
            console.table(what, ["mean", "p50", "p95", "max"], [list(found[name].values())])
    again = found["duplicates"]
    console.say(
        f"{found['records']:,} records over {found['prompts']:,} prompts; {again['prompts']:,} repeat a prompt, "
        f"{again['records']:,} repeat a whole record"
    )
    leaks = found["leaks"]
    if leaks["prompts"]:
        console.warn(f"{leaks['prompts']:,} prompts are in more than one split, such as {leaks['examples'][0]}")
    else:
        console.say("no prompt is in more than one split")
