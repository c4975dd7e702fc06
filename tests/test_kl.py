"""KL estimators, controllers, scores and rewards, against hand-worked numbers and exact distributions."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from rlhf.ppo.kl import (
    KL_CONTROLLERS,
    KL_ESTIMATORS,
    MISSING_EOS,
    AdaptiveKL,
    FixedKL,
    k1,
    k2,
    k3,
    shape_rewards,
    shape_scores,
)

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])


def rows(table):
    return pytest.mark.parametrize("row", list(table), ids=lambda row: row.name)


# ---- estimators


def test_estimators_match_hand_numbers():
    # Policy 0.5, reference 0.25: r = 0.5, log r = -ln 2 = -0.6931472.
    # k1 = 0.6931472; k2 = 0.6931472^2 / 2 = 0.2402265; k3 = (0.5 - 1) + 0.6931472 = 0.1931472
    policy, reference = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert k1(policy, reference).item() == pytest.approx(0.6931472)
    assert k2(policy, reference).item() == pytest.approx(0.2402265)
    assert k3(policy, reference).item() == pytest.approx(0.1931472)


def test_k1_and_k3_are_unbiased_and_k2_is_close():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.6, 0.25, 0.15])
    exact = (policy * (policy / reference).log()).sum().item()

    def expected(estimator):
        return (policy * estimator(policy.log(), reference.log())).sum().item()

    assert expected(k1) == pytest.approx(exact, rel=1e-5)
    assert expected(k3) == pytest.approx(exact, rel=1e-5)
    assert expected(k2) == pytest.approx(exact, rel=0.2) and expected(k2) != pytest.approx(exact, rel=1e-3)


def test_k3_keeps_its_digits_for_nearly_equal_policies():
    # k3 = x^2 / 2 + ... for log r = x: 5e-9 at x = 1e-4, where exp(x) - 1 - x in float32 is only rounding.
    assert k3(torch.zeros(1), torch.full((1,), 1e-4)).item() == pytest.approx(5e-9, rel=0.05)


def test_k3_counts_a_log_ratio_above_20_as_20():
    # e^20 - 1 - 20 = 485165174.4; log r = 30 would be 1.07e13, and 100 overflow.
    assert k3(torch.zeros(2), torch.tensor([30.0, 100.0])).tolist() == pytest.approx([485165174.4] * 2)


@rows(KL_ESTIMATORS)
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_every_estimator_is_finite_for_policies_far_from_each_other(row, log_ratio):
    estimate = row.fn(torch.tensor([[-1000.0]]), torch.tensor([[-1000.0 + log_ratio]]))
    assert torch.isfinite(estimate).all() and torch.isfinite(estimate.var(correction=0))


@rows(KL_ESTIMATORS)
def test_every_estimator_is_elementwise_and_zero_for_equal_policies(row):
    logprobs, reference = -torch.rand(3, 4) - 0.1, -torch.rand(3, 4) - 0.1
    estimate = row.fn(logprobs, reference)
    assert estimate.shape == (3, 4) and estimate.dtype == torch.float32
    torch.testing.assert_close(row.fn(logprobs[:, 1:], reference[:, 1:]), estimate[:, 1:])
    assert row.fn(logprobs, logprobs).abs().max() == 0
    if row.name != "k1":
        assert (estimate >= 0).all()


# ---- controllers


def test_adaptive_controller_matches_hand_numbers():
    controller = AdaptiveKL(init_coef=0.1, target=6.0, horizon=1000)
    # kl 6.6: error 0.1, 100 episodes: factor 1 + 0.1 * 0.1 = 1.01
    controller.update(6.6, 100)
    assert controller.coef == pytest.approx(0.101)
    # kl 60: error 9 clipped to 0.2: factor 1.02
    controller.update(60.0, 100)
    assert controller.coef == pytest.approx(0.10302)
    # kl -1: error clipped to -0.2: factor 0.98
    controller.update(-1.0, 100)
    assert controller.coef == pytest.approx(0.1009596)
    controller.update(6.0, 100)
    assert controller.coef == pytest.approx(0.1009596)


def test_adaptive_controller_stays_positive_when_a_batch_exceeds_the_horizon():
    controller = AdaptiveKL(init_coef=0.1, target=6.0, horizon=10)
    controller.update(0.0, 1000)
    assert controller.coef == pytest.approx(0.08)


def test_adaptive_controller_steers_a_simulated_kl_to_its_target():
    controller = AdaptiveKL(init_coef=1.0, target=6.0, horizon=1000)
    kl = 0.0
    for _ in range(500):
        kl = 1.2 / controller.coef  # a stronger penalty, a smaller KL
        controller.update(kl, 64)
    assert kl == pytest.approx(6.0, rel=0.01)


def test_fixed_controller_never_moves():
    controller = FixedKL(coef=0.05)
    controller.update(100.0, 512)
    assert controller.coef == 0.05


@rows(KL_CONTROLLERS)
def test_every_controller_continues_exactly_from_its_state(row):
    first, second = row.fn(), row.fn()
    first.update(9.0, 100)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(3.0, 100)
    assert first.coef == second.coef


@rows(KL_CONTROLLERS)
@pytest.mark.parametrize("kl", [NAN, math.inf])
def test_every_controller_refuses_a_kl_that_is_not_finite_and_keeps_its_coefficient(row, kl):
    controller = row.fn()
    before = controller.coef
    with pytest.raises(ValueError, match="KL coefficient"):
        controller.update(kl, 8)
    assert controller.coef == before


def test_the_state_of_another_kind_of_controller_is_refused():
    with pytest.raises(ValueError, match="another kind"):
        FixedKL().load_state_dict(AdaptiveKL().state_dict())
    with pytest.raises(ValueError, match="another kind"):
        AdaptiveKL().load_state_dict(FixedKL().state_dict())


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "fixed", "coef": -0.1},
        {"name": "fixed", "coef": NAN},
        {"name": "adaptive", "target": 0},
        {"name": "adaptive", "horizon": 0},
        {"name": "adaptive", "init_coef": 0},
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ValueError, match="KL controller"):
        KL_CONTROLLERS.pick(spec)


# ---- scores


def test_scores_are_normalised_then_clipped():
    # (s - 1) / 2 for 1, 4, -9, 11: 0, 1.5, -5, 5; clipped to 3
    scores = torch.tensor([1.0, 4.0, -9.0, 11.0])
    ended = torch.ones(4, dtype=torch.bool)
    assert shape_scores(scores, ended, mean=1.0, std=2.0).tolist() == [0, 1.5, -5, 5]
    assert shape_scores(scores, ended, mean=1.0, std=2.0, clip=3.0).tolist() == [0, 1.5, -3, 3]


def test_a_clip_may_be_below_one_deviation():
    scores = shape_scores(torch.tensor([-2.0, 0.25, 2.0]), torch.ones(3, dtype=torch.bool), clip=0.5)
    assert scores.tolist() == [-0.5, 0.25, 0.5]


def test_without_options_the_rules_give_minus_one_and_subtract_one():
    scores, ended = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    assert MISSING_EOS.pick("score")(scores, ended).tolist() == [3.0, -1.0]
    assert MISSING_EOS.pick("penalty")(scores, ended).tolist() == [3.0, 2.0]


def test_answers_without_eos_are_treated_by_the_chosen_rule_after_the_clip():
    scores, ended = torch.tensor([2.0, 9.0, 9.0]), torch.tensor([True, True, False])

    def shaped(spec):
        return shape_scores(scores, ended, clip=5.0, missing_eos=MISSING_EOS.pick(spec)).tolist()

    assert shaped("keep") == [2, 5, 5]
    assert shaped({"name": "score", "value": -10}) == [2, 5, -10]
    assert shaped({"name": "penalty", "value": 1.5}) == [2, 5, 3.5]


@rows(MISSING_EOS)
def test_every_rule_leaves_answers_that_ended_alone(row):
    scores = torch.tensor([0.5, -2.0])
    assert row.fn(scores, torch.tensor([True, True])).tolist() == [0.5, -2.0]
    assert row.fn(scores, torch.tensor([True, False])).shape == (2,)


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"std": NAN}, {"clip": 0.0}, {"clip": -1.0}])
def test_a_scale_or_clip_that_is_not_positive_is_refused(wrong):
    with pytest.raises(ValueError, match="above 0"):
        shape_scores(torch.zeros(1), torch.ones(1, dtype=torch.bool), **wrong)


# ---- rewards


def test_rewards_are_the_penalty_at_every_token_and_the_score_at_the_last():
    scores = torch.tensor([2.0, -1.0])
    kl = torch.tensor([[1.0, -2.0, 0.5], [3.0, NAN, 7.0]])
    # -0.1 * kl, plus the score in column 2 of the first episode and column 0 of the second
    expected = torch.tensor([[-0.1, 0.2, 1.95], [-1.3, 0.0, 0.0]])
    torch.testing.assert_close(shape_rewards(scores, kl, MASK, 0.1), expected)


def test_rewards_scaled_have_deviation_one_and_the_same_mean():
    # The rewards that count, with coef 0: 0, 0, 4, -2: mean 0.5, variance (0.25 + 0.25 + 12.25 + 6.25) / 4 = 4.75.
    # (r - 0.5) / 2.1794495 + 0.5: 0.2705843, 0.2705843, 2.1059101, -0.6470786
    rewards = shape_rewards(torch.tensor([4.0, -2.0]), torch.zeros(2, 3), MASK, 0.0, scale=True)
    expected = torch.tensor([[0.2705843, 0.2705843, 2.1059101], [-0.6470786, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_the_sum_of_rewards_is_ziegler_equation_2():
    scores, kl = torch.randn(5), torch.randn(5, 7)
    mask = torch.arange(7) < torch.tensor([1, 7, 3, 4, 6])[:, None]
    total = shape_rewards(scores, kl, mask, 0.3).sum(1)
    torch.testing.assert_close(total, scores - 0.3 * (kl * mask).sum(1))


def test_rewards_do_not_see_padding_columns():
    scores, kl = torch.tensor([2.0, -1.0]), torch.randn(2, 3)
    wider = torch.cat([kl, torch.full((2, 2), NAN)], dim=1)
    wider_mask = torch.cat([MASK, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    for scale in (False, True):
        got = shape_rewards(scores, wider, wider_mask, 0.1, scale=scale)
        torch.testing.assert_close(got[:, :3], shape_rewards(scores, kl, MASK, 0.1, scale=scale))
        assert (got[:, 3:] == 0).all()


def test_an_answer_without_tokens_has_no_place_for_its_score_and_is_refused():
    with pytest.raises(ValueError, match="at least one response token"):
        shape_rewards(torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), 0.1)


def test_options_can_be_checked_without_importing_torch():
    code = (
        "import sys, rlhf.ppo.kl, rlhf.ppo.advantages, rlhf.ppo.losses\n"
        "rlhf.ppo.kl.KL_CONTROLLERS.pick({'name': 'adaptive', 'target': 3})\n"
        "rlhf.ppo.advantages.ADVANTAGES.pick({'name': 'gae', 'lam': 0.9})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
