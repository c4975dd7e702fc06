"""PPO's losses, per token, and the figures that are logged beside them.

Shapes and the one mask are as `rlhf.ppo.masked` says. A batch may be cut into micro-batches and ranks: the losses are
per token, so `normalised` divides by the token count of the whole minibatch, and the statistics are sums and extremes
that add up (`a + b`) and are divided once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.core.lazy import lazy
from rlhf.ppo.kl import k1, k3
from rlhf.ppo.masked import masked_sum, masked_var, zero_padding

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class PolicyStats:
    """Sums over response tokens, and extremes. All are float32, 0-d, without gradient.

    Added over micro-batches with `+`. Across ranks the first four are reduced by sum, `ratio_min` by min and
    `ratio_max` by max; then the first four divided by `tokens` are means.
    """

    tokens: Tensor
    """How many response tokens."""
    clipped: Tensor
    """How many of them have no gradient because the clipping holds them."""
    kl_k1: Tensor
    """Sum of the k1 estimates of KL(old policy || policy), nats."""
    kl_k3: Tensor
    """The same by k3."""
    ratio_min: Tensor
    """Smallest probability ratio policy / old policy; +inf where there is no token."""
    ratio_max: Tensor
    """Largest; -inf where there is no token."""

    def __add__(self, other: PolicyStats) -> PolicyStats:
        return PolicyStats(
            self.tokens + other.tokens,
            self.clipped + other.clipped,
            self.kl_k1 + other.kl_k1,
            self.kl_k3 + other.kl_k3,
            torch.minimum(self.ratio_min, other.ratio_min),
            torch.maximum(self.ratio_max, other.ratio_max),
        )


@dataclass(frozen=True)
class ValueStats:
    """Sums over response tokens, float32, 0-d, without gradient; added with `+` and across ranks."""

    tokens: Tensor
    """How many response tokens."""
    clipped: Tensor
    """How many of them take the clipped branch of the value loss."""

    def __add__(self, other: ValueStats) -> ValueStats:
        return ValueStats(self.tokens + other.tokens, self.clipped + other.clipped)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped surrogate, as a loss to minimise.

    PPO (Schulman 2017, arXiv:1707.06347) eq. 7: -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), with
    ratio = exp(logprobs - old_logprobs); openai/lm-human-preferences@cbfd210
    lm_human_preferences/train_policy.py:351-355. Bounds that differ are DAPO's Clip-Higher (Yu 2025, arXiv:2503.14476,
    section 3.1). `dual_clip` is Ye 2020 (arXiv:1912.09729) eq. 5: where A < 0 the objective is not let below
    dual_clip * A, however large the ratio.

    Args:
        logprobs: Of the sampled tokens under the policy that is trained, at the sampling temperature, nats, [N, T];
            the only argument with a gradient.
        old_logprobs: The same before the update, [N, T].
        advantages: [N, T].
        response_mask: bool [N, T].
        clip_low: The ratio is held above 1 - clip_low, for A < 0.
        clip_high: The ratio is held below 1 + clip_high, for A > 0.
        dual_clip: The constant c > 1, or None.

    Returns:
        Loss per token, float32 [N, T], 0 at padding; and its statistics.

    Raises:
        ValueError: `dual_clip` is not above 1.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}: at or below 1 it would cut ordinary gradients")
    advantages = zero_padding(advantages, response_mask)
    # Before exp, not after: the gradient of exp at garbage would be NaN even where the result is not selected.
    log_ratio = zero_padding(logprobs - old_logprobs, response_mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    held = clipped > unclipped
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        capped = (advantages < 0) & (loss > ceiling)
        loss, held = torch.where(capped, ceiling, loss), held | capped
    return loss, _policy_stats(log_ratio.detach(), ratio.detach(), held, response_mask)


def _policy_stats(log_ratio: Tensor, ratio: Tensor, held: Tensor, mask: Tensor) -> PolicyStats:
    old = torch.zeros_like(log_ratio)  # the estimators see the difference of the two alone
    # A filler, which a rank gets that has fewer micro-batches than the others, has no token at all: [1, 0].
    none = ratio.new_full((1,), torch.inf)
    return PolicyStats(
        tokens=mask.sum().float(),
        clipped=(held & mask).sum().float(),
        kl_k1=masked_sum(k1(old, log_ratio), mask),
        kl_k3=masked_sum(k3(old, log_ratio), mask),
        ratio_min=torch.cat([torch.where(mask, ratio, torch.inf).flatten(), none]).amin(),
        ratio_max=torch.cat([torch.where(mask, ratio, -torch.inf).flatten(), -none]).amax(),
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip: float | None = 0.2,
) -> tuple[Tensor, ValueStats]:
    """The critic's squared error, 0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the old V.

    openai/lm-human-preferences@cbfd210 lm_human_preferences/train_policy.py:344-348; "The N Implementation Details of
    RLHF with PPO". The clip is in units of reward.

    Args:
        values: The critic that is trained, [N, T]; the only argument with a gradient.
        old_values: The same before the update, [N, T].
        returns: What to predict, [N, T].
        response_mask: bool [N, T].
        clip: How far a value may move from its old one, or None for the plain squared error.

    Returns:
        Loss per token, float32 [N, T], 0 at padding; and its statistics.

    Raises:
        ValueError: `clip` is not above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clipping; got {clip}")
    values, old_values, returns = (zero_padding(t, response_mask) for t in (values, old_values, returns))
    error = (values - returns) ** 2
    held = torch.zeros_like(response_mask)
    if clip is not None:
        clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
        held = clipped > error
        error = torch.maximum(error, clipped)
    return 0.5 * error, ValueStats(response_mask.sum().float(), (held & response_mask).sum().float())


