"""A labelled task: records whose answers are known, and how a model's answers to them are measured.

The records are demonstrations of our schema, as `rlhf data tasks` or an import of demonstrations makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.core.console import warn
from rlhf.core.errors import UserError, nearest
from rlhf.core.table import Pick
from rlhf.data.schema import Demonstration
from rlhf.data.selection import chosen_records
from rlhf.data.store import Dataset, open_dataset
from rlhf.tasks.answers import AnswerPattern, Normalise, normalised
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.metrics import METRICS, MetricValue, Outcomes, measure, needs

MOST_LABELS = 100
"""More different answers than this are not taken for labels, unless they are listed."""


@dataclass(frozen=True)
class AnswerRules:
    """How the answer is read from a text, and when two answers are the same."""

    pattern: AnswerPattern | None = None
    labels: tuple[str, ...] = ()
    """Empty if the task is not a classification."""
    normalise: Normalise = "text"
    in_data: bool = True
    """Whether the pattern applies to the answers of the data; else they are right answers as a whole."""

    def answer(self, text: str) -> str | None:
        """The answer in a model's text: of a classification the label, or the text itself if it is no label."""
        found = (text.strip() or None) if self.pattern is None else self.pattern(text)
        return found and (self.label(found) or found)

    def label(self, answer: str) -> str | None:
        """The label that an answer names; None if it is no label."""
        return {normalised(label): label for label in self.labels}.get(normalised(answer))

    def same(self, one: str, other: str) -> bool:
        """Whether two answers are the same."""
        return normalised(one, self.normalise) == normalised(other, self.normalise)

    def reference(self, text: str) -> str | None:
        """The right answer in a record's answer; None if it holds none, or none of the labels."""
        whole = self.pattern is None or not self.in_data
        found = text.strip() if whole else self.pattern(text)  # type: ignore[misc]
        return found if found is None or not self.labels else self.label(found)


@dataclass(frozen=True)
class Task:
    """A task whose data has been read and checked."""

    data: Dataset
    records: list[Demonstration]
    """The records that are measured."""
    references: list[str]
    """The right answer of each record."""
    rules: AnswerRules
    metrics: tuple[Pick, ...]
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> number of records that cannot be measured."""

    def measure(self, outcomes: Outcomes, seed: int = 0) -> list[MetricValue]:
        """All metrics that the outcomes allow: those of log-probs need `logprobs`, the others `predictions`."""
        return [
            measure(metric, outcomes, seed) for metric in self.metrics
            if getattr(outcomes, "predictions" if needs(metric) == "labels" else needs(metric))
        ]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a result says about the task."""
        pattern = self.rules.pattern
        return {
            "dataset": str(self.data.path), "fingerprint": self.data.fingerprint, "records": len(self.records),
            "rejected": self.rejected, "labels": list(self.rules.labels),
            "pattern": pattern and pattern.pattern, "take": pattern and pattern.take,
            "pattern_in_data": self.rules.in_data,
            "metrics": [{"name": metric.name, **metric.options} for metric in self.metrics],
        }  # fmt: skip


def load_task(config: TaskConfig) -> Task:
    """Read and check the data of a task.

    A record whose answer the pattern does not match, or is none of the labels, is rejected and counted.

    Raises:
        UserError: The data are no demonstrations, a label occurs nowhere in them, or no record can be measured.
    """
    pattern = config.pattern_or_none()
    data = open_dataset(config.dataset)
    if data.kind != "demonstration":
        raise UserError(
            f"{data.path}: contains {data.kind}s; a task needs demonstrations, whose answers are the right ones",
            remedy="Make them with `rlhf data tasks` or an import of demonstrations.",
        )
    metrics = tuple(config.metrics or map(METRICS.pick, ("accuracy", "f1") if config.labels else ("exact_match",)))
    in_data = pattern is None or any(pattern(record.answer) for record in data.records())
    normalise: Normalise = next((m.options["normalise"] for m in metrics if "normalise" in m.options), "text")
    rules = AnswerRules(pattern, (), normalise, in_data)
    if config.labels or any(needs(metric) == "labels" for metric in metrics):
        rules = replace(rules, labels=_labels(data, config.labels, rules))
    records, references, rejected = [], [], Counter[str]()
    first: dict[str, str] = {}
    for record in chosen_records(data, config.split, config.limit):
        reference = rules.reference(record.answer)
        if reference is None:
            reason = "no answer in it by the pattern" + (", or none of the labels" if rules.labels else "")
            reason = reason if pattern else "its answer is none of the labels"
            rejected[reason] += 1
            first.setdefault(reason, f"prompt {record.prompt_id}, answer {record.answer[:60]!r}")
        else:
            records.append(record)
            references.append(reference)
    for reason, count in rejected.items():
        warn(f"{data.path}: {count:,} records rejected: {reason}; the first is {first[reason]}")
    if not records:
        raise UserError(
            f"{data.path}: no record can be measured",
            "; ".join(f"{count:,} rejected: {reason}" for reason, count in rejected.items()),
            "Correct the pattern or the labels.",
        )
    return Task(data, records, references, rules, metrics, dict(rejected))


def _labels(data: Dataset, listed: Sequence[str], rules: AnswerRules) -> tuple[str, ...]:
    """The labels, checked against all answers of the data.

    Raises:
        UserError: Two are the same, one occurs in no answer, or there are too many or too few to be labels.
    """
    answers = filter(None, (rules.reference(record.answer) for record in data.records()))
    found = {normalised(answer): answer for answer in answers}
    if not listed:
        if not 2 <= len(found) <= MOST_LABELS:
            raise UserError(
                f"{data.path}: has {len(found):,} different answers, which are no labels",
                "The metrics accuracy and f1 are for a few labels that many records share.",
                "Use exact_match, or list the labels.",
            )
        return tuple(sorted(found.values()))
    names = [normalised(label) for label in listed]
    for label, name in zip(listed, names):
        if names.count(name) > 1:
            raise UserError(f"labels: {label!r} is there twice", remedy="Case and punctuation around it do not count.")
        if name not in found:
            known = nearest(name, found) if len(found) <= MOST_LABELS else f"It has {len(found):,} different answers."
            raise UserError(f"labels: no record of {data.path} has the answer {label!r}", remedy=known)
    if len(listed) < 2:
        raise UserError(f"labels: {listed[0]!r} alone is nothing to choose from")
    return tuple(listed)
