"""PPO's losses: hand-worked numbers, all sign cases of the clips, gradients, and sums that add up."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from rlhf.ppo.losses import PolicyStats, importance_weights, policy_loss, value_loss

NAN = float("nan")
ONE = torch.ones(1, 1, dtype=torch.bool)


def one_token(ratio: float, advantage: float, **options) -> tuple[float, float, PolicyStats]:
    """Loss, its gradient with respect to the log-probability, and the statistics for a single token."""
    logprob = torch.tensor([ratio]).log().requires_grad_()
    loss, stats = policy_loss(logprob, torch.zeros(1), torch.tensor([advantage]), **options)
    loss.sum().backward()
    return loss.item(), logprob.grad.item(), stats


# ---- policy


@pytest.mark.parametrize(
    "ratio, advantage, loss, held",
    [
        # bounds 0.8 and 1.3; d loss / d logprob = -A * ratio where the ratio is free, 0 where it is held
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),
        (1.5, 2.0, -2.6, True),  # A > 0, ratio above: -1.3 * 2
        (0.5, 2.0, -1.0, False),  # A > 0, ratio below: the pessimistic side, not held
        (1.5, -2.0, 3.0, False),  # A < 0, ratio above: the pessimistic side, not held
        (0.5, -2.0, 1.6, True),  # A < 0, ratio below: 0.8 * 2
        (1.5, 0.0, 0.0, False),  # A = 0: nothing to hold
        (0.5, 0.0, 0.0, False),
    ],
)
def test_clipping_in_every_sign_case(ratio, advantage, loss, held):
    got, gradient, stats = one_token(ratio, advantage, clip_low=0.2, clip_high=0.3)
    assert got == pytest.approx(loss, rel=1e-5)
    assert gradient == pytest.approx(0.0 if held else -advantage * ratio, rel=1e-5)
    assert stats.clipped == float(held)


@pytest.mark.parametrize(
    "ratio, advantage, loss, held",
    [
        (5.0, -2.0, 6.0, True),  # 3 * 2 instead of 5 * 2
        (2.0, -2.0, 4.0, False),  # below the ceiling
        (0.5, -2.0, 1.6, True),  # the ordinary clip still holds
        (5.0, 0.5, -0.6, True),  # A > 0: only the ordinary clip
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens_with_large_ratios(ratio, advantage, loss, held):
    got, gradient, stats = one_token(ratio, advantage, dual_clip=3.0)
    assert got == pytest.approx(loss, rel=1e-5)
    assert (gradient == 0) == held
    assert stats.clipped == float(held)


@pytest.mark.parametrize("log_ratio", [80.0, 89.0, 1000.0])
@pytest.mark.parametrize(
    "advantage, dual_clip, loss, clipped",
    [(1.0, None, -1.2, 1), (0.0, None, 0.0, 0), (0.0, 3.0, 0.0, 0), (-1.0, 3.0, 3.0, 1)],
)
def test_a_token_that_a_clip_holds_has_no_gradient_however_large_its_ratio(
    log_ratio, advantage, dual_clip, loss, clipped
):
    logprob = torch.zeros(1, requires_grad=True)
    got, stats = policy_loss(logprob, torch.tensor([-log_ratio]), torch.tensor([advantage]), dual_clip=dual_clip)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert (logprob.grad.item(), stats.clipped) == (0.0, clipped)
    assert stats.kl_k1.isfinite() and stats.kl_k3.isfinite()


def test_a_token_that_no_clip_holds_has_an_infinite_gradient_where_its_ratio_is_infinite():
    logprob = torch.zeros(1, requires_grad=True)
    got, _ = policy_loss(logprob, torch.tensor([-89.0]), torch.tensor([-1.0]))
    got.sum().backward()
    assert got.item() == logprob.grad.item() == float("inf")


def test_a_dual_clip_just_above_1_is_one():
    got, gradient, _ = one_token(2.0, -2.0, dual_clip=1.5)
    assert got == pytest.approx(3.0) and gradient == 0  # 1.5 * 2 instead of 2 * 2


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, NAN])
def test_a_dual_clip_that_would_cut_ordinary_gradients_is_refused(dual_clip):
    with pytest.raises(ValueError, match="above 1"):
        one_token(1.0, 1.0, dual_clip=dual_clip)


def test_at_ratio_1_the_loss_is_minus_a_and_its_gradient_the_policy_gradient():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tokens = torch.tensor([1, 4, 6, 0, 2])
    advantages = torch.tensor([0.5, -1.0, 2.0, 3.0, 0.0])

    def logprobs():
        return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

    loss, stats = policy_loss(logprobs(), logprobs().detach(), advantages)
    assert torch.equal(loss.detach(), -advantages)
    assert (stats.ratio_min, stats.ratio_max, stats.clipped, stats.kl_k1, stats.kl_k3) == (1, 1, 0, 0, 0)
    (surrogate,) = torch.autograd.grad(loss.sum(), logits)
    (policy_gradient,) = torch.autograd.grad(-(advantages * logprobs()).sum(), logits)
    torch.testing.assert_close(surrogate, policy_gradient)


def test_a_micro_batch_without_tokens_has_neutral_statistics():
    nothing = torch.zeros(0)
    loss, stats = policy_loss(nothing, nothing, nothing)
    assert loss.shape == (0,) and stats.clipped == 0 and stats.kl_k3 == 0
    assert stats.ratio_min == torch.inf and stats.ratio_max == -torch.inf


def test_policy_statistics_match_hand_numbers():
    # ratios 2, 0.5 and 1: log ratios 0.6931472, -0.6931472, 0
    # k1 = -log ratio: -0.6931472 + 0.6931472 + 0 = 0
    # k3 = ratio - 1 - log ratio: 0.3068528 + 0.1931472 + 0 = 0.5
    # clipped with A > 0: the ratio 2 alone
    _, stats = policy_loss(torch.tensor([2.0, 0.5, 1.0]).log(), torch.zeros(3), torch.ones(3))
    assert stats.clipped == 1
    assert stats.kl_k1.item() == pytest.approx(0, abs=1e-6) and stats.kl_k3.item() == pytest.approx(0.5)
    assert stats.ratio_min.item() == pytest.approx(0.5) and stats.ratio_max.item() == pytest.approx(2)
    assert all(value.ndim == 0 and not value.requires_grad for value in astuple(stats))


# ---- value


@pytest.mark.parametrize(
    "value, old, target, loss, gradient, held",
    [
        # clip 0.2. Within it: 0.5 * (1.1 - 2)^2 = 0.405, gradient v - R
        (1.1, 1.0, 2.0, 0.405, -0.9, False),
        # Moved far towards the return: clipped to 1.2, 0.5 * 0.64 = 0.32 > 0.5 * 0.01; no gradient
        (1.9, 1.0, 2.0, 0.32, 0.0, True),
        # Moved far away from it: the plain error is the larger, 0.5 * 2.25 = 1.125
        (0.5, 1.0, 2.0, 1.125, -1.5, False),
        # Overshot: plain 0.5 * 1 = 0.5, clipped (1.2) 0.5 * 0.64 = 0.32
        (3.0, 1.0, 2.0, 0.5, 1.0, False),
        # Downwards towards the return: clipped to 0.8, 0.5 * 0.64 = 0.32
        (0.1, 1.0, 0.0, 0.32, 0.0, True),
    ],
)
def test_value_clipping_in_every_case(value, old, target, loss, gradient, held):
    values = torch.tensor([value], requires_grad=True)
    got, clipped = value_loss(values, torch.tensor([old]), torch.tensor([target]), clip=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert clipped == float(held)


def test_a_value_that_moved_less_than_the_clip_is_not_counted_whatever_the_rounding():
    old, new = torch.full((1000,), 0.1), torch.linspace(-0.09, 0.29, 1000)
    assert (old + (new - old) != new).any(), "rounding is the point"
    _, held = value_loss(new, old, torch.full((1000,), 0.7))
    assert held == 0


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    loss, clipped = value_loss(torch.tensor([1.9]), torch.tensor([1.0]), torch.tensor([2.5]), clip=None)
    assert loss.item() == pytest.approx(0.18) and clipped == 0


def test_a_value_clip_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="clip must be above 0"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip=0.0)


# ---- importance weights


def test_importance_weights_are_ratios_cut_at_the_largest():
    # trainer / sampler: 0.3 / 0.2 = 1.5; 0.5 / 0.1 = 5, cut to 2; 0.1 / 0.4 = 0.25; padding
    # gaps: ln 1.5 = 0.4054651, ln 5 = 1.6094379, -ln 4 = -1.3862944; their sizes' mean is 1.1337325
    trainer = torch.tensor([[0.3, 0.5], [0.1, NAN]]).log()
    sampler = torch.tensor([[0.2, 0.1], [0.4, NAN]]).log()
    found = importance_weights(trainer, sampler, torch.tensor([[True, True], [True, False]]), most=2.0)
    torch.testing.assert_close(found.weights, torch.tensor([[1.5, 2.0], [0.25, 0.0]]))
    assert found.gap_mean.item() == pytest.approx(1.1337325, rel=1e-5)
    assert found.gap_max.item() == pytest.approx(1.6094379, rel=1e-5)
    assert found.truncated.item() == pytest.approx(1 / 3)


def test_importance_weights_of_equal_log_probs_are_exactly_one():
    logprobs = torch.tensor([[-0.7, -13.0]])
    found = importance_weights(logprobs, logprobs.clone(), torch.ones(1, 2, dtype=torch.bool), most=1.0)
    assert torch.equal(found.weights, torch.ones(1, 2))
    assert (found.gap_max, found.truncated) == (0, 0)


def test_a_largest_weight_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), ONE, most=0.9)
