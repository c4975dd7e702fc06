"""Win rates, raw and length-controlled, and statistics of answers, against numbers worked by hand and peers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from rlhf.judging.texts import distinct_n, is_refusal, repetition, self_bleu, text_metrics, words_of
from rlhf.judging.win_rate import RIDGE, length_controlled, win_rates


def test_wins_ties_and_losses_are_counted_and_a_tie_counts_half() -> None:
    found = win_rates([1, 0.5, 0, 1], [(3, 2), (4, 4), (1, 9), (5, 5)], ["a", "a", "b", "c"])
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert found["win_rate"] == pytest.approx(2.5 / 4)
    assert found["mean_lengths"] == pytest.approx([13 / 4, 20 / 4])
    low, high = found["interval"]
    assert 0 < low < 0.625 < high < 1


def test_comparisons_of_one_prompt_do_not_narrow_the_interval() -> None:
    once = [float(i % 2) for i in range(20)]
    narrow = win_rates(once, [(1, 1)] * 20, range(20))["interval"]
    assert win_rates(once * 5, [(1, 1)] * 100, [*range(20)] * 5)["interval"] == pytest.approx(narrow)


def test_no_comparison_is_an_error() -> None:
    with pytest.raises(ValueError, match="no comparison"):
        win_rates([], [], [])


def test_without_differences_of_length_the_controlled_rate_is_the_raw_one() -> None:
    credits = np.array([1.0] * 30 + [0.0] * 10)
    found, _ = length_controlled(credits, np.zeros(40), np.arange(40))
    # the penalised score equation 40·(0.75 - p) = RIDGE·θ
    assert 40 * (0.75 - found) == pytest.approx(RIDGE * math.log(found / (1 - found)), abs=1e-5)
    assert found == pytest.approx(0.75, abs=1e-3)


def test_a_policy_that_wins_by_length_alone_has_an_even_controlled_rate() -> None:
    # longer wins 9 of 10 times; the first policy is longer in 80 of 100 comparisons: raw 0.8·0.9 + 0.2·0.1 = 0.74
    longer = np.repeat([1.0, -1.0], [80, 20])
    wins = np.concatenate([np.repeat([1.0, 0.0], [72, 8]), np.repeat([1.0, 0.0], [2, 18])])
    assert wins.mean() == 0.74
    found, (low, high) = length_controlled(wins, 50 * longer, np.arange(100))
    assert found == pytest.approx(0.5, abs=0.01)
    assert 0.25 < low < found < high < 0.7


def test_the_regression_is_the_minimum_of_the_published_loss() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.normal(20, 40, 60)
    credits = draw.choice([0.0, 0.5, 1.0], 60)
    tanh = np.tanh(lengths / lengths.std())

    def loss(theta: np.ndarray) -> float:
        logits = theta[0] + theta[1] * tanh
        return float((np.logaddexp(0, logits) - credits * logits).sum() + RIDGE / 2 * (theta**2).sum())

    expected = minimize(loss, np.zeros(2), tol=1e-12).x[0]
    found, _ = length_controlled(credits, lengths, np.arange(60))
    assert found == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-4)


def test_copies_of_comparisons_do_not_narrow_the_controlled_interval() -> None:
    draw = np.random.default_rng(0)
    once = draw.choice([0.0, 1.0], 60), draw.normal(20, 40, 60), np.arange(60)
    again = [np.repeat(values, 3) for values in once]
    assert length_controlled(*again)[1] == pytest.approx(length_controlled(*once)[1], abs=1e-2)


def test_the_interval_of_a_policy_that_always_wins_is_that_of_the_likelihood() -> None:
    # without lengths the deviance of p is -2·40·ln p, which reaches 1.96² at p = exp(-0.048), but for the penalty
    found, (low, high) = length_controlled(np.ones(40), np.zeros(40), np.arange(40))
    assert 0.99 < found < high <= 1
    assert low == pytest.approx(math.exp(-(1.96**2) / 80), abs=1e-2)


def test_nothing_is_known_of_equal_lengths_where_the_winner_is_always_longer() -> None:
    _, (low, high) = length_controlled(np.ones(20), np.arange(1.0, 21.0), np.arange(20))
    assert low < 0.5 < 0.99 < high


def test_the_interval_holds_the_true_rate_of_a_strong_policy() -> None:
    draw, held = np.random.default_rng(0), 0
    for _ in range(60):
        lengths = draw.normal(10, 40, 40)
        wins = (draw.random(40) < 1 / (1 + np.exp(-(4 + 0.5 * np.tanh(lengths / 40))))).astype(float)
        _, (low, high) = length_controlled(wins, lengths, np.arange(40))
        held += low <= 1 / (1 + math.exp(-4)) <= high
    assert held >= 54


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_distinct_n_is_the_share_of_different_n_grams() -> None:
    assert words_of("The cat, the Cat!") == ["the", "cat", ",", "the", "cat", "!"]
    assert distinct_n(["a b a b", "a c"], 1) == pytest.approx(3 / 6)
    assert distinct_n(["a b a b", "a c"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["a"], 2) is None


def test_repetition_is_the_share_of_n_grams_that_came_before() -> None:
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("no no no no no no no no") == pytest.approx(4 / 5)
    assert repetition("short") == 0.0


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I\u2019m sorry, but I can't help.", True), ("As an AI language model, ...", True),
        ("Sure! Here is how.", False), ("word " * 40 + "I cannot", False), ("", False),
    ],
)  # fmt: skip
def test_a_refusal_is_known_by_its_first_words(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused


def test_self_bleu_of_equal_texts_is_100_and_of_different_ones_near_0() -> None:
    pytest.importorskip("sacrebleu")
    assert self_bleu([["the cat sat on the mat"] * 3]) == pytest.approx(100)
    found = self_bleu([["the cat sat on the mat", "dogs bark at night near my old house"]])
    assert found is not None and found < 10
    assert self_bleu([["only one"], []]) is None


def test_self_bleu_compares_answers_to_one_prompt_if_there_are_several() -> None:
    pytest.importorskip("sacrebleu")
    same, other = "the cat sat on the mat", "dogs bark at night near my old house"
    assert text_metrics([[same, same], [other, other]])["self_bleu"] == pytest.approx(100)
    assert text_metrics([[same], [other]])["self_bleu"] < 10