@dataclass(frozen=True)
class Importance:
    """How far the sampler's log-probs lie from the trainer's, and the weights that follow. float32."""

    weights: Tensor
    """[N, T], 0 at padding."""
    gap_mean: Tensor
    """Mean distance of the two log-probs over response tokens, nats, 0-d."""
    gap_max: Tensor
    """The largest, 0-d."""
    truncated: Tensor
    """Share of response tokens whose weight is cut, 0-d."""


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, response_mask: Tensor, most: float) -> Importance:
    """Truncated importance weights, min(exp(logprobs - sampler_logprobs), most), for each token's policy loss.

    A sampler with other kernels or in another precision draws from a policy that differs a little from the trainer's:
    the data is off-policy. Yao 2025 ("Your efficient RL framework secretly brings you off-policy RL training", TIS)
    weighs the gradient by the truncated ratio of the two; the truncation, which bounds the variance, is V-trace's rho
    (Espeholt 2018, arXiv:1802.01561, eq. 1). Both log-probs are of the whole distribution at the sampling temperature.

    Args:
        logprobs: Of the sampled tokens before the update, recomputed by the trainer, [N, T].
        sampler_logprobs: The same as the sampler saw them, [N, T].
        response_mask: bool [N, T].
        most: The largest weight.

    Raises:
        ValueError: `most` is below 1: it would cut tokens on which the two agree.
    """
    if not most >= 1:
        raise ValueError(f"the largest importance weight must be at least 1, got {most}")
    gap = zero_padding(logprobs, response_mask) - zero_padding(sampler_logprobs, response_mask)
    ratio, tokens = gap.exp(), response_mask.sum()
    return Importance(
        weights=ratio.clamp(max=most) * response_mask,
        gap_mean=gap.abs().sum() / tokens,
        gap_max=gap.abs().amax(),
        truncated=((ratio > most) & response_mask).sum() / tokens,
    )


def normalised(per_token: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """The sum of `per_token` over the tokens that count, divided by a count given from outside, 0-d.

    With the number of response tokens in the whole minibatch, over micro-batches and ranks, as the denominator the
    parts add up to the token mean: every token weighs the same (DAPO section 3.3). The mean over episodes of each
    answer's own mean, in which the tokens of short answers weigh more (Shao 2024 eq. 3), is not built.

    Args:
        per_token: [N, T].
        mask: bool [N, T].
        denominator: The count, above 0. Where gradients are averaged over ranks (DDP, DeepSpeed), the count divided by
            the world size.

    Raises:
        ValueError: The denominator is not above 0.
    """
    if not denominator > 0:
        raise ValueError(f"cannot normalise a loss by {float(denominator)} tokens")
    return masked_sum(per_token, mask) / denominator


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), 0-d: 1 = perfect, 0 = no better than a constant, below 0 = worse.

    As OpenAI Baselines defines it (baselines/common/math_util.py, `explained_variance`): a constant offset does not
    count. NaN where the returns do not vary.

    Args:
        values: The critic's predictions, [N, T].
        returns: What came, [N, T].
        mask: bool [N, T].
    """
    spread = masked_var(returns, mask)
    return torch.where(spread > 0, 1 - masked_var(returns - values, mask) / spread, torch.nan)
