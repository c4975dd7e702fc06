"""Verdicts on annotators: random clickers, honest ones, reversed ranks, and a preference for one side."""

from __future__ import annotations

import numpy as np
import pytest
from check_rows import panel, ranking
from rows import write

from data_tools.statistics.annotators import (
    VERDICTS,
    agreement_with_others,
    independent_pairs,
    one_sided_test,
    random_clicker_test,
)
from data_tools.statistics.facts import gathered

HONEST = {f"honest {i}": accuracy for i, accuracy in enumerate((0.75, 0.75, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9))}


def annotators(tmp_path, rows):
    """Annotator -> what is found of them."""
    with gathered(write(tmp_path / "d", rows).path, near=False) as facts:
        return {one.name: one for one in facts.annotators}


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_random_clickers_are_found_and_honest_annotators_are_not(tmp_path, seed, k):
    found = annotators(tmp_path, panel(400, {**HONEST, "click 1": 0.5, "click 2": 0.5}, k, each=4, seed=seed))
    assert {name for name, one in found.items() if one.verdict == "random"} == {"click 1", "click 2"}
    assert not any(one.one_sided for one in found.values())


@pytest.mark.parametrize("seed", range(3))
def test_someone_whose_ranks_run_the_other_way_is_reversed(tmp_path, seed):
    found = annotators(tmp_path, panel(200, {**HONEST, "five is best": 0.0}, k=3, each=3, seed=seed))
    assert [name for name, one in found.items() if one.verdict == "reversed"] == ["five is best"]
    assert "random" not in {one.verdict for one in found.values()}


def test_two_annotators_who_disagree_are_undecided(tmp_path):
    found = annotators(tmp_path, panel(300, {"honest": 0.9, "click": 0.5}, seed=2))
    assert {one.verdict for one in found.values()} == {"unclear"}


def test_a_few_judgements_are_too_few(tmp_path):
    found = annotators(tmp_path, panel(8, {**HONEST, "click": 0.5}, each=3))
    assert {one.verdict for one in found.values()} == {"unclear"}


def test_nobody_is_judged_where_nobody_else_judged(tmp_path):
    found = annotators(tmp_path, [ranking(f"q{i}", "xy", (1, 2), "alone") for i in range(50)])
    assert (found["alone"].agreement, found["alone"].verdict, found["alone"].rankings) == (None, "unclear", 50)


def test_verdicts_are_worked_out_by_hand():
    # The others agree in 160 of 200 pairs, 0.8. Of 100: 50 is 7 sigma below and what a coin gives; 65 is 3.7 below
    # and 3 above a coin; 20 is below a coin; of 5 pairs nothing follows.
    hits, tries = np.array([160.0, 50, 65, 20, 3]), np.array([200.0, 100, 100, 100, 5])
    others = np.array([4000.0, 5000.0])  # one more who outweighs all, so that what the others do is 0.8
    verdicts = random_clicker_test(np.append(hits, others[0]), np.append(tries, others[1]))
    assert verdicts == ["as the others", "random", "weaker", "reversed", "unclear", "as the others"]
    assert set(verdicts) == set(VERDICTS)


def test_agreement_with_the_majority_of_the_others_by_hand(tmp_path):
    rows = [ranking("p", "xy", r, n) for n, r in zip("abc", [(1, 2), (1, 2), (2, 1)])]  # a: b and c are even
    rows += [ranking("q", "xy", r, n) for n, r in zip("abcd", [(1, 2), (1, 2), (1, 2), (2, 1)])]
    rows += [ranking("r", "xy", (1, 1), "a"), ranking("r", "xy", (1, 2), "b")]  # a tie is no judgement, nor company
    with gathered(write(tmp_path / "d", rows).path, near=False) as facts:
        hits, tries = agreement_with_others(facts.columns, facts.votes)
        names = facts.columns.annotators
    assert dict(zip(names, zip(hits, tries))) == {"a": (1, 1), "b": (1, 1), "c": (1, 2), "d": (0, 1)}


def test_pairs_of_a_longer_ranking_count_less():
    assert independent_pairs(np.array([2, 5])).tolist() == [1, 0.6]
    draw = np.random.default_rng(0)
    ranks = draw.permuted(np.tile(np.arange(5), (20_000, 1)), axis=1)
    one, other = np.triu_indices(5, 1)
    agreeing = (ranks[:, one] < ranks[:, other]).sum(axis=1)
    assert agreeing.var() * independent_pairs(np.array(5)) == pytest.approx(10 / 4, rel=0.05)


def test_someone_who_clicks_on_a_side_is_one_sided(tmp_path):
    rows = panel(100, HONEST, each=3)
    rows += [ranking(f"Question {i}?", "xy", (1, 2), "left", shown=True, seconds=i) for i in range(41)]
    found = annotators(tmp_path, rows)
    assert [name for name, one in found.items() if one.one_sided] == ["left"]
    assert (found["left"].first.value, found["left"].seconds, found["honest 1"].seconds) == (1, 20, None)


def test_the_side_test_is_two_sided_and_exact():
    assert one_sided_test(np.array([0.0, 10, 5, 0]), np.array([10.0, 10, 10, 0])).tolist() == [True, True, False, False]
