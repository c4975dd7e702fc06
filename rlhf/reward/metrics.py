"""Agreement of a reward model's scores with held-out human rankings, compared with "the longer answer wins".

Pure functions of predictions: no model, no dataset. Unless stated otherwise a metric is an average over *strict pairs*,
pairs of candidates with different ranks. Metrics named `macro_` average within each ranking first, so that a ranking of
many candidates has the weight of a binary comparison. An undefined metric is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.core.intervals import fraction_interval


@dataclass(frozen=True)
class ScoredRanking:
    """One held-out ranking with the model's scores: one entry per candidate in each tuple.

    Raises:
        ValueError: The tuples differ in length, or a score is not finite.
    """

    ranks: tuple[int, ...]
    """1 = best, equal = tie."""
    scores: tuple[float, ...]
    """Higher = better, on the scale of the training loss. Scores must not be divided by a standard deviation, since log
    loss and calibration depend on their scale."""
    lengths: tuple[int, ...]
    """Characters or tokens of the answers."""
    source: str = ""
    annotator: str = ""
    group: str | None = None

    def __post_init__(self) -> None:
        if not len(self.ranks) == len(self.scores) == len(self.lengths):
            counts = f"{len(self.ranks)} ranks, {len(self.scores)} scores, {len(self.lengths)} lengths"
            raise ValueError(f"expected one rank, score and length per candidate, got {counts}")
        if not all(math.isfinite(score) for score in self.scores):
            raise ValueError(f"scores are not finite: {self.scores}")


def reward_metrics(items: Sequence[ScoredRanking]) -> dict[str, Any]:
    """All metrics of a held-out set, ready for JSON.

    Args:
        items: The rankings with their scores.

    Returns:
        Overall and in each entry of `by_distance`, `by_source`, `by_annotator` and `by_group` (label -> metrics):

        - `pairs`, `rankings`: strict pairs, and the rankings that have at least one.
        - `accuracy`, `macro_accuracy`: fraction of pairs whose better candidate has the higher score. A score tie
          counts half.
        - `accuracy_interval`: [low, high], 95%, for `accuracy`; see `rlhf.core.intervals.fraction_interval`.
        - `log_loss`, `macro_log_loss`: mean of -log sigmoid(s_better - s_worse), in nats; 0.693 at chance.
        - `longer_accuracy`, `macro_longer_accuracy`: the same for the rule "the longer answer wins"; equal lengths
          count half.

        A label of `by_distance` is the difference of the two ranks, as text. Items without a group are in no
        `by_group` entry. Overall only:

        - `score_ties`: strict pairs with equal scores.
        - `tied_pairs`, `tied_rankings`: pairs that the annotator tied, and rankings with only such pairs.
        - `tie_agreement`: fraction of the tied pairs with equal scores.
        - `calibration_error`: expected calibration error of the pairs' probabilities; see `calibration_error`.
        - `top1_accuracy`: mean over rankings that are not all ties of whether the top-scored candidate has the best
          rank; if several have the top score, the fraction of them that has it.
        - `kendall_tau_b`: mean of Kendall's tau-b between ranks and scores, over rankings in which some ranks and some
          scores differ.
    """
    compared = _compare(items)
    strict = compared.where(compared.distance != 0).better_first()
    tied = compared.where(compared.distance == 0)
    metrics = _pair_metrics(strict)
    metrics |= {
        "score_ties": int((strict.gap == 0).sum()),
        "tied_pairs": len(tied.gap),
        "tied_rankings": len(np.setdiff1d(tied.ranking, strict.ranking)),
        "tie_agreement": _mean(tied.gap == 0),
        "calibration_error": calibration_error(strict.gap),
        "top1_accuracy": _top1_accuracy(items),
        "kendall_tau_b": _kendall_tau_b(compared),
    }
    distances = sorted(set(strict.distance.tolist()))
    metrics["by_distance"] = {str(d): _pair_metrics(strict.where(strict.distance == d)) for d in distances}
    labels: dict[str, Callable[[ScoredRanking], str | None]] = {
        "by_source": lambda item: item.source,
        "by_annotator": lambda item: item.annotator,
        "by_group": lambda item: item.group,
    }
    for name, label in labels.items():
        parts = _split(strict, [label(item) for item in items])
        metrics[name] = {key: _pair_metrics(part) for key, part in parts.items()}
    return metrics


def calibration_error(gap: NDArray[Any], bins: int = 10) -> float | None:
    """Expected calibration error of sigmoid(score difference) as the probability that a candidate is the better one.

    Each pair is taken in the order with confidence sigmoid(|gap|) >= 0.5, since its two orders are equivalent. Over
    `bins` equal bins of [0.5, 1]: the mean of |accuracy - mean confidence|, weighted by pairs (Guo et al. 2017,
    arXiv:1706.04599, eq. 3).

    Args:
        gap: Score of the better-ranked minus that of the worse-ranked candidate, one per pair.
        bins: Number of bins.

    Returns:
        A value in [0, 1]; None without pairs.
    """
    if not len(gap):
        return None
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    correct = credit(gap)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(index, correct - confidence)).sum() / len(gap))


# ---- pairs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ScoredPairs:
    """Pairs of candidates (first, second), one entry each."""

    ranking: NDArray[Any]
    """Int: index of the pair's ranking."""
    distance: NDArray[Any]
    """Int: rank of the second minus rank of the first, > 0 if the first is better."""
    gap: NDArray[Any]
    """Float: score of the first minus score of the second."""
    longer: NDArray[Any]
    """Int: length of the first minus length of the second."""

    def where(self, chosen: NDArray[Any]) -> _ScoredPairs:
        """The pairs that a mask or an index array selects."""
        return _ScoredPairs(self.ranking[chosen], self.distance[chosen], self.gap[chosen], self.longer[chosen])

    def better_first(self) -> _ScoredPairs:
        """Strict pairs with the better-ranked candidate first."""
        sign = np.sign(self.distance)
        return _ScoredPairs(self.ranking, self.distance * sign, self.gap * sign, self.longer * sign)


