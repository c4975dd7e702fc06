"""Check a dataset: the values of all metrics, and tables and examples, as one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.check.examples import FaultExample, examples_of
from data_tools.check.metrics import METRICS, Metric
from data_tools.check.rules import Rule, grade, parse_rules
from data_tools.statistics import biases
from data_tools.statistics.facts import Facts, gathered
from data_tools.statistics.intervals import Estimate
from rlhf.data.schema import SPLITS

GRADES = ("bad", "look", "good", "info", "none")
"""none: the metric has no value, and `why` gives the reason."""
MOST_ANNOTATORS = 1_000
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Measured:
    """A metric's value for this dataset."""

    metric: Metric
    found: Estimate | None
    why: str
    """Why there is no value."""
    grade: str
    """One of `GRADES`."""
    sampled: bool
    """It was computed from a sample of the dataset."""

    @property
    def name(self) -> str:
        return self.metric.name

    def as_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self.found, name, None) for name in ("value", "low", "high", "n")}
        return {
            **{name: None if number is None else round(number, 6) for name, number in numbers.items()},
            "note": self.found.note if self.found else "", "basis": self.metric.basis, "sampled": self.sampled,
            "grade": self.grade, **({"why": self.why} if self.why else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a check found, as plain values."""

    path: Path
    kind: str
    fingerprint: str
    records: int
    prompts: int
    splits: dict[str, int]
    bad_rows: dict[str, int]
    """Unusable rows of a JSONL file by reason."""
    measured: list[Measured]
    k: dict[int, int]
    """Number of answers -> records."""
    lengths: dict[str, dict[str, float]]
    """prompt, answer, better answer, worse answer -> mean, p5, p50, p95, max, in characters."""
    length_histograms: dict[str, tuple[list[float], list[float]]]
    """better answer, worse answer -> fraction in each bin, edges of the bins."""
    languages: dict[str, int]
    authors: list[biases.WinRate]
    wins_by_length: list[biases.WinRate]
    annotators: list[Any]
    """`data_tools.statistics.annotators.AnnotatorReport`, the doubtful ones first; at most `MOST_ANNOTATORS`."""
    examples: list[FaultExample]
    rules: list[Rule]

    def __getitem__(self, name: str) -> Measured:
        return next(one for one in self.measured if one.name == name)

    def of_grade(self, grade: str) -> list[Measured]:
        return [one for one in self.measured if one.grade == grade]

    @property
    def fired(self) -> list[Rule]:
        """The rules that hold."""
        values = [(rule, self[rule.metric].found) for rule in self.rules]
        return [rule for rule, found in values if found is not None and rule.holds(found.value)]

    @property
    def without_value(self) -> list[Rule]:
        """The rules whose metric has no value, so that they cannot be checked."""
        return [rule for rule in self.rules if self[rule.metric].found is None]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        facts = {name: getattr(self, name) for name in ("kind", "fingerprint", "records", "prompts", "splits")}
        facts |= {name: getattr(self, name) for name in ("bad_rows", "k", "lengths", "languages")}
        return {
            "path": str(self.path), **facts,
            "metrics": {one.name: one.as_dict() for one in self.measured},
            "authors": [{"author": one.name, **asdict(one.rate)} for one in self.authors],
            "wins_by_length": [{"times_longer": one.name, **asdict(one.rate)} for one in self.wins_by_length],
            "annotators": [asdict(one) for one in self.annotators],
            "rules": [str(rule) for rule in self.rules],
            "fired": [str(rule) for rule in self.fired],
            "without_value": [str(rule) for rule in self.without_value],
            "ok": not self.fired,
        }  # fmt: skip


def check(path: str | Path, *, against: Sequence[Path] = (), near: bool = True, fail_on: Sequence[str] = ()) -> Report:
    """Measure a dataset.

    Metrics of numbers use all records. Metrics of texts use a seeded sample of a large dataset (see
    `data_tools.statistics.sample`). The same dataset and options give the same values.

    Args:
        against: Datasets whose prompts must not be in this one.
        near: Search for near-duplicates, which takes most of the time.
        fail_on: Rules such as ``agreement<0.6``; `Report.fired` lists those that hold.

    Raises:
        UserError: A dataset cannot be read, or a rule is malformed or names an unknown metric.
    """
    rules = parse_rules(fail_on, near, bool(against))
    with gathered(path, against, near) as facts:
        measured = [measure(metric, facts) for metric in METRICS]
        ranked = facts.dataset.kind == "ranking"
        columns = facts.columns
        sizes, times = np.unique(columns.sizes, return_counts=True)
        return Report(
            Path(path), facts.dataset.kind, facts.dataset.fingerprint, len(columns), len(np.unique(columns.prompt)),
            _splits(facts), dict(facts.bad_rows), measured,
            k=dict(zip(sizes.tolist(), times.tolist())) if len(columns.answer) else {},
            lengths=_lengths(facts), length_histograms=_histograms(facts) if ranked else {},
            languages=dict(facts.languages.prompts.most_common()), authors=facts.authors if ranked else [],
            wins_by_length=biases.win_rates_by_length(facts.pairs) if ranked else [],
            annotators=facts.annotators[:MOST_ANNOTATORS] if ranked else [],
            examples=examples_of(facts), rules=rules,
        )  # fmt: skip


def measure(metric: Metric, facts: Facts) -> Measured:
    """Compute one metric of a dataset."""
    if facts.dataset.kind in metric.kinds:
        found = metric.measure(facts)
    else:
        found = f"only datasets of {' or '.join(f'{kind}s' for kind in metric.kinds)} have this metric"
    if isinstance(found, str):
        return Measured(metric, None, found, "none", False)
    sampled = metric.sampled != "" and facts.is_sample(metric.sampled)
    census = metric.part in ("duplicates", "texts") and not sampled
    return Measured(metric, found, "", grade(found, metric.look, metric.bad, census), sampled)


def _splits(facts: Facts) -> dict[str, int]:
    numbers, times = np.unique(facts.columns.split, return_counts=True)
    return {SPLITS[i] if i >= 0 else "none": times for i, times in zip(numbers.tolist(), times.tolist())}


def _better_and_worse(facts: Facts) -> dict[str, np.ndarray]:
    """Characters of the better and the worse answer of every ordered pair."""
    pairs = facts.pairs.where(facts.pairs.order != 0)
    one, other = pairs.both(facts.columns.chars)
    return {
        "better answer": np.where(pairs.order > 0, one, other),
        "worse answer": np.where(pairs.order > 0, other, one),
    }


def _lengths(facts: Facts) -> dict[str, dict[str, float]]:
    groups = {"prompt": facts.columns.prompt_chars, "answer": facts.columns.chars}
    groups |= _better_and_worse(facts) if facts.dataset.kind == "ranking" else {}
    return {name: _spread(chars) for name, chars in groups.items() if len(chars)}


def _spread(chars: np.ndarray) -> dict[str, float]:
    quantiles = {f"p{q * 100:g}": float(value) for q, value in zip(QUANTILES, np.quantile(chars, QUANTILES))}
    return {"mean": round(float(chars.mean()), 1), **quantiles, "max": float(chars.max())}


def _histograms(facts: Facts) -> dict[str, tuple[list[float], list[float]]]:
    groups = _better_and_worse(facts)
    longest = max((int(chars.max()) for chars in groups.values() if len(chars)), default=1)
    edges = np.geomspace(1, longest + 1, 31)
    found = {name: np.histogram(chars, edges)[0] / max(1, len(chars)) for name, chars in groups.items()}
    return {name: (fractions.tolist(), edges.tolist()) for name, fractions in found.items()}
