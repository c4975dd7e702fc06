"""Whole rankings: Kendall's tau, the best of K, and what the choice of a model costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.evaluation.estimates import clustered_mean, fraction
from rlhf.evaluation.scored import ScoredRecord
from rlhf.inference.best_of import best_odds
from rlhf.reward.metrics import kendall_tau_b, top_share


def listwise(scored: Sequence[ScoredRecord]) -> dict[str, Any] | None:
    """Metrics of rankings as wholes, averaged over the rankings that are not all ties; None without one.

    Utility is what a candidate is worth to the annotator: 1 at the best rank, 0 at the worst, in equal steps between.

    Returns:
        - `rankings`, and `sizes`: number of candidates -> rankings.
        - `kendall_tau_b`: see there; 0 for a ranking in which all scores are equal. As `clustered_mean` gives it.
        - `best_of_k`: fraction in which the candidate of the highest score has the best rank (equal scores share the
          credit), as `fraction` gives it; `best_of_k_chance`: the same for a random choice.
        - `beats_all`: fraction in which every best-ranked candidate scores above every other one.
        - `regret`: 1 - utility of the model's choice, as `clustered_mean` gives it; `regret_chance` of a random choice.
        - `rating_regret`: by the candidates' own ratings: the highest minus that of the model's choice; None unless
          all candidates have ratings.
        - `curve`: see `best_of_curve`.
    """
    kept = [one for one in scored if len({rank for rank, _ in one.known}) > 1]
    if not kept:
        return None
    clusters = np.array([one.record.prompt_id for one in kept])
    rows = [one.known for one in kept]
    ranks, scores = [[rank for rank, _ in row] for row in rows], [[score for _, score in row] for row in rows]
    worth, best = [_worth(row) for row in rows], [_chosen(row) for row in rows]
    top = np.array(list(map(top_share, ranks, scores)))
    regret = np.array([1 - np.mean([worth[i][k] for k in best[i]]) for i in range(len(rows))])
    return {
        "rankings": len(rows),
        "sizes": {str(size): count for size, count in sorted(Counter(map(len, rows)).items())},
        "kendall_tau_b": clustered_mean(np.nan_to_num(kendall_tau_b(ranks, scores)), clusters),
        "best_of_k": fraction(top, clusters),
        "best_of_k_chance": float(np.mean([np.mean(np.array(one) == 1) for one in worth])),
        "beats_all": fraction(np.array([_beats_all(row) for row in rows], dtype=float), clusters),
        "regret": clustered_mean(regret, clusters),
        "regret_chance": float(np.mean([1 - np.mean(one) for one in worth])),
        "rating_regret": _rating_regret(kept, clusters),
        "curve": best_of_curve(rows),
    }


def _worth(known: Sequence[tuple[int, float]]) -> list[float]:
    """The utilities: 1 at the best rank, 0 at the worst, linear between; at least two ranks differ."""
    ranks = [rank for rank, _ in known]
    low, high = min(ranks), max(ranks)
    return [(high - rank) / (high - low) for rank in ranks]


def _chosen(known: Sequence[tuple[int, float]]) -> list[int]:
    """The candidates of the highest score."""
    top = max(score for _, score in known)
    return [index for index, (_, score) in enumerate(known) if score == top]


def _beats_all(known: Sequence[tuple[int, float]]) -> bool:
    best = min(rank for rank, _ in known)
    others = max(score for rank, score in known if rank != best)
    return min(score for rank, score in known if rank == best) > others


def _rating_regret(scored: Sequence[ScoredRecord], clusters: Any) -> dict[str, Any] | None:
    found = []
    for one in scored:
        known = [(c.score, s) for c, s in zip(one.record.candidates, one.scores) if s is not None]
        ratings = [rating for rating, _ in known if rating is not None]
        if len(ratings) < len(known):
            return None
        top = max(score for _, score in known)
        found.append(max(ratings) - float(np.mean([r for r, (_, s) in zip(ratings, known) if s == top])))
    return clustered_mean(np.array(found), clusters)


def best_of_curve(rows: Sequence[Sequence[tuple[int, float]]]) -> list[dict[str, float]]:
    """Mean utility of the candidate that the model would choose among n random ones, for n from 1 to the common K.

    Exact, without drawing, by `best_odds`. Equal scores share their places.

    Args:
        rows: (rank, score) of each ranking's candidates. Only rankings of the most frequent size are used.

    Returns:
        For each n: `n`, `chosen` (by the model), `best` (by the annotator), `random`, and `rankings`.
    """
    sizes = Counter(map(len, rows))
    size = max(sizes, key=lambda one: (sizes[one], one))
    used = [row for row in rows if len(row) == size]
    chosen = np.mean([_worth_by_score(row) for row in used], axis=0)
    best = np.mean([sorted(_worth(row)) for row in used], axis=0)
    return [
        {"n": n, "chosen": float(chosen @ odds), "best": float(best @ odds), "random": float(best.mean())}
        | {"rankings": len(used)}
        for n in range(1, size + 1)
        for odds in [best_odds(size, n)]
    ]


def _worth_by_score(known: Sequence[tuple[int, float]]) -> list[float]:
    """The utilities in ascending order of the scores; candidates of equal score share theirs."""
    shared: dict[float, list[float]] = {}
    for worth, (_, score) in zip(_worth(known), known):
        shared.setdefault(score, []).append(worth)
    return [float(np.mean(worths)) for _, worths in sorted(shared.items()) for _ in worths]