def _compare(items: Sequence[ScoredRanking]) -> _ScoredPairs:
    """All pairs of all rankings, with ties; rankings of the same size are processed together."""
    of_size: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        of_size.setdefault(len(item.ranks), []).append(index)
    parts = []
    for size, members in of_size.items():
        first, second = np.triu_indices(size, 1)
        ranks = np.array([items[i].ranks for i in members])
        scores = np.array([items[i].scores for i in members])
        lengths = np.array([items[i].lengths for i in members])
        differences = (ranks[:, second] - ranks[:, first], scores[:, first] - scores[:, second])
        columns = (*differences, lengths[:, first] - lengths[:, second])
        parts.append((np.repeat(members, len(first)), *(column.ravel() for column in columns)))
    kinds = (np.int64, np.int64, np.float64, np.int64)
    fields = zip(*parts) if parts else [()] * len(kinds)
    return _ScoredPairs(*(np.concatenate([np.zeros(0, kind), *arrays]) for kind, arrays in zip(kinds, fields)))


def _split(pairs: _ScoredPairs, labels: list[str | None]) -> dict[str, _ScoredPairs]:
    """The pairs by the label of their ranking, without rankings labelled None."""
    names = sorted({label for label in labels if label is not None})
    codes_of = {name: index for index, name in enumerate(names)}
    codes = np.array([-1 if label is None else codes_of[label] for label in labels], dtype=np.int64)[pairs.ranking]
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return {name: pairs.where(order[starts[i] : starts[i + 1]]) for i, name in enumerate(names)}


# ---- metrics -----------------------------------------------------------------------------------------------------


def _pair_metrics(strict: _ScoredPairs) -> dict[str, Any]:
    """The metrics of a set of strict pairs with the better candidate first."""
    _, ranking = np.unique(strict.ranking, return_inverse=True)
    pairs = np.bincount(ranking)
    measures = {
        "accuracy": credit(strict.gap),
        "log_loss": np.logaddexp(0, -strict.gap),
        "longer_accuracy": credit(strict.longer),
    }
    metrics: dict[str, Any] = {"pairs": len(strict.gap), "rankings": len(pairs)}
    for name, values in measures.items():
        metrics |= {name: _mean(values), f"macro_{name}": _mean(np.bincount(ranking, values) / pairs)}
    interval = fraction_interval(np.bincount(ranking, measures["accuracy"]), pairs)
    return metrics | {"accuracy_interval": None if interval is None else list(interval)}


