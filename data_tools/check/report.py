"""Check a dataset: every metric, with what it is made of, as one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.check.examples import Example, examples_of
from data_tools.check.metrics import METRICS
from data_tools.check.rules import Rule, grade, parse_rules
from data_tools.statistics import biases
from data_tools.statistics.facts import Facts, gathered
from data_tools.statistics.intervals import Estimate
from rlhf.core.table import TableRow
from rlhf.data.schema import SPLITS

GRADES = ("bad", "look", "good", "info", "none")
"""none: there is no figure, and `why` says so."""
MOST_ANNOTATORS = 1_000
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Measured:
    """A metric's figure for this dataset."""

    row: TableRow
    found: Estimate | None
    why: str
    """Why there is no figure."""
    grade: str
    """One of `GRADES`."""
    sampled: bool
    """It rests on a sample of the dataset."""

    @property
    def name(self) -> str:
        return self.row.name

    def as_dict(self) -> dict[str, Any]:
        found = self.found
        rounded = {
            name: None if found is None or getattr(found, name) is None else round(getattr(found, name), 6)
            for name in ("value", "low", "high", "n")
        }
        facts = {
            "note": found.note if found else "",
            "basis": self.row.traits["basis"],
            "sampled": self.sampled,
            "grade": self.grade,
        }
        return rounded | facts | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Report:
    """What a check found. Plain values only; the dataset is not needed any more."""

    path: Path
    kind: str
    fingerprint: str
    records: int
    prompts: int
    splits: dict[str, int]
    bad_rows: dict[str, int]
    """Rows of a JSONL file that could not be used, by reason."""
    measured: list[Measured]
    k: dict[int, int]
    """Number of answers -> records."""
    lengths: dict[str, dict[str, float]]
    """prompt, answer, best answer, worst answer -> mean, p5, p50, p95, max, in characters."""
    length_histograms: dict[str, tuple[list[float], list[float]]]
    """best answer, worst answer -> share in each bin, edges of the bins."""
    languages: dict[str, int]
    authors: list[biases.Share]
    wins_by_length: list[biases.Share]
    annotators: list[Any]
    """`data_tools.statistics.annotators.Annotator`, those in doubt first; the first `MOST_ANNOTATORS`."""
    examples: list[Example]
    rules: list[Rule]

    def __getitem__(self, name: str) -> Measured:
        return next(one for one in self.measured if one.name == name)

    def of_grade(self, grade: str) -> list[Measured]:
        return [one for one in self.measured if one.grade == grade]

    @property
    def fired(self) -> list[Rule]:
        """The rules that hold."""
        found = [(rule, self[rule.metric].found) for rule in self.rules]
        return [rule for rule, figure in found if figure is not None and rule.holds(figure.value)]

    @property
    def without_value(self) -> list[Rule]:
        """The rules whose metric has no figure here: they could not be tried."""
        return [rule for rule in self.rules if self[rule.metric].found is None]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        facts = {name: getattr(self, name) for name in ("kind", "fingerprint", "records", "prompts", "splits")}
        facts |= {name: getattr(self, name) for name in ("bad_rows", "k", "lengths", "languages")}
        return {
            "path": str(self.path), **facts,
            "metrics": {one.name: one.as_dict() for one in self.measured},
            "authors": [{"author": one.name, **asdict(one.share)} for one in self.authors],
            "wins_by_length": [{"times_longer": one.name, **asdict(one.share)} for one in self.wins_by_length],
            "annotators": [asdict(one) for one in self.annotators],
            "rules": [str(rule) for rule in self.rules],
            "fired": [str(rule) for rule in self.fired],
            "without_value": [str(rule) for rule in self.without_value],
            "ok": not self.fired,
        }  # fmt: skip


