"""Statistics of compared ways: paired differences, intervals, the recommendation."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.comparison.quality import Quality, difference, quality, recommend
from rlhf.tasks.metrics import METRICS, Outcomes, limits

FREE, CHEAP, DEAR = (0, 0, 0, 20), (100, 400, 5, 20), (10**6, 4 * 10**6, 60, 20)


def right(*flags: int) -> Quality:
    """Quality of a way whose answers are right (1) or wrong (0)."""
    references = ["yes"] * len(flags)
    outcomes = Outcomes(references, ["yes" if flag else "no" for flag in flags])
    return quality([METRICS.pick("exact_match")(outcomes)])


def test_a_difference_of_equal_answers_is_exactly_zero_and_its_interval_too():
    one = right(*[1, 0] * 20)
    assert difference(one, right(*[1, 0] * 20)) == (0, 0, 0)


def test_the_paired_interval_is_narrower_than_those_of_the_values():
    one, other = right(*[1] * 30, *[0] * 30), right(*[1] * 33, *[0] * 27)
    gap, low, high = difference(other, one)
    assert gap == pytest.approx(0.05)
    assert high - low < 0.5 * (one.interval[1] - one.interval[0])


def test_several_seeds_are_averaged():
    columns = [METRICS.pick("exact_match")(Outcomes(["a"] * 4, answers)) for answers in (["a"] * 4, ["a", "b"] * 2)]
    assert quality(columns).value == 0.75 and quality(columns).by_seed == (1.0, 0.5)


def test_without_variation_over_records_the_interval_is_students_over_seeds():
    columns = [METRICS.pick("score")(Outcomes(["a"] * 4, scores=[value] * 4)) for value in (1.0, 2.0, 6.0)]
    found = quality(columns)
    error = np.std([1.0, 2.0, 6.0], ddof=1) / 3**0.5
    # 4.303 is the 97.5% quantile of t with 2 degrees of freedom; 2,000 resamples estimate it to some percent
    assert found.interval == pytest.approx((3 - 4.303 * error, 3 + 4.303 * error), rel=0.1)


def test_differences_are_paired_by_seed():
    def way(*values: float) -> Quality:
        return quality([METRICS.pick("score")(Outcomes(["a"] * 4, scores=[value] * 4)) for value in values])

    gap, low, high = difference(way(1.5, 3.5, 5.5), way(1, 3, 5))
    assert (gap, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_an_interval_stays_within_the_values_that_a_metric_can_have():
    columns = [METRICS.pick("exact_match")(Outcomes(["a"] * 4, answers)) for answers in (["a"] * 4, ["a", "b"] * 2)]
    assert quality(columns, limits(METRICS.pick("exact_match"))).interval == (0.0, 1.0)


def test_the_best_is_taken_where_all_others_are_measurably_worse():
    found = {"base": right(*[0] * 50), "cheap": right(*[1] * 20, *[0] * 30), "dear": right(*[1] * 45, *[0] * 5)}
    chosen = recommend(found, {"base": FREE, "cheap": CHEAP, "dear": DEAR}, "base")
    assert (chosen.way, chosen.best, chosen.equals) == ("dear", "dear", ["dear"])
    assert chosen.text.startswith("Take dear: 0.900 (") and "Every other way is measurably worse" in chosen.text
    assert "better than base (+0.900" in chosen.text and "Sure: in 100%" in chosen.text


def test_the_cheapest_is_taken_of_those_that_are_not_measurably_worse():
    found = {"base": right(*[0] * 50), "cheap": right(*[1] * 40, *[0] * 10), "dear": right(*[0] * 9, *[1] * 41)}
    chosen = recommend(found, {"base": FREE, "cheap": CHEAP, "dear": DEAR}, "base")
    assert (chosen.way, chosen.best) == ("cheap", "dear")
    assert chosen.margin == pytest.approx(0.02)
    assert "the difference of -0.020" in chosen.text and "may be chance" in chosen.text
    assert "no way beats it by more than 0.020" in chosen.text


def test_nothing_is_recommended_as_better_than_the_baseline_on_a_handful_of_records():
    found = {"base": right(1, 0, 0, 1, 0), "dear": right(1, 1, 0, 1, 0)}
    chosen = recommend(found, {"base": FREE, "dear": DEAR}, "base")
    assert chosen.way == "base"


def test_an_unsure_recommendation_says_so():
    draws = np.random.default_rng(0)
    found = {
        name: Quality(value, value + 0.1 * draws.standard_normal(2000)) for name, value in (("a", 0.5), ("b", 0.5))
    }
    assert "Not sure" in recommend(found, {"a": FREE, "b": CHEAP}, "a").text
