"""Agreement of a reward model's scores with held-out human rankings, compared with "the longer answer wins".

Pure functions of predictions: no model, no dataset. Unless stated otherwise a metric is an average over *strict pairs*,
pairs of candidates with different ranks. Metrics named `macro_` average within each ranking first, so that a ranking of
many candidates has the weight of a binary comparison. An undefined metric is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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

    @classmethod
    def of(cls, row: Mapping[str, Any], scores: Iterable[float]) -> ScoredRanking:
        """A row of a table of rankings (`rlhf.data.tables`), with the scores of its candidates."""
        about = {name: row[name] for name in ("source", "annotator", "group")}
        return cls(tuple(row["ranks"]), tuple(scores), tuple(row["characters"]), **about)


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
    ranks, scores = [item.ranks for item in items], [item.scores for item in items]
    compared = pairs_of(ranks, scores, [item.lengths for item in items])
    strict, tied = compared.where(compared.distance != 0), compared.where(compared.distance == 0)
    ordered = [item for item in items if len(set(item.ranks)) > 1]
    taus = kendall_tau_b(ranks, scores)
    metrics = _pair_metrics(strict)
    metrics |= {
        "score_ties": int((strict.gap == 0).sum()),
        "tied_pairs": len(tied),
        "tied_rankings": len(np.setdiff1d(tied.ranking, strict.ranking)),
        "tie_agreement": _mean(tied.gap == 0),
        "calibration_error": calibration_error(strict.gap),
        "top1_accuracy": _mean(np.array([top_share(item.ranks, item.scores) for item in ordered])),
        "kendall_tau_b": _mean(taus[np.isfinite(taus)]),
    }
    distances = sorted(set(strict.distance.tolist()))
    parts = {"by_distance": {str(d): strict.where(strict.distance == d) for d in distances}}
    parts |= {f"by_{n}": strict.by([getattr(item, n) for item in items]) for n in ("source", "annotator", "group")}
    return metrics | {by: {key: _pair_metrics(part) for key, part in found.items()} for by, found in parts.items()}


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
    confidence, index = confidence_bins(gap, bins)
    return float(np.abs(np.bincount(index, credit(gap) - confidence)).sum() / len(gap))


def confidence_bins(gap: NDArray[Any], bins: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The confidence sigmoid(|gap|) of each pair, and which of `bins` equal bins of [0.5, 1] it is in."""
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    return confidence, np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)


# ---- pairs -------------------------------------------------------------------------------------------------------

P = TypeVar("P", bound="Pairs")


@dataclass(frozen=True)
class Pairs:
    """Pairs of candidates of a ranking, better one first, by ranking and candidate; arrays [P]."""

    ranking: NDArray[Any]
    """Int: index of the pair's ranking."""
    better: NDArray[Any]
    """Int: number of the better candidate, counted over all rankings."""
    worse: NDArray[Any]
    distance: NDArray[Any]
    """Int: rank of the worse minus rank of the better; 0 where the annotator tied them."""
    gap: NDArray[Any]
    """Float: score of the better minus that of the worse."""
    lengths: NDArray[Any]
    """Int [P, 2]: of the better and the worse."""

    def __len__(self) -> int:
        return len(self.gap)

    def where(self: P, chosen: NDArray[Any]) -> P:
        """The pairs that a mask or an index array selects."""
        return type(self)(**{name: values[chosen] for name, values in vars(self).items()})

    def by(self: P, labels: Sequence[str | None]) -> dict[str, P]:
        """The pairs by the labels of the rankings, without rankings labelled None."""
        names = sorted({label for label in labels if label is not None})
        codes_of = {name: index for index, name in enumerate(names)}
        codes = np.array([-1 if label is None else codes_of[label] for label in labels], dtype=np.int64)[self.ranking]
        order = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
        return {name: self.where(order[starts[i] : starts[i + 1]]) for i, name in enumerate(names)}

    @property
    def correct(self) -> NDArray[Any]:
        """Float: 1 if the better one has the higher score, 0.5 where the scores are equal."""
        return credit(self.gap)

    @property
    def longer(self) -> NDArray[Any]:
        """Float: the same for the rule "the longer answer wins"."""
        return credit(self.lengths[:, 0] - self.lengths[:, 1])

    @property
    def log_loss(self) -> NDArray[Any]:
        """Float: -log sigmoid(gap), nats."""
        return np.logaddexp(0, -self.gap)


def pairs_of(
    ranks: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> Pairs:
    """All pairs of all rankings, with ties; each argument has an entry for each candidate of each ranking."""
    sizes = np.array([len(row) for row in ranks], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    parts = [np.zeros((2, 0), np.int64)]
    for size in set(sizes.tolist()):  # rankings of the same size are processed together
        parts.append(np.stack([(starts[sizes == size, None] + place).ravel() for place in np.triu_indices(size, 1)]))
    one, other = np.concatenate(parts, axis=1)
    rank, score, length = (
        np.array([value for row in rows for value in row], kind)
        for rows, kind in ((ranks, np.int64), (scores, np.float64), (lengths, np.int64))
    )
    swapped = rank[one] > rank[other]
    better, worse = np.where(swapped, other, one), np.where(swapped, one, other)
    order = np.lexsort((worse, better))
    better, worse = better[order], worse[order]
    ranking, both = np.repeat(np.arange(len(sizes)), sizes)[better], np.stack([length[better], length[worse]], 1)
    return Pairs(ranking, better, worse, rank[worse] - rank[better], score[better] - score[worse], both)


# ---- metrics -----------------------------------------------------------------------------------------------------


def _pair_metrics(strict: Pairs) -> dict[str, Any]:
    """The metrics of a set of strict pairs."""
    _, ranking = np.unique(strict.ranking, return_inverse=True)
    pairs = np.bincount(ranking)
    measures = {"accuracy": strict.correct, "log_loss": strict.log_loss, "longer_accuracy": strict.longer}
    metrics: dict[str, Any] = {"pairs": len(strict), "rankings": len(pairs)}
    for name, values in measures.items():
        metrics |= {name: _mean(values), f"macro_{name}": _mean(np.bincount(ranking, values) / pairs)}
    interval = fraction_interval(np.bincount(ranking, measures["accuracy"]), pairs)
    return metrics | {"accuracy_interval": None if interval is None else list(interval)}


def credit(difference: NDArray[Any]) -> NDArray[Any]:
    """1 for a positive difference (the first of a pair wins), 0.5 for none, 0 for a negative one."""
    return (np.sign(difference) + 1) / 2


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def top_share(ranks: Sequence[int], scores: Sequence[float]) -> float:
    """Of the candidates with the highest score, the fraction that has the best rank."""
    top, best = max(scores), min(ranks)
    hits = [rank == best for rank, score in zip(ranks, scores) if score == top]
    return sum(hits) / len(hits)


def kendall_tau_b(ranks: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> NDArray[Any]:
    """Kendall's tau-b between the ranks and the scores of each ranking, 1 if the scores order the candidates as the
    annotator did; NaN where all ranks or all scores are equal.

    (C - D) / sqrt((pairs with different ranks) (pairs with different scores)), with C and D the pairs in the same and
    in the opposite order (Kendall 1945, Biometrika 33, 239-251).
    """
    pairs = pairs_of(ranks, scores, ranks)
    by_rank, by_score = np.sign(pairs.distance), np.sign(pairs.gap)
    agreement, ranked, scored = (
        np.bincount(pairs.ranking, values, len(ranks)) for values in (by_rank * by_score, by_rank, np.abs(by_score))
    )
    with np.errstate(invalid="ignore"):
        return agreement / np.sqrt(ranked * scored)


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
