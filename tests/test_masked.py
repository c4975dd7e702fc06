"""Masked statistics: hand-worked numbers, and padding that never counts."""

from __future__ import annotations

import pytest
import torch

from rlhf.ppo.masked import completion_lengths, explained_variance, masked_mean, masked_sum, masked_var, whiten

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])
# The values that count are 1, 2, 3 and 6: sum 12, mean 3, deviations -2, -1, 0, 3, variance 14 / 4 = 3.5.
VALUES = torch.tensor([[1.0, 2.0, 3.0], [6.0, NAN, 1e30]])


def test_sum_mean_and_population_variance_match_hand_numbers():
    assert masked_sum(VALUES, MASK) == 12
    assert masked_mean(VALUES, MASK) == 3
    assert masked_var(VALUES, MASK) == 3.5  # the sample variance would be 14 / 3


def test_sums_and_means_along_a_dimension_are_per_episode():
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [6, 6]


def test_mean_of_nothing_is_nan():
    assert masked_mean(VALUES, torch.zeros_like(MASK)).isnan()


def test_whiten_with_shift_centres_at_zero():
    # (v - 3) / sqrt(3.5): -2, -1, 0, 3 over 1.8708287
    expected = [[-1.0690450, -0.5345225, 0.0], [1.6035675, 0.0, 0.0]]
    torch.testing.assert_close(whiten(VALUES, MASK, shift_mean=True), torch.tensor(expected))


def test_whiten_without_shift_keeps_the_mean():
    # OpenAI's meaning: the same, plus the mean 3. (The inverse meaning would centre here.)
    expected = [[1.9309550, 2.4654775, 3.0], [4.6035675, 0.0, 0.0]]
    scaled = whiten(VALUES, MASK, shift_mean=False)
    torch.testing.assert_close(scaled, torch.tensor(expected))
    torch.testing.assert_close(masked_mean(scaled, MASK), torch.tensor(3.0))
    torch.testing.assert_close(masked_var(scaled, MASK), torch.tensor(1.0))


def test_whitening_equal_values_gives_zeros_not_nan():
    assert whiten(torch.full((2, 3), 5.0), MASK, shift_mean=True).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_whitening_adds_1e_8_to_the_variance():
    # +-1e-4 have variance 1e-8, so the divisor is sqrt(2e-8)
    tiny = torch.tensor([[1e-4, -1e-4]])
    whitened = whiten(tiny, torch.ones(1, 2, dtype=torch.bool), shift_mean=True)
    torch.testing.assert_close(whitened, torch.tensor([[0.70710678, -0.70710678]]))


def test_garbage_in_padding_leaves_gradients_clean():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert values.grad.tolist() == [[0.25, 0.25, 0.25], [0.25, 0, 0]]


def test_completion_lengths_count_response_tokens():
    assert completion_lengths(MASK).tolist() == [3, 1]


@pytest.mark.parametrize("row", [[False, False, False], [False, True, True], [True, False, True]])
def test_masks_that_are_not_right_padded_answers_are_refused_by_row(row):
    with pytest.raises(ValueError, match=r"response_mask\[1\].*padding on the right"):
        completion_lengths(torch.tensor([[True, True, False], row]))


def test_explained_variance_matches_hand_numbers():
    # Returns 1, 2, 3: variance 2/3. Errors 0, 0.5, -0.5: mean 0, variance 0.5 / 3. 1 - 0.25 = 0.75.
    returns = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    mask = torch.tensor([[True, True], [True, False]])
    values = torch.tensor([[1.0, 1.5], [3.5, 1e9]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(returns + 10, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.zeros(2, 2), returns, mask).item() == pytest.approx(0)
    assert explained_variance(values, torch.ones(2, 2), mask).isnan()
