"""Metrics of a labelled task. One table, METRICS.

Each row turns outcomes into numbers per record, and a statistic of their sums over records. So the interval of every
metric comes from the same bootstrap over records (Efron 1979), or from Wilson's formula where a record is right or
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf.core.errors import UserError
from rlhf.core.intervals import percentile_interval, resampled_sums, wilson
from rlhf.core.lazy import lazy, np
from rlhf.core.table import Pick, Table
from rlhf.tasks.answers import Normalise, normalised

if TYPE_CHECKING:
    from rlhf.tasks import text_overlap
else:
    text_overlap = lazy("rlhf.tasks.text_overlap")

METRICS = Table("metric")
FEWEST_RECORDS = 10
"""Of fewer records a bootstrap's interval is too narrow, so there is none."""
REPLICATES, MOST_DRAWS = 1000, 50_000_000


@dataclass(frozen=True)
class Outcomes:
    """What a model answered to the records of a task, in the order of the records."""

    references: Sequence[str]
    """The right answers."""
    predictions: Sequence[str | None] = ()
    """The model's answers; None where its text held none, which counts as wrong."""
    labels: Sequence[str] = ()
    """The labels of a classification task; empty for other tasks."""
    logprobs: Sequence[float] = ()
    """Log-prob of the right answer after the prompt, in nats, summed over its tokens."""
    tokens: Sequence[int] = ()
    """Number of tokens of the right answer."""
    scores: Sequence[float] = ()
    """Score of each answer by a reward."""
    rival_scores: Sequence[float] = ()
    """Score of the answer that it is compared with."""

    def __len__(self) -> int:
        return len(self.references)


@dataclass(frozen=True)
class MetricColumns:
    """A metric as numbers per record and a statistic of their sums."""

    values: np.ndarray
    """float64 [records, columns]."""
    statistic: Callable[[np.ndarray], np.ndarray]
    """Sums of columns [any, columns] -> values [any]."""
    is_fraction: bool = False
    """Whether each record is right (1) or wrong (0), so that Wilson's interval applies."""


@dataclass(frozen=True)
class MetricValue:
    """A metric's value with its 95 % interval (None for fewer than ten records, where it needs a bootstrap)."""

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    """Number of records."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(metric: Pick, outcomes: Outcomes, seed: int = 0) -> MetricValue:
    """A metric of outcomes, with its interval.

    Args:
        metric: A pick of METRICS.
        outcomes: At least one record.
        seed: Seed of the bootstrap.

    Raises:
        UserError: There are no records, or they lack what the metric needs.
    """
    if not len(outcomes):
        raise UserError(f"metric {metric.name}: there is no record to measure")
    size = len(getattr(outcomes, needs(metric)))
    if size != len(outcomes) if needs(metric) != "labels" else not size:
        raise UserError(f"metric {metric.name}: {NEEDS[needs(metric)]}")
    return measure_columns(metric.name, metric(outcomes), seed)


def measure_columns(name: str, columns: MetricColumns, seed: int = 0) -> MetricValue:
    """A metric called `name` from its numbers per record, with its interval; `seed` is that of the bootstrap."""
    n = len(columns.values)
    value = float(columns.statistic(columns.values.sum(0, keepdims=True))[0])
    low = high = None
    if columns.is_fraction:
        bounds = wilson(value, n)
        low, high = min(bounds[0], value), max(bounds[1], value)
    elif n >= FEWEST_RECORDS:
        replicates = max(200, min(REPLICATES, MOST_DRAWS // n))
        low, high = percentile_interval(columns.statistic(resampled_sums(columns.values, replicates, seed)))
    return MetricValue(name, value, low, high, n)


NEEDS = {
    "predictions": "needs an answer of the model for each record",
    "labels": "needs the labels of the task",
    "logprobs": "needs the log-prob of each right answer",
    "scores": "needs the score of each answer by a reward",
    "rival_scores": "needs scores of two answers to each record",
}


def needs(metric: Pick) -> str:
    """What a metric is computed from: a field of `Outcomes`."""
    return str(metric.row.traits["needs"])


def limits(metric: Pick) -> tuple[float, float]:
    """The least and the largest value that a metric can have."""
    low, high = metric.row.traits.get("limits", (-math.inf, math.inf))
    return float(low), float(high)


# ---- rows ----------------------------------------------------------------------------------------------------------


@METRICS.row("exact_match", needs="predictions", limits=(0, 1))
def exact_match(outcomes: Outcomes, *, normalise: Normalise = "text") -> MetricColumns:
    """Fraction of answers that equal the right one; see `rlhf.tasks.answers.normalised`."""
    return fraction_of([_same(p, r, normalise) for p, r in zip(outcomes.predictions, outcomes.references)])


@METRICS.row("accuracy", needs="labels", limits=(0, 1))
def accuracy(outcomes: Outcomes, *, normalise: Normalise = "text") -> MetricColumns:
    """Fraction of records whose right label was given; an answer that is no label is wrong."""
    gold, given = _label_numbers(outcomes, normalise)
    return fraction_of((gold == given).tolist())


@METRICS.row("f1", needs="labels", limits=(0, 1))
def f1(
    outcomes: Outcomes, *, normalise: Normalise = "text", average: Literal["macro", "micro", "weighted"] = "macro"
) -> MetricColumns:
    """F1 over labels: `macro` is their plain mean, as scikit-learn's `f1_score(..., labels=, zero_division=0)`."""
    gold, given = _label_numbers(outcomes, normalise)
    every = np.arange(len(outcomes.labels))
    is_gold, is_given = gold[:, None] == every, given[:, None] == every
    values = np.concatenate([is_gold & is_given, is_gold, is_given], 1).astype(float)

    def statistic(sums: np.ndarray) -> np.ndarray:
        hits, golds, givens = np.split(sums, 3, axis=1)
        if average == "micro":
            hits, golds, givens = (part.sum(1, keepdims=True) for part in (hits, golds, givens))
        each = 2 * hits / np.maximum(golds + givens, 1)  # F1 = 2 TP / (2 TP + FP + FN)
        if average == "weighted":
            return (each * golds).sum(1) / np.maximum(golds.sum(1), 1)
        return each.mean(1)

    return MetricColumns(values, statistic)


