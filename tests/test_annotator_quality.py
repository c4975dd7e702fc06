"""What the methods of aggregation recover from annotators of known quality."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from simulated_annotators import simulated

from data_tools.aggregate.methods import AGGREGATORS
from data_tools.aggregate.votes import Ballots, collect
from rlhf.data.schema import Ranking

METHODS = [row.name for row in AGGREGATORS]
QUALITY = [row.name for row in AGGREGATORS if row.traits["quality"]]


@cache
def crowd_of_known_quality(seed: int, reversed_: int) -> tuple[list[Ranking], dict[str, dict[str, float]], Ballots]:
    rankings, truth = simulated(seed, reversed_=reversed_)
    return rankings, truth, collect(iter(rankings))


@cache
def recovered(method: str, seed: int, reversed_: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Of each prompt, the share of pairs in the true order (a tie is half right) and the confidence; qualities."""
    rankings, truth, ballots = crowd_of_known_quality(seed, reversed_)
    verdict = AGGREGATORS[method].fn(ballots.votes)
    first = np.unique(ballots.pool, return_index=True)[1]
    shares = []
    for number in first:
        items = ballots.item[ballots.start[number] : ballots.start[number + 1]]
        values = truth[rankings[number].messages[0].content]
        value = np.array([values[c.text] for c in rankings[number].candidates])
        gap = verdict.ranks[items][None, :] - verdict.ranks[items][:, None]
        above = value[:, None] > value[None, :]
        shares.append((np.sign(gap)[above] + 1).mean() / 2)
    names = {} if verdict.quality is None else dict(zip(ballots.votes.annotators, verdict.quality.tolist()))
    return np.array(shares), verdict.confidence, names


SEEDS = range(8)


@pytest.mark.slow
@pytest.mark.parametrize("method", QUALITY)
def test_with_two_of_ten_clicking_at_random_the_true_order_is_recovered_better_than_by_majority(method: str) -> None:
    """Over 12 seeds, pairs in the true order: majority 84.3%, crowd-bradley-terry 87.3%, dawid-skene 87.1%.

    Per seed the gain was between 1.5 and 4.9 points; its mean is 12 or more standard errors from 0.
    """
    gains = [recovered(method, seed)[0].mean() - recovered("majority", seed)[0].mean() for seed in SEEDS]
    assert min(gains) > 0.01 and np.mean(gains) > 0.02
    assert np.mean(gains) > 8 * np.std(gains, ddof=1) / np.sqrt(len(gains))


@pytest.mark.parametrize("method", QUALITY)
def test_upside_down_annotators_are_turned_round_where_the_majority_gives_way(method: str) -> None:
    """Two more of the ten rank backwards: majority 66%, the others 87%; the least gain of 12 seeds was 19 points."""
    for seed in SEEDS[:2]:
        shares, _, quality = recovered(method, seed, reversed_=2)
        assert shares.mean() > recovered("majority", seed, reversed_=2)[0].mean() + 0.15
        assert all(quality[who] < 0.4 for who in ("02", "03"))


@pytest.mark.parametrize("method", QUALITY)
def test_random_clickers_have_the_lowest_quality(method: str) -> None:
    for seed in SEEDS[:2]:
        quality = recovered(method, seed)[2]
        assert all(0.42 < quality[who] < 0.58 for who in ("00", "01"))
        assert min(value for who, value in quality.items() if who not in ("00", "01")) > 0.62


@pytest.mark.parametrize("method", METHODS)
def test_what_is_confident_is_more_often_right(method: str) -> None:
    for seed in SEEDS[:2]:
        shares, confidence, _ = recovered(method, seed)
        by_confidence = shares[np.argsort(confidence, kind="stable")]
        assert by_confidence[200:].mean() > by_confidence[:200].mean() + 0.06
        assert np.all((confidence > 0) & (confidence <= 1))
