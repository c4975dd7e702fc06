"""Advantage estimators: how much better each sampled token was than expected.

`rlhf.ppo.masked` describes shapes and the mask. Every row takes the same four tensors and returns `Advantages`:

- rewards: float32 [N, T], from `rlhf.ppo.kl.shape_rewards`: they already contain the KL penalty. (Shao
  2024 puts GRPO's penalty into the loss instead; here GRPO too sees the shaped rewards, as RLOO and REINFORCE++ do.)
- values: the critic's float32 [N, T] before the update, values[:, t] for the state in which token t was chosen; None
  for the rows that need no critic.
- response_mask: bool [N, T].
- groups: int64 [N], equal for the completions of one draw of a prompt.

The end of a completion is terminal: the value after its last token is 0, whether it ended by EOS or by length.

Traits of a row: `needs_critic`, and `min_group`, the fewest completions per prompt that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.config.base import Fraction
from rlhf.core.lazy import lazy
from rlhf.core.table import Table
from rlhf.ppo import masked

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


ADVANTAGES = Table("advantage estimator")


@dataclass(frozen=True)
class Advantages:
    """What the update needs from the rewards.

    `advantages` weights each token's policy gradient, float32 [N, T]; `returns` is the critic's target, float32
    [N, T], or None where there is no critic. Both are 0 at padding.
    """

    advantages: Tensor
    returns: Tensor | None


@ADVANTAGES.row("gae", needs_critic=True, min_group=1)
def gae(
    rewards: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    groups: Tensor,
    *,
    gamma: Fraction = 1.0,
    lam: Fraction = 0.95,
    whiten: bool = True,
) -> Advantages:
    """Generalised advantage estimation with a critic; with `whiten` the advantages have mean 0 and std 1.

    Schulman 2015 (arXiv:1506.02438) eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l}, with
    delta_t = r_t + gamma V_{t+1} - V_t; PPO (arXiv:1707.06347) eq. 11-12. Returns are A + V before whitening, and
    whitening is over all tokens of the batch, as in openai/lm-human-preferences@cbfd210
    lm_human_preferences/train_policy.py:327-338.

    Raises:
        ValueError: No values, or a mask that is not padded on the right only.
    """
    if values is None:
        raise ValueError("gae needs the critic's values")
    masked.completion_lengths(response_mask)
    rewards, values = masked.zero_padding(rewards, response_mask), masked.zero_padding(values, response_mask)
    # Zeros at padding make the value after the last token 0 and keep every term beyond it at 0.
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages = _discounted_sum(rewards + gamma * next_values - values, gamma * lam)
    returns = advantages + values
    return Advantages(masked.whiten(advantages, response_mask, shift_mean=True) if whiten else advantages, returns)


@ADVANTAGES.row("rloo", needs_critic=False, min_group=2)
def rloo(rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor) -> Advantages:
    """Total reward minus the mean total of the prompt's other completions, the same at every token. No critic.

    Ahmadian 2024 (arXiv:2402.14740), the RLOO estimator: A_i = R_i - sum_{j != i} R_j / (k - 1), with R the score
    minus the KL penalty over the whole completion. That paper treats the completion as one action; here each token has
    A_i and PPO's ratio is per token, which is the same gradient while the ratio is 1.

    Raises:
        ValueError: A group of one.
    """
    member = _membership(groups, at_least=2)
    total = masked.masked_sum(rewards, response_mask, dim=1)
    others = (_group_sum(total, member) - total) / (_group_size(member) - 1)
    return Advantages(_at_every_token(total - others, response_mask), None)


@ADVANTAGES.row("grpo", needs_critic=False, min_group=2)
def grpo(
    rewards: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    groups: Tensor,
    *,
    normalize_std: bool = True,
) -> Advantages:
    """Total reward normalised within the prompt's completions, the same at every token. No critic.

    Shao 2024 (arXiv:2402.03300) section 4.1.2, outcome supervision: A_i = (R_i - mean(R)) / std(R). The paper does not
    say which std; this is the sample one (divisor k - 1) plus 1e-4, as in huggingface/trl v1.16.0
    trl/trainer/grpo_trainer.py:2770-2787. `normalize_std=False` only subtracts the mean, as Liu 2025 ("Dr. GRPO",
    arXiv:2503.20783) argues for.

    Raises:
        ValueError: A group of one.
    """
    member = _membership(groups, at_least=2)
    size = _group_size(member)
    total = masked.masked_sum(rewards, response_mask, dim=1)
    centred = total - _group_sum(total, member) / size
    if normalize_std:
        std = (_group_sum(centred**2, member) / (size - 1)).sqrt()
        # 1e-4, not less: completions that differ only by rounding must not get advantages of size 1.
        centred = centred / (std + 1e-4)
    return Advantages(_at_every_token(centred, response_mask), None)


@ADVANTAGES.row("reinforce++", needs_critic=False, min_group=1)
def reinforce_plus_plus(
    rewards: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    groups: Tensor,
    *,
    gamma: Fraction = 1.0,
) -> Advantages:
    """Discounted reward from each token on, normalised over all tokens of the batch. No critic, no groups.

    Hu 2025 (arXiv:2501.03262): A_t = score - beta * sum_{i >= t} KL_i (the sum of the shaped rewards from t on; its
    gamma is 1), then (A - mean) / std over the global batch. The paper's second variant, with a baseline from the
    prompt's completions, is not implemented.

    Raises:
        ValueError: A mask that is not padded on the right only.
    """
    masked.completion_lengths(response_mask)
    to_go = _discounted_sum(masked.zero_padding(rewards, response_mask), gamma)
    return Advantages(masked.whiten(to_go, response_mask, shift_mean=True), None)


# ---- shared by the rows ------------------------------------------------------------------------------------------


def _discounted_sum(terms: Tensor, discount: float) -> Tensor:
    """sum over l >= 0 of discount^l * terms[:, t + l], for every t: [N, T] -> [N, T]."""
    running = torch.zeros_like(terms[:, 0])
    columns = []
    for t in reversed(range(terms.shape[1])):
        running = terms[:, t] + discount * running
        columns.append(running)
    return torch.stack(columns[::-1], dim=1)


def _membership(groups: Tensor, at_least: int) -> Tensor:
    """bool [N, G]: which of the G groups each episode belongs to. Refuses groups of fewer than `at_least`."""
    names, counts = torch.unique(groups, return_counts=True)
    if counts.min() < at_least:
        small = int(counts.argmin())
        raise ValueError(
            f"group {int(names[small])} holds {int(counts[small])} completion, and a baseline from the group needs at "
            f"least {at_least}: sample more completions per prompt"
        )
    return groups[:, None] == names


def _group_sum(values: Tensor, member: Tensor) -> Tensor:
    """For every episode, the sum of `values` [N] over its group. Not scatter_add, whose order varies on a GPU."""
    sums = torch.where(member, values[:, None], 0.0).sum(0)
    return torch.where(member, sums, 0.0).sum(1)


def _group_size(member: Tensor) -> Tensor:
    """For every episode, the size of its group, int64 [N]."""
    return (member * member.sum(0)).sum(1)


def _at_every_token(per_episode: Tensor, response_mask: Tensor) -> Tensor:
    return torch.where(response_mask, per_episode[:, None], 0.0)
