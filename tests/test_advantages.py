"""Advantage estimators: hand-worked numbers, their definitions, and a contract that every row keeps."""

from __future__ import annotations

import pytest
import torch

from rlhf.ppo.advantages import ADVANTAGES, gae, grpo, reinforce_plus_plus, rloo
from rlhf.ppo.masked import masked_mean, masked_var

NAN = float("nan")
LENGTHS = torch.tensor([5, 1, 3, 4, 2, 5])
GROUPS = torch.tensor([7, 3, 7, 3, 7, 3])  # neither sorted nor counted from 0
EVERY_ROW = pytest.mark.parametrize("row", list(ADVANTAGES), ids=lambda row: row.name)


@pytest.fixture
def batch():
    """Rewards, values, mask and groups of six episodes in two groups, with NaN at padding."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < LENGTHS[:, None]
    rewards, values = torch.randn(2, 6, 5, generator=generator)
    return rewards.where(mask, NAN), values.where(mask, NAN), mask, GROUPS


# ---- GAE


def test_gae_matches_hand_numbers():
    # Episode 0: r = 0, 0, 1; V = 0.5, 0.6, 0.8. gamma 0.9, lam 0.5 (product 0.45), V after the last token 0.
    #   delta_2 = 1 - 0.8 = 0.2;                   A_2 = 0.2
    #   delta_1 = 0.9 * 0.8 - 0.6 = 0.12;          A_1 = 0.12 + 0.45 * 0.2 = 0.21
    #   delta_0 = 0.9 * 0.6 - 0.5 = 0.04;          A_0 = 0.04 + 0.45 * 0.21 = 0.1345
    # Episode 1, one token: r = -1, V = 0.3:       A_0 = -1.3
    rewards = torch.tensor([[0.0, 0.0, 1.0], [-1.0, NAN, NAN]])
    values = torch.tensor([[0.5, 0.6, 0.8], [0.3, NAN, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = gae(rewards, values, mask, torch.arange(2), gamma=0.9, lam=0.5, whiten=False)
    torch.testing.assert_close(found.advantages, torch.tensor([[0.1345, 0.21, 0.2], [-1.3, 0.0, 0.0]]))
    # returns = A + V
    torch.testing.assert_close(found.returns, torch.tensor([[0.6345, 0.81, 1.0], [-1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_equals_the_double_sum_of_schulman_equation_16(batch, gamma, lam):
    rewards, values, mask, groups = batch
    found = gae(rewards, values, mask, groups, gamma=gamma, lam=lam, whiten=False).advantages
    for n, length in enumerate(LENGTHS.tolist()):
        r, v = rewards[n].tolist(), [*values[n, :length].tolist(), 0.0]
        for t in range(length):
            terms = [(gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, length)]
            assert found[n, t].item() == pytest.approx(sum(terms), abs=1e-5)


def test_gae_with_lam_1_is_the_discounted_return_minus_the_value(batch):
    rewards, values, mask, groups = batch
    found = gae(rewards, values, mask, groups, gamma=0.9, lam=1.0, whiten=False)
    for n, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            to_go = sum(0.9 ** (s - t) * rewards[n, s].item() for s in range(t, length))
            assert found.returns[n, t].item() == pytest.approx(to_go, abs=1e-5)
            assert found.advantages[n, t].item() == pytest.approx(to_go - values[n, t].item(), abs=1e-5)


def test_gae_with_lam_0_is_the_one_step_td_error(batch):
    rewards, values, mask, groups = batch
    found = gae(rewards, values, mask, groups, gamma=0.9, lam=0.0, whiten=False).advantages
    following = torch.cat([values[:, 1:].nan_to_num(0), torch.zeros(6, 1)], dim=1)
    torch.testing.assert_close(found, (rewards + 0.9 * following - values).where(mask, 0.0))


def test_gae_with_gamma_0_sees_only_the_present_reward(batch):
    rewards, values, mask, groups = batch
    found = gae(rewards, values, mask, groups, gamma=0.0, whiten=False)
    torch.testing.assert_close(found.returns, rewards.where(mask, 0.0))


def test_gae_whitens_the_advantages_and_not_the_returns(batch):
    raw, white = gae(*batch, whiten=False), gae(*batch)
    mask = batch[2]
    torch.testing.assert_close(white.returns, raw.returns)
    torch.testing.assert_close(masked_mean(white.advantages, mask), torch.tensor(0.0))
    torch.testing.assert_close(masked_var(white.advantages, mask), torch.tensor(1.0))


def test_gae_without_values_is_refused(batch):
    rewards, _, mask, groups = batch
    with pytest.raises(ValueError, match="critic's values"):
        gae(rewards, None, mask, groups)


# ---- estimators with a baseline from the group


def test_rloo_matches_hand_numbers():
    # Totals 1, 2, 6 of one prompt: others' means 4, 3.5, 1.5; advantages -3, -1.5, 4.5.
    rewards = torch.tensor([[0.5, 0.5], [2.0, NAN], [-1.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    found = rloo(rewards, None, mask, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found.advantages, torch.tensor([[-3.0, -3.0], [-1.5, 0.0], [4.5, 4.5]]))


def test_rloo_is_the_total_minus_the_mean_of_the_others(batch):
    rewards, _, mask, groups = batch
    totals = rewards.where(mask, 0.0).sum(1)
    found = rloo(*batch).advantages
    for i in range(6):
        others = [totals[j].item() for j in range(6) if j != i and groups[j] == groups[i]]
        assert found[i, 0].item() == pytest.approx(totals[i].item() - sum(others) / len(others), abs=1e-5)


def test_grpo_matches_hand_numbers():
    # Totals 1, 2, 6: mean 3, deviations -2, -1, 3, sample variance 14 / 2 = 7, std 2.6457513 (+ 1e-4).
    rewards = torch.tensor([[0.5, 0.5], [2.0, NAN], [-1.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    groups = torch.zeros(3, dtype=torch.int64)
    expected = torch.tensor([[-2.0, -2.0], [-1.0, 0.0], [3.0, 3.0]])
    torch.testing.assert_close(grpo(rewards, None, mask, groups).advantages, expected / 2.6458513)
    torch.testing.assert_close(grpo(rewards, None, mask, groups, normalize_std=False).advantages, expected)


def test_grpo_has_mean_0_and_std_1_in_every_group(batch):
    rewards, _, mask, groups = batch
    per_episode = grpo(1000 * rewards, None, mask, groups).advantages[:, 0]
    for group in (3, 7):
        assert per_episode[groups == group].mean().item() == pytest.approx(0, abs=1e-5)
        assert per_episode[groups == group].std().item() == pytest.approx(1, abs=1e-5)


def test_grpo_gives_nearly_nothing_to_answers_that_differ_by_rounding():
    rewards = torch.tensor([[0.1], [0.1 + 3e-8], [0.1]])
    found = grpo(rewards, None, torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
    assert found.advantages.abs().max() < 1e-3


@EVERY_ROW
def test_groups_smaller_than_a_row_can_use_are_refused_by_name(row, batch):
    rewards, values, mask, _ = batch
    alone = torch.tensor([7, 3, 7, 3, 7, 99])
    if row.traits["min_group"] == 1:
        row.fn(rewards, values, mask, alone)
    else:
        with pytest.raises(ValueError, match="group 99 holds 1 completion"):
            row.fn(rewards, values, mask, alone)


# ---- REINFORCE++


def test_reinforce_plus_plus_matches_hand_numbers():
    # Rewards to go with gamma 0.5. Episode 0, r = 1, 2, 4: 4; 2 + 2 = 4; 1 + 2 = 3. Episode 1, r = -3: -3.
    # 3, 4, 4, -3: mean 2, deviations 1, 2, 2, -5, variance 34 / 4 = 8.5, std 2.9154759.
    rewards = torch.tensor([[1.0, 2.0, 4.0], [-3.0, NAN, 5.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = reinforce_plus_plus(rewards, None, mask, torch.arange(2), gamma=0.5).advantages
    expected = torch.tensor([[1.0, 2.0, 2.0], [-5.0, 0.0, 0.0]]) / 2.9154759
    torch.testing.assert_close(found, expected)


def test_reinforce_plus_plus_is_normalised_over_the_whole_batch_not_the_group(batch):
    rewards, _, mask, groups = batch
    shifted = rewards + 10.0 * (groups == 7)[:, None]
    found = reinforce_plus_plus(shifted, None, mask, groups).advantages
    torch.testing.assert_close(masked_mean(found, mask), torch.tensor(0.0))
    torch.testing.assert_close(masked_var(found, mask), torch.tensor(1.0))
    assert masked_mean(found[groups == 7], mask[groups == 7]) > 0.3


# ---- the contract of every row


@EVERY_ROW
def test_every_row_returns_finite_tensors_of_the_batch_with_zeros_at_padding(row, batch):
    mask = batch[2]
    found = row.fn(*batch)
    assert (found.returns is not None) == row.traits["needs_critic"]
    for tensor in (found.advantages, found.returns):
        if tensor is not None:
            assert tensor.shape == (6, 5) and tensor.dtype == torch.float32
            assert tensor.isfinite().all() and (tensor[mask.logical_not()] == 0).all()
    assert found.advantages.abs().max() > 0


@EVERY_ROW
def test_every_row_takes_completions_of_a_single_token(row, batch):
    rewards, values, mask, groups = batch
    found = row.fn(rewards[:, :1], values[:, :1], mask[:, :1], groups).advantages
    assert found.shape == (6, 1) and found.isfinite().all() and found.abs().max() > 0


@pytest.mark.parametrize("estimate", [gae, reinforce_plus_plus])
def test_what_sums_over_later_tokens_refuses_padding_before_a_token(estimate, batch):
    rewards, values, mask, groups = batch
    with pytest.raises(ValueError, match="padding on the right"):
        estimate(rewards, values, mask.flip(1), groups)


@EVERY_ROW
def test_every_row_declares_its_traits_and_works_without_values_where_it_needs_none(row, batch):
    assert isinstance(row.traits["needs_critic"], bool) and row.traits["min_group"] >= 1
    rewards, values, mask, groups = batch
    if not row.traits["needs_critic"]:
        without = row.fn(rewards, None, mask, groups)
        torch.testing.assert_close(without.advantages, row.fn(rewards, values, mask, groups).advantages)


@EVERY_ROW
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e30])
def test_every_row_ignores_what_stands_in_appended_padding(row, batch, garbage):
    rewards, values, mask, groups = batch
    columns = torch.full((6, 3), garbage)
    wider_mask = torch.cat([mask, torch.zeros(6, 3, dtype=torch.bool)], dim=1)
    wide = row.fn(torch.cat([rewards, columns], 1), torch.cat([values, columns], 1), wider_mask, groups)
    found = row.fn(*batch)
    torch.testing.assert_close(wide.advantages[:, :5], found.advantages)
    assert (wide.advantages[:, 5:] == 0).all()
    if found.returns is not None:
        torch.testing.assert_close(wide.returns[:, :5], found.returns)


@EVERY_ROW
def test_every_row_follows_a_permutation_of_the_episodes(row, batch):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = row.fn(*(tensor[order] for tensor in batch))
    torch.testing.assert_close(permuted.advantages, row.fn(*batch).advantages[order])


@EVERY_ROW
def test_every_row_ignores_how_the_groups_are_numbered(row, batch):
    rewards, values, mask, groups = batch
    renamed = torch.where(groups == 7, -4, 10**12)
    torch.testing.assert_close(row.fn(rewards, values, mask, renamed).advantages, row.fn(*batch).advantages)


@EVERY_ROW
def test_every_row_leaves_its_inputs_alone(row, batch):
    before = [tensor.clone() for tensor in batch]
    row.fn(*batch)
    for tensor, copy in zip(batch, before):
        assert torch.equal(tensor.nan_to_num(0), copy.nan_to_num(0))


@pytest.mark.parametrize(
    "spec",
    [{"name": "gae", "lam": 1.5}, {"name": "gae", "gamma": -0.1}, {"name": "reinforce++", "gamma": 2}, "gea"],
)
def test_unknown_rows_and_options_out_of_range_are_refused(spec):
    with pytest.raises(ValueError, match="advantage estimator"):
        ADVANTAGES.pick(spec)
