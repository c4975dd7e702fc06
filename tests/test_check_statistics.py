"""The statistics of `rlhf data check`: hand-worked numbers, and other libraries' where these have them."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from check_rows import panel, ranking
from rows import write
from scipy import stats

from data_tools.statistics import agreement, biases, consistency
from data_tools.statistics.facts import gathered
from data_tools.statistics.intervals import bootstrapped, clustered_fraction, fraction_of, ratio, resampled_sums
from rlhf.core.intervals import wilson
from rlhf.data.schema import Candidate


@pytest.fixture
def facts(tmp_path):
    """The facts of rankings."""

    def of(rows):
        with gathered(write(tmp_path / "d", rows).path, near=False) as found:
            return found

    return of


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_wilson_is_that_of_the_literature():
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert fraction_of(20, 20).high == 1


def test_a_fraction_over_independent_trials_has_wilsons_interval():
    hits = np.array([1, 0] * 50)
    found = clustered_fraction(hits, np.ones(100))
    assert (found.value, found.n) == (0.5, 100)
    assert (found.low, found.high) == pytest.approx(wilson(0.5, 100), abs=3e-3)


def test_trials_that_repeat_each_other_count_once():
    apart = clustered_fraction(np.array([1.0, 0] * 50), np.ones(100))
    together = clustered_fraction(np.array([10.0, 0] * 50), np.full(100, 10))
    assert together.n == 1000
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high), abs=2e-3)  # t with 99


def test_a_fraction_of_nothing_is_none():
    assert clustered_fraction(np.zeros(3), np.zeros(3)) is None


def test_the_bootstrap_is_seeded_and_as_wide_as_the_normal_interval():
    values = np.stack([np.arange(200) % 2, np.ones(200)], axis=1).astype(float)
    found = bootstrapped(values, ratio)
    assert found == bootstrapped(values, ratio)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)
    assert resampled_sums(values)[:, 1].tolist() == [200] * 1000


def test_a_handful_of_rows_has_no_bootstrap_interval():
    assert bootstrapped(np.array([[1.0, 2.0]]), ratio).low is None
    assert bootstrapped(np.ones((9, 2)), ratio).low is None
    assert bootstrapped(np.ones((10, 2)), ratio).low == 1


def test_two_clusters_give_a_wide_interval():
    assert clustered_fraction(np.ones(2), np.ones(2)).low == pytest.approx(wilson(1, 2)[0])
    assert clustered_fraction(np.full(2, 36.0), np.full(2, 36)).low == pytest.approx(wilson(1, 2)[0]), "36 pairs each"
    assert clustered_fraction(np.array([18.0, 20]), np.full(2, 36)).low < 0.1, "two clusters hardly show their variance"


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        chance = draw.beta(2, 2, 60)  # prompts of different hardness, five pairs each
        found = clustered_fraction(draw.binomial(5, chance), np.full(60, 5))
        held += found.low <= 0.5 <= found.high
    assert 0.91 < held / 300 < 0.99


# ---- consistency ----------------------------------------------------------------------------------------------------


def test_ties_are_counted_by_pairs(facts):
    found = facts([ranking("p", ["x", "y", "z"], (1, 1, 2)), ranking("q", ["x", "y"], (1, 1))])
    assert consistency.ties(found.pairs).value == 2 / 4


def test_two_answers_of_the_same_text_are_no_pair(facts):
    found = facts([ranking("p", ["x", "x", "y"], (1, 1, 2))])
    assert len(found.pairs) == 2
    assert consistency.ties(found.pairs).value == 0


def test_contradictions_are_pairs_ranked_both_ways_whatever_the_order_of_the_answers(facts):
    rows = [
        ranking("p", ["x", "y"], (1, 2), "a"), ranking("p", ["y", "x"], (1, 2), "b"),  # both ways
        ranking("q", ["x", "y"], (1, 2), "a"), ranking("q", ["y", "x"], (2, 1), "b"),  # alike
        ranking("r", ["x", "y"], (1, 2), "a"), ranking("r", ["y", "x"], (1, 1), "b"),  # a tie contradicts nothing
        ranking("s", ["x", "y"], (1, 2), "a"), ranking("t", ["y", "x"], (1, 2), "a"),  # different prompts
    ]  # fmt: skip
    found = facts(rows)
    assert (consistency.contradictions(found.pairs).value) == 1 / 2
    assert consistency.contradictions_between(found.votes).value == 1 / 2
    assert consistency.self_contradictions(found.pairs) is None
    assert len(found.contradicting) == 1


def test_self_contradictions_are_separate_from_those_between_annotators(facts):
    rows = [
        ranking("p", ["x", "y"], (1, 2), "a", time="2024-01-01"),
        ranking("p", ["x", "y"], (2, 1), "a", time="2024-01-02"),
        ranking("q", ["x", "y"], (1, 2), "a", time="2024-01-01"),
        ranking("q", ["x", "y"], (1, 2), "a", time="2024-01-02"),
    ]
    found = facts(rows)
    assert consistency.self_contradictions(found.pairs).value == 1 / 2
    assert consistency.contradictions_between(found.votes) is None


def test_unnamed_rankings_contradict_each_other_too(facts):
    found = facts([ranking("p", ["x", "y"], (1, 2)), ranking("p", ["x", "y"], (2, 1))])
    assert consistency.contradictions(found.pairs).value == 1


def test_a_cycle_of_the_majorities_is_found_and_a_straight_order_is_none(facts):
    circle = [("x", "y", "z"), ("y", "z", "x"), ("z", "x", "y")]  # Condorcet: each pair goes two to one, in a circle
    rows = [ranking("p", order, (1, 2, 3), name) for order, name in zip(circle, "abc")]
    rows += [ranking("q", ("x", "y", "z"), (1, 2, 3), name) for name in "abc"]
    rows += [ranking("r", ("x", "y"), (1, 2), name) for name in "ab"]  # two answers have no circle
    rows += [ranking("s", ("x", "y", "z"), (1, 2, 3), "a")]  # nor has one ranking
    found = facts(rows)
    cycles = consistency.cycles(found.pairs)
    assert (cycles.value, cycles.n) == (1 / 2, 2)


def test_a_cycle_may_run_through_rankings_of_two_answers(facts):
    rows = [ranking("p", pair, (1, 2), "a") for pair in ("xy", "yz", "zx")]
    found = facts(rows)
    assert consistency.cycles(found.pairs).value == 1


# ---- biases ---------------------------------------------------------------------------------------------------------


def test_the_longer_answer_wins_so_often(facts):
    rows = [
        ranking("p", ["long one", "short"], (1, 2)), ranking("q", ["short", "long one"], (1, 2)),
        ranking("r", ["a longer one", "short", "brief"], (1, 3, 2)),  # two pairs of unequal length, both won
        ranking("s", ["same!", "equal"], (1, 2)), ranking("t", ["tie", "longer tie"], (1, 1)),
    ]  # fmt: skip
    found = facts(rows)
    longer = biases.longer_win_rate(found.pairs)
    assert (longer.value, longer.n) == (3 / 4, 4)
    assert sum(one.rate.n for one in biases.win_rates_by_length(found.pairs)) == 4


def test_length_is_counted_in_characters_not_bytes(facts):
    found = facts([ranking("p", ["ééé", "four"], (1, 2))])
    assert biases.longer_win_rate(found.pairs).value == 0


def test_first_wins_is_taken_of_rankings_that_keep_the_order_shown(facts):
    rows = [
        ranking("p", ["x", "y"], (1, 2), shown=True), ranking("q", ["x", "y"], (2, 1), shown=True),
        ranking("r", ["x", "y"], (1, 2), shown=True), ranking("s", ["x", "y"], (1, 2)),
    ]  # fmt: skip
    found = facts(rows)
    assert biases.first_win_rate(found.pairs).value == pytest.approx(2 / 3)
    assert biases.first_win_rate(found.pairs.where(found.pairs.row < 0)) is None


def test_authors_and_persons_win_so_often(facts):
    person, small, big = (
        Candidate("p", "ann", "person"),
        Candidate("s", "small", "model"),
        Candidate("b", "big", "model"),
    )
    rows = [
        ranking("p", [person, small], (1, 2)), ranking("q", [big, person], (1, 2)), ranking("r", [small, big], (2, 1)),
        ranking("s", [Candidate("u"), big], (1, 2)), ranking("t", [big, Candidate("b2", "big", "model")], (1, 2)),
    ]  # fmt: skip
    found = facts(rows)
    assert biases.person_win_rate(found.pairs).value == 1 / 2
    wins = {one.name: (one.rate.value, one.rate.n) for one in found.authors}
    assert wins == {"big": (1, 2), "ann": (1 / 2, 2), "small": (0, 2)}


# ---- agreement ------------------------------------------------------------------------------------------------------


def alpha(votes):
    return agreement.alpha_of_coincidences(agreement.coincidence_sums(votes).sum(axis=0, keepdims=True))[0]


def test_alpha_is_worked_out_by_hand(facts):
    # Two pairs, two people, one pair alike. Both ways round: 8 values, 4 of each; observed disagreement 4 of 8,
    # expected 2·4·4 / 7 of 8: alpha = 1 - 7·4 / 32 = 1/8. A tie lies between: the ordinal distance.
    rows = [ranking(p, "xy", r, n) for p, n, r in (("p", "a", (1, 2)), ("p", "b", (1, 2)), ("q", "a", (1, 2)))]
    found = facts([*rows, ranking("q", "xy", (2, 1), "b")])
    assert alpha(found.votes) == pytest.approx(1 / 8)
    tied = facts([*rows, ranking("q", "xy", (1, 1), "b")])
    assert 1 / 8 < alpha(tied.votes) < 1


def test_alpha_from_coincidences_is_the_librarys(facts):
    rows = panel(60, {"a": 0.9, "b": 0.7, "c": 0.5, "d": 0.8}, k=3, each=3)
    rows = [ranking(r.messages[0].content, r.candidates, [min(x, 2) for x in r.ranks], r.annotator) for r in rows]
    votes = facts(rows).votes
    both = np.concatenate([votes.counts(), votes.counts()[:, ::-1]])  # which answer is the first does not matter
    theirs = krippendorff.alpha(value_counts=both, value_domain=[-1, 0, 1], level_of_measurement="ordinal")
    assert alpha(votes) == pytest.approx(theirs)


def test_alpha_of_clickers_is_near_0_though_k_differs(facts):
    rows = [*panel(150, dict.fromkeys("abc", 0.5), k=2), *panel(150, dict.fromkeys("abc", 0.5), k=6, seed=1)]
    rows = [ranking(f"{len(r.ranks)} {r.messages[0].content}", r.candidates, r.ranks, r.annotator) for r in rows]
    assert abs(alpha(facts(rows).votes)) < 0.06


def test_alpha_of_nothing_but_ties_is_undefined():
    assert np.isnan(agreement.alpha_of_coincidences(np.eye(9)[4:5] * 3))[0]


def test_agreement_with_ties_takes_a_tie_for_an_answer(facts):
    rows = [ranking("p", "xy", r, n) for n, r in zip("abc", [(1, 1), (1, 1), (1, 2)])]
    found = bootstrapped(agreement.agreement_sums(facts(rows).votes, ties=True), ratio)
    assert found.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_tau_b_is_scipys(seed):
    ranks = np.random.default_rng(seed).integers(1, 4, (3, 5))
    pairs = [stats.kendalltau(ranks[i], ranks[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert agreement.tau_b_of_blocks(ranks, np.zeros(3, int)) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("seed", range(3))
def test_w_is_what_scipys_friedman_test_gives(seed):
    ranks = np.random.default_rng(seed).integers(1, 4, (4, 5))
    chi_square = stats.friedmanchisquare(*ranks.T).statistic
    assert agreement.w_of_blocks(ranks, np.zeros(4, int)) == pytest.approx(chi_square / (4 * (5 - 1)))


def test_w_and_tau_by_hand():
    alike, reversed_ = np.array([[1, 2, 3], [1, 2, 3]]), np.array([[1, 2, 3], [3, 2, 1]])
    both, block = np.concatenate([alike, reversed_]), np.array([0, 0, 1, 1])
    assert agreement.w_of_blocks(both, block).tolist() == [1, 0]
    assert agreement.tau_b_of_blocks(both, block) == pytest.approx([1, -1])
    assert np.isnan(agreement.tau_b_of_blocks(np.ones((2, 3), int), np.zeros(2, int)))[0]


def test_rankings_are_compared_where_they_hold_the_same_answers(facts):
    rows = [
        ranking("p", "xyz", (1, 2, 3), "a"), ranking("p", "zyx", (3, 2, 1), "b"), ranking("p", "xyw", (3, 2, 1), "c"),
        ranking("q", "xy", (1, 2), "a"), ranking("q", "xy", (2, 1), "b"),  # K = 2 is left to the pairwise agreement
        ranking("r", "xyz", (1, 2, 3), "a"), ranking("r", "xyz", (3, 2, 1), ""),  # nobody is named
    ]  # fmt: skip
    tau, w = facts(rows).kendall
    assert tau == pytest.approx(np.array([[1, 1]]))
    assert w == pytest.approx(np.array([[1, 1]]))