def check(path: str | Path, *, against: Sequence[Path] = (), near: bool = True, fail_on: Sequence[str] = ()) -> Report:
    """Measure a dataset.

    Numbers are taken of all records; statistics of texts, of large datasets, of a seeded sample (`data_tools.check.
    sample`). The same dataset and options give the same figures.

    Args:
        against: Datasets whose prompts must not be in this one.
        near: Look for near-duplicates, which takes most of the time.
        fail_on: Rules such as ``agreement<0.6``; `Report.fired` has those that hold.

    Raises:
        UserError: A dataset cannot be read, or a rule names no metric.
    """
    rules = parse_rules(fail_on, near, bool(against))
    with gathered(path, against, near) as facts:
        measured = [measure(row, facts) for row in METRICS]
        ranked = facts.dataset.kind == "ranking"
        columns = facts.columns
        sizes, times = np.unique(columns.sizes, return_counts=True)
        return Report(
            Path(path), facts.dataset.kind, facts.dataset.fingerprint, len(columns), len(np.unique(columns.prompt)),
            _splits(facts), dict(facts.bad_rows), measured,
            k=dict(zip(sizes.tolist(), times.tolist())) if len(columns.answer) else {},
            lengths=_lengths(facts), length_histograms=_histograms(facts) if ranked else {},
            languages=dict(facts.languages.prompts.most_common()), authors=facts.authors if ranked else [],
            wins_by_length=biases.wins_by_length(columns, facts.pairs) if ranked else [],
            annotators=facts.annotators[:MOST_ANNOTATORS] if ranked else [],
            examples=examples_of(facts), rules=rules,
        )  # fmt: skip


def measure(row: TableRow, facts: Facts) -> Measured:
    """One metric of a dataset."""
    kinds = row.traits["kinds"]
    if facts.dataset.kind not in kinds:
        why = f"a dataset of {facts.dataset.kind}s, not of {' or '.join(f'{kind}s' for kind in kinds)}"
        return Measured(row, None, why, "none", False)
    found = row.fn(facts)
    if isinstance(found, str):
        return Measured(row, None, found, "none", False)
    sampled = row.traits["sampled"] != "" and facts.is_sample(row.traits["sampled"])
    return Measured(row, found, "", grade(found, row.traits["look"], row.traits["bad"]), sampled)


def _splits(facts: Facts) -> dict[str, int]:
    numbers, times = np.unique(facts.columns.split, return_counts=True)
    return {SPLITS[i] if i >= 0 else "none": times for i, times in zip(numbers.tolist(), times.tolist())}


def _best_and_worst(facts: Facts) -> dict[str, np.ndarray]:
    """Characters of the winner and the loser of every ordered pair."""
    pairs = facts.pairs.where(facts.pairs.order != 0)
    one, other = facts.columns.chars[pairs.one], facts.columns.chars[pairs.other]
    return {
        "better answer": np.where(pairs.order > 0, one, other),
        "worse answer": np.where(pairs.order > 0, other, one),
    }


def _lengths(facts: Facts) -> dict[str, dict[str, float]]:
    groups = {"prompt": facts.columns.prompt_chars, "answer": facts.columns.chars}
    groups |= _best_and_worst(facts) if facts.dataset.kind == "ranking" else {}
    return {name: _spread(chars) for name, chars in groups.items() if len(chars)}


def _spread(chars: np.ndarray) -> dict[str, float]:
    quantiles = {f"p{share * 100:g}": float(value) for share, value in zip(QUANTILES, np.quantile(chars, QUANTILES))}
    return {"mean": round(float(chars.mean()), 1), **quantiles, "max": float(chars.max())}


def _histograms(facts: Facts) -> dict[str, tuple[list[float], list[float]]]:
    groups = _best_and_worst(facts)
    longest = max((int(chars.max()) for chars in groups.values() if len(chars)), default=1)
    edges = np.geomspace(1, longest + 1, 31)
    found = {name: np.histogram(chars, edges)[0] / max(1, len(chars)) for name, chars in groups.items()}
    return {name: (shares.tolist(), edges.tolist()) for name, shares in found.items()}