def _add_rouge(kind: str, about: str) -> None:
    def rouge(outcomes: Outcomes, *, stem: bool = False, words: Literal["ascii", "unicode"] = "ascii") -> MetricColumns:
        return mean_of(text_overlap.rouge(kind, outcomes.predictions, outcomes.references, stem, words))

    rouge.__doc__ = about
    METRICS.row(kind, needs="predictions", limits=(0, 1), package="rouge-score")(rouge)


_add_rouge(
    "rouge1",
    "ROUGE-1: F-measure of shared words (Lin 2004), from rouge-score; `words: unicode` for other than English.",
)
_add_rouge("rouge2", "ROUGE-2: F-measure of shared pairs of words, from rouge-score.")
_add_rouge("rougeL", "ROUGE-L: F-measure of the longest common subsequence of words, from rouge-score.")


@METRICS.row("bleu", needs="predictions", limits=(0, 100), package="sacrebleu")
def bleu(outcomes: Outcomes, *, tokenize: Literal["13a", "intl", "char", "none"] = "13a") -> MetricColumns:
    """BLEU of the whole corpus, 0 to 100, from sacrebleu."""
    values, statistic = text_overlap.bleu(outcomes.predictions, outcomes.references, tokenize)
    return MetricColumns(values, statistic)


@METRICS.row("log_likelihood", needs="logprobs", limits=(-math.inf, 0))
def log_likelihood(outcomes: Outcomes, *, per: Literal["answer", "token"] = "answer") -> MetricColumns:
    """Log-prob of the right answer in nats: the mean over answers, or over all of their tokens."""
    logprobs = np.array(outcomes.logprobs, float)
    sizes = np.ones(len(logprobs)) if per == "answer" else np.array(outcomes.tokens, float)
    return MetricColumns(np.stack([logprobs, sizes], 1), lambda sums: sums[:, 0] / sums[:, 1])


@METRICS.row("score", needs="scores")
def score(outcomes: Outcomes) -> MetricColumns:
    """Mean score of the answers by a reward; in `rlhf compare`, with `reward`."""
    return mean_of(np.array(outcomes.scores, float))


@METRICS.row("win_rate", needs="rival_scores", limits=(0, 1))
def win_rate(outcomes: Outcomes) -> MetricColumns:
    """How often an answer scores higher than the baseline's, a tie counting half; in `rlhf compare`, with `reward`."""
    gap = np.array(outcomes.scores, float) - np.array(outcomes.rival_scores, float)
    return mean_of(np.where(gap == 0, 0.5, gap > 0))


def _same(prediction: str | None, reference: str, how: Normalise) -> bool:
    return prediction is not None and normalised(prediction, how) == normalised(reference, how)


def fraction_of(right: Sequence[bool]) -> MetricColumns:
    """The columns of a fraction of records that are right."""
    values = np.array(right, float)
    return MetricColumns(values[:, None], lambda sums: sums[:, 0] / len(values), is_fraction=True)


def mean_of(values: np.ndarray) -> MetricColumns:
    """The columns of a mean over records."""
    return MetricColumns(values[:, None], lambda sums: sums[:, 0] / len(values))


def _label_numbers(outcomes: Outcomes, how: Normalise) -> tuple[np.ndarray, np.ndarray]:
    """The index of the right and of the given label per record; -1 for an answer that is no label.

    Raises:
        UserError: A right answer is no label.
    """
    index = {normalised(label, how): number for number, label in enumerate(outcomes.labels)}
    gold = [index.get(normalised(reference, how), -1) for reference in outcomes.references]
    if -1 in gold:
        wrong = outcomes.references[gold.index(-1)]
        raise UserError(f"the right answer {wrong[:80]!r} is none of the labels {', '.join(outcomes.labels)}"[:1000])
    given = [-1 if p is None else index.get(normalised(p, how), -1) for p in outcomes.predictions]
    return np.array(gold), np.array(given)
