"""Stats: what one or several datasets hold, counted in one pass over each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.core import console
from rlhf.data.schema import SPLITS, Demonstration, Proposal, Ranking, Record
from rlhf.data.store import open_dataset

SHOWN = 20


class _Count:
    """Counters that a pass fills. Memory grows with distinct prompts, records and lengths, not with text."""

    def __init__(self) -> None:
        self.by: dict[str, Counter[str]] = {
            name: Counter() for name in ("kind", "split", "source", "group", "annotator", "author_kind")
        }
        self.k: Counter[int] = Counter()
        self.pairs = self.tied_pairs = self.with_tie = 0
        self.lengths: dict[str, Counter[float]] = {"prompt": Counter(), "answer": Counter()}
        self.seconds: Counter[float] = Counter()
        self.weights: Counter[float] = Counter()
        self.records: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self.prompt_splits: dict[str, int] = {}  # prompt id -> one bit a split

    def add(self, record: Record) -> None:
        self.by["kind"][record.kind] += 1
        self.by["split"][record.split or "none"] += 1
        self.by["source"][record.source] += 1
        self.by["group"][record.group or "none"] += 1
        self.records[f"{record.kind} {record.id}"] += 1
        self.prompts[record.prompt_id] += 1
        if record.split is not None:
            bit = 1 << SPLITS.index(record.split)
            self.prompt_splits[record.prompt_id] = self.prompt_splits.get(record.prompt_id, 0) | bit
        self.lengths["prompt"][sum(len(message.content) for message in record.messages)] += 1
        if isinstance(record, Demonstration):
            self.lengths["answer"][len(record.answer)] += 1
            self.by["annotator"][record.author] += 1
        elif isinstance(record, Proposal):
            self.k[len(record.candidates)] += 1
            for candidate in record.candidates:
                self.lengths["answer"][len(candidate.text)] += 1
                self.by["author_kind"][candidate.author_kind] += 1
        if isinstance(record, Ranking):
            self._add_ranking(record)

    def _add_ranking(self, record: Ranking) -> None:
        size = len(record.candidates)
        pairs = size * (size - 1) // 2
        self.by["annotator"][record.annotator] += 1
        self.pairs += pairs
        self.tied_pairs += pairs - record.informative_pairs
        self.with_tie += record.informative_pairs < pairs
        self.weights[record.weight] += 1
        if record.seconds is not None:
            self.seconds[record.seconds] += 1


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
        before, rejected = count.records.total(), Counter[str]()
        for record in dataset.records(on_reject=lambda row: rejected.update([row.reason])):  # noqa: B023
            count.add(record)
        held = {"count": count.records.total() - before, "rejected": rejected.total()}
        datasets.append({"path": str(path), "kind": dataset.kind, **held, "fingerprint": dataset.fingerprint})
    leaks = sorted(prompt for prompt, bits in count.prompt_splits.items() if bits.bit_count() > 1)
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
        "lengths": {name: _spread(lengths) for name, lengths in count.lengths.items()},
        "seconds": _spread(count.seconds),
        "weights": _spread(count.weights),
        "duplicates": {
            "records": count.records.total() - len(count.records),
            "prompts": count.prompts.total() - len(count.prompts),
        },
        "leaks": {"prompts": len(leaks), "examples": leaks[:SHOWN]},
    }


def _spread(lengths: Counter[float]) -> dict[str, float] | None:
    """Mean, nearest-rank median and 95th percentile, and maximum of a histogram."""
    total = lengths.total()
    if not total:
        return None
    ordered = sorted(lengths.items())

    def quantile(share: float) -> float:
        seen = 0
        for length, count in ordered:
            seen += count
            if seen >= share * total:
                return length
        return ordered[-1][0]

    mean = sum(length * count for length, count in ordered) / total
    return {"mean": mean, "p50": quantile(0.5), "p95": quantile(0.95), "max": ordered[-1][0]}


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
