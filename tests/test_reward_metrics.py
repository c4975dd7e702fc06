"""rlhf.reward.metrics against values worked by hand, and undefined metrics."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from rlhf.core import console
from rlhf.core.intervals import fraction_interval
from rlhf.reward.metrics import ScoredRanking, calibration_error, metric_rows, reward_metrics

# Strict pairs, better first. A: 1-2 (gap 1.5, shorter), 1-3 (gap 1, as long), 2-3 (gap -0.5, longer).
# B: gap 0, longer. C: none. D: 1-3 (gap 2, shorter), 2-3 (gap 0, shorter).
A = ScoredRanking((1, 2, 3), (2.0, 0.5, 1.0), (10, 20, 10), "web", "ann")
B = ScoredRanking((2, 1), (0.0, 0.0), (5, 9), "web", "bob")
C = ScoredRanking((1, 1), (1.0, 1.2), (3, 3), "lab", "bob")
TIED = ScoredRanking((1, 1), (1.0, 1.0), (3, 3), "lab", "bob")
D = ScoredRanking((1, 1, 2), (3.0, 1.0, 1.0), (1, 2, 3), "lab", "ann", "math")
ITEMS = [A, B, C, D]


def approx(value: float) -> Any:
    return pytest.approx(value, abs=2e-6)


# ---- metrics worked by hand --------------------------------------------------------------------------------------


def test_pairs_rankings_and_ties_are_counted():
    metrics = reward_metrics(ITEMS)
    assert (metrics["pairs"], metrics["rankings"]) == (6, 3)
    assert (metrics["tied_pairs"], metrics["tied_rankings"]) == (2, 1)  # C's pair and D's 1-2; C holds no other
    assert metrics["score_ties"] == 2


def test_accuracy_counts_score_ties_half():
    metrics = reward_metrics(ITEMS)
    assert metrics["accuracy"] == approx((1 + 1 + 0 + 0.5 + 1 + 0.5) / 6)
    assert metrics["macro_accuracy"] == approx((2 / 3 + 1 / 2 + 3 / 4) / 3)


def test_tie_agreement_is_the_fraction_of_tied_pairs_that_the_model_ties():
    assert reward_metrics(ITEMS)["tie_agreement"] == 0
    assert reward_metrics([*ITEMS, TIED])["tie_agreement"] == approx(1 / 3)


def test_log_loss_is_that_of_the_score_differences():
    metrics = reward_metrics(ITEMS)
    # softplus of -1.5, -1, 0.5, then B's log 2, then softplus of -2 and log 2
    assert metrics["log_loss"] == approx((0.201413 + 0.313262 + 0.974077 + 0.693147 + 0.126928 + 0.693147) / 6)
    assert metrics["macro_log_loss"] == approx((1.488752 / 3 + 0.693147 + 0.820075 / 2) / 3)


def test_the_longer_answer_wins_counts_equal_lengths_half():
    metrics = reward_metrics(ITEMS)
    assert metrics["longer_accuracy"] == approx((0 + 0.5 + 1 + 1 + 0 + 0) / 6)
    assert metrics["macro_longer_accuracy"] == approx((0.5 + 1 + 0) / 3)


def test_top1_asks_whether_the_best_is_scored_highest():
    # A yes, B one of two at the top, C has no order, D yes
    assert reward_metrics(ITEMS)["top1_accuracy"] == approx(2.5 / 3)


def test_kendall_tau_b_corrects_for_ties():
    # A: (2 - 1) / 3; B and C undefined; D: 1 / sqrt(2 * 2)
    assert reward_metrics(ITEMS)["kendall_tau_b"] == approx((1 / 3 + 1 / 2) / 2)
    perfect, reverse = (ScoredRanking((1, 2, 3), scores, (1, 1, 1)) for scores in ((3, 2, 1), (1, 2, 3)))
    assert [reward_metrics([item])["kendall_tau_b"] for item in (perfect, reverse)] == [1, -1]


def test_calibration_error_takes_each_pair_in_its_confident_order():
    # confidences 0.817574, 0.731059 and 0.880797 right, 0.622459 wrong, each in its own bin; 0.5 twice, half right
    expected = (0.182426 + 0.268941 + 0.119203 + 0.622459 + 0) / 6
    assert reward_metrics(ITEMS)["calibration_error"] == approx(expected)
    # ten pairs of confidence 0.82, seven right
    gap = math.log(0.82 / 0.18)
    assert calibration_error(np.array([gap] * 7 + [-gap] * 3)) == approx(0.12)
    # confidences 0.52, wrong, and 0.58, right: neighbouring bins do not make good for each other
    assert calibration_error(np.array([-math.log(0.52 / 0.48), math.log(0.58 / 0.42)])) == approx((0.52 + 0.42) / 2)
    assert calibration_error(np.array([50.0, 1000.0])) == approx(0)


def test_breakdowns_hold_the_figures_of_their_part():
    metrics = reward_metrics(ITEMS)

    def parts(name: str) -> dict[str, tuple[Any, ...]]:
        return {label: (f["accuracy"], f["pairs"], f["rankings"]) for label, f in metrics[name].items()}

    assert parts("by_distance") == {"1": (approx(0.6), 5, 3), "2": (1, 1, 1)}
    assert parts("by_source") == {"lab": (0.75, 2, 1), "web": (0.625, 4, 2)}
    assert parts("by_annotator") == {"ann": (approx(0.7), 5, 2), "bob": (0.5, 1, 1)}
    assert parts("by_group") == {"math": (0.75, 2, 1)}
    assert metrics["by_source"]["lab"]["log_loss"] == approx(0.820075 / 2)
    assert metrics["by_distance"]["2"]["longer_accuracy"] == 0.5


def test_a_loop_over_pairs_gives_the_same_figures():
    draw = random.Random(0)
    items = []
    for _ in range(60):
        k = draw.randint(2, 7)
        ranks, scores = ([draw.randint(1, 4) for _ in range(k)] for _ in range(2))
        lengths = tuple(draw.randint(1, 9) for _ in range(k))
        items.append(ScoredRanking(tuple(ranks), tuple(map(float, scores)), lengths, source=draw.choice("abc")))
    credit, losses, of_source = [], [], {}
    for item in items:
        for rank, score in zip(item.ranks, item.scores):
            for worse, below in zip(item.ranks, item.scores):
                if rank < worse:
                    credit.append(0.5 if score == below else float(score > below))
                    losses.append(math.log1p(math.exp(below - score)))
                    of_source.setdefault(item.source, []).append(credit[-1])
    metrics = reward_metrics(items)
    assert metrics["pairs"] == len(credit)
    assert metrics["accuracy"] == pytest.approx(sum(credit) / len(credit))
    assert metrics["log_loss"] == pytest.approx(sum(losses) / len(losses))
    for source, values in of_source.items():
        assert metrics["by_source"][source]["accuracy"] == pytest.approx(sum(values) / len(values))


# ---- the interval ------------------------------------------------------------------------------------------------


def test_the_interval_of_binary_comparisons_is_wilsons():
    # 8 of 10, variance 1.6 / 9 / 10, so n = 0.16 / variance = 9
    low, high = fraction_interval(np.array([1.0] * 8 + [0.0] * 2), np.ones(10, np.int64))
    assert (low, high) == (pytest.approx(0.473788, abs=1e-5), pytest.approx(0.946725, abs=1e-5))


def test_pairs_that_agree_within_rankings_count_as_one():
    one = fraction_interval(np.array([1.0] * 8 + [0.0] * 2), np.ones(10, np.int64))
    three = fraction_interval(np.array([3.0] * 8 + [0.0] * 2), np.full(10, 3))
    assert three == pytest.approx(one)


def test_the_interval_is_never_narrower_than_that_of_independent_pairs():
    # every ranking of two pairs is half right, but one: Wilson with share 21/40 and n = 40
    low, high = fraction_interval(np.array([1.0] * 19 + [2.0]), np.full(20, 2))
    assert (low, high) == (pytest.approx(0.374973, abs=1e-5), pytest.approx(0.670645, abs=1e-5))


def test_the_interval_keeps_a_width_where_all_is_right():
    # Wilson with n = 5 rankings: 1 / (1 + 1.96^2 / 5)
    assert fraction_interval(np.full(5, 3.0), np.full(5, 3)) == (pytest.approx(0.565518, abs=1e-5), 1.0)
    low, high = fraction_interval(np.array([1.0]), np.array([1]))
    assert 0 < low < high == 1


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    first, second = np.triu_indices(4, 1)

    def correct(rankings: int) -> Any:
        truth = draw.normal(size=(rankings, 4))
        scores = truth + np.exp(draw.normal(size=(rankings, 1))) * draw.normal(size=(rankings, 4))
        return ((truth[:, first] > truth[:, second]) == (scores[:, first] > scores[:, second])).sum(1).astype(float)

    population = correct(200_000).mean() / 6
    intervals = [fraction_interval(correct(50), np.full(50, 6)) for _ in range(1000)]
    assert 0.92 < np.mean([low <= population <= high for low, high in intervals]) < 0.98


# ---- where there is nothing to say -------------------------------------------------------------------------------


def undefined(metrics: dict[str, Any]) -> set[str]:
    return {name for name, value in metrics.items() if value is None}


PAIR_FIGURES = {f"{kind}{name}" for kind in ("", "macro_") for name in ("accuracy", "log_loss", "longer_accuracy")}
PAIR_FIGURES |= {"accuracy_interval", "calibration_error", "top1_accuracy", "kendall_tau_b"}


@pytest.mark.parametrize("items", [[], [ScoredRanking((1,), (0.5,), (3,))]], ids=["nothing", "one candidate"])
def test_without_pairs_figures_are_none(items: list[ScoredRanking]):
    metrics = reward_metrics(items)
    assert undefined(metrics) == PAIR_FIGURES | {"tie_agreement"}
    assert (metrics["pairs"], metrics["rankings"], metrics["tied_pairs"], metrics["tied_rankings"]) == (0, 0, 0, 0)
    assert metrics["by_distance"] == {}


def test_with_ties_alone_only_the_ties_are_spoken_of():
    metrics = reward_metrics([TIED, TIED])
    assert undefined(metrics) == PAIR_FIGURES
    assert (metrics["pairs"], metrics["tied_pairs"], metrics["tied_rankings"]) == (0, 2, 2)
    assert metrics["tie_agreement"] == 1
    assert metrics["by_source"]["lab"]["pairs"] == 0 and metrics["by_source"]["lab"]["accuracy"] is None


def test_a_model_that_scores_all_alike_guesses():
    metrics = reward_metrics([ScoredRanking((1, 2, 3), (0.3, 0.3, 0.3), (1, 2, 3))] * 2)
    assert metrics["accuracy"] == 0.5 and metrics["log_loss"] == approx(math.log(2))
    assert metrics["calibration_error"] == 0 and metrics["kendall_tau_b"] is None
    assert metrics["top1_accuracy"] == approx(1 / 3)


def test_extreme_scores_stay_finite():
    metrics = reward_metrics([ScoredRanking((1, 2), (1e4, -1e4), (1, 1)), ScoredRanking((1, 2), (-1e4, 1e4), (1, 1))])
    assert metrics["log_loss"] == 1e4 and metrics["calibration_error"] == 0.5


@pytest.mark.parametrize("items", [ITEMS, [A], [C], []], ids=["all", "one", "tie", "none"])
def test_the_figures_survive_json(items: list[ScoredRanking]):
    metrics = reward_metrics(items)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 ranks, 3 scores, 2 lengths"):
        ScoredRanking((1, 2), (1.0, 2.0, 3.0), (1, 1))
    with pytest.raises(ValueError, match="not finite"):
        ScoredRanking((1, 2), (1.0, math.nan), (1, 1))


# ---- tables ------------------------------------------------------------------------------------------------------


def test_tables_show_the_whole_and_its_parts(capsys: pytest.CaptureFixture[str]):
    tables = {title: (columns, rows) for title, columns, rows in metric_rows(reward_metrics(ITEMS))}
    assert list(tables) == ["Held-out rankings", "By rank distance", "By source", "By annotator"]  # one group only
    overall = {row[0]: row[1:] for row in tables["Held-out rankings"][1]}
    assert overall["accuracy"] == (approx(4 / 6), approx(0.638889))
    assert overall["compared"] == (6, 3)
    assert [row[:4] for row in tables["By source"][1]] == [("web", 4, 2, 0.625), ("lab", 2, 1, 0.75)]
    assert all(len(row) == len(columns) for columns, rows in tables.values() for row in rows)
    for table in metric_rows(reward_metrics(ITEMS)):
        console.table(*table)
    printed = capsys.readouterr().out
    assert "longer answer wins" in printed and "0.6667" in printed and "nan" not in printed


def test_a_single_source_is_not_repeated_and_nothing_prints_as_dashes(capsys: pytest.CaptureFixture[str]):
    assert [title for title, *_ in metric_rows(reward_metrics([B]))] == ["Held-out rankings"]
    for table in metric_rows(reward_metrics([])):
        console.table(*table)
    assert "None" not in capsys.readouterr().out


def test_only_the_annotators_with_the_most_pairs_are_shown():
    items = [ScoredRanking((1, 2), (1.0, 0.0), (1, 1), annotator=f"a{i:02}") for i in range(30)]
    items += [ScoredRanking((1, 2), (1.0, 0.0), (1, 1), annotator="")] * 2
    title, _, rows = metric_rows(reward_metrics(items))[1]
    assert title == "By annotator (20 of 31 with the most pairs)"
    assert len(rows) == 20 and rows[0][:2] == ("(not given)", 2)


def test_importing_the_metrics_does_not_import_torch():
    code = "import sys, rlhf.reward.metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