def credit(difference: NDArray[Any]) -> NDArray[Any]:
    """1 for a positive difference (the first of a pair wins), 0.5 for none, 0 for a negative one."""
    return (np.sign(difference) + 1) / 2


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _top1_accuracy(items: Sequence[ScoredRanking]) -> float | None:
    fractions = []
    for item in items:
        if len(set(item.ranks)) > 1:
            top, best = max(item.scores), min(item.ranks)
            hits = [rank == best for rank, score in zip(item.ranks, item.scores) if score == top]
            fractions.append(sum(hits) / len(hits))
    return sum(fractions) / len(fractions) if fractions else None


def _kendall_tau_b(compared: _ScoredPairs) -> float | None:
    """Mean of (concordant - discordant) / sqrt(pairs untied in rank * pairs untied in score) over rankings."""
    by_rank, by_score = np.sign(compared.distance), np.sign(compared.gap)
    agreement = np.bincount(compared.ranking, by_rank * by_score)
    scale = np.sqrt(np.bincount(compared.ranking, by_rank != 0) * np.bincount(compared.ranking, by_score != 0))
    return _mean(agreement[scale > 0] / scale[scale > 0])


# ---- tables --------------------------------------------------------------------------------------------------


MOST_PARTS = 20
"""Rows of a breakdown's table."""


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """The metrics as tables (title, columns, rows), the arguments of `rlhf.core.console.table`.

    The first table is for the whole set. Then come breakdowns with more than one part: by rank distance, and by source,
    annotator and group, each with its `MOST_PARTS` largest parts by pairs. The metrics of
    `rlhf.reward.agreement.Agreement`, if present, follow the accuracy.
    """
    low, high = metrics["accuracy_interval"] or (None, None)
    overall = [
        ("compared", metrics["pairs"], metrics["rankings"]),
        ("tied by the annotator", metrics["tied_pairs"], metrics["tied_rankings"]),
        ("accuracy", metrics["accuracy"], metrics["macro_accuracy"]),
        ("  95% interval, low", low, None),
        ("  95% interval, high", high, None),
        *_agreement_rows(metrics),
        ("longer answer wins", metrics["longer_accuracy"], metrics["macro_longer_accuracy"]),
        ("log loss", metrics["log_loss"], metrics["macro_log_loss"]),
        ("calibration error", metrics["calibration_error"], None),
        ("agreement on ties", metrics["tie_agreement"], None),
        ("top-1 accuracy", None, metrics["top1_accuracy"]),
        ("Kendall tau-b", None, metrics["kendall_tau_b"]),
    ]
    tables: list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]
    tables = [("Held-out rankings", ("", "over pairs", "over rankings"), overall)]
    for name in ("rank distance", "source", "annotator", "group"):
        parts = list(metrics[f"by_{name.removeprefix('rank ')}"].items())
        title = f"By {name}"
        if name != "rank distance":
            parts.sort(key=lambda part: -part[1]["pairs"])
            title += f" ({MOST_PARTS} of {len(parts)} with the most pairs)" if len(parts) > MOST_PARTS else ""
            parts = parts[:MOST_PARTS]
        if len(parts) > 1:
            columns = (name, "pairs", "rankings", "accuracy", "95% low", "95% high", "log loss", "longer wins")
            tables.append((title, columns, [_part_row(label, part) for label, part in parts]))
    return tables


def _agreement_rows(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    if "ceiling" not in metrics:
        return []
    low, high = metrics["ceiling_interval"]
    return [
        ("annotators agree", metrics["annotator_agreement"], None),
        ("ceiling for accuracy", metrics["ceiling"], None),
        ("  95% interval, low", low, None),
        ("  95% interval, high", high, None),
    ]


def _part_row(label: str, metrics: dict[str, Any]) -> tuple[Any, ...]:
    low, high = metrics["accuracy_interval"] or (None, None)
    counts = label or "(not given)", metrics["pairs"], metrics["rankings"]
    return (*counts, metrics["accuracy"], low, high, metrics["log_loss"], metrics["longer_accuracy"])
