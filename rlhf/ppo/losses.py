"""PPO's losses per token, importance weights, and the metrics of both.

The losses take flat tensors [n] of response tokens only, without padding. A minibatch may be cut into
micro-batches and ranks: the caller divides the sum of the losses by the token count of the whole minibatch, so every
token has the same weight (DAPO, arXiv:2503.14476, section 3.3); the statistics are sums and extremes that add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.core.lazy import lazy
from rlhf.ppo.kl import k1, k3
from rlhf.ppo.masked import zero_padding

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class PolicyStats:
    """Sums and extremes over the response tokens of a micro-batch, float32, 0-d, without gradient."""

    clipped: Tensor
    """Number of tokens without a gradient because of the clipping."""
    kl_k1: Tensor
    """Sum of the k1 estimates of KL(old policy || policy), nats."""
    kl_k3: Tensor
    """Sum of the k3 estimates."""
    ratio_min: Tensor
    """Smallest probability ratio policy / old policy; +inf without tokens."""
    ratio_max: Tensor
    """Largest ratio; -inf without tokens."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped surrogate, as a loss to minimise.

    PPO (Schulman 2017, arXiv:1707.06347) eq. 7: -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), with
    ratio = exp(logprobs - old_logprobs); openai/lm-human-preferences@cbfd210
    lm_human_preferences/train_policy.py:351-355. Different bounds are DAPO's Clip-Higher (Yu 2025, arXiv:2503.14476,
    section 3.1). `dual_clip` is Ye 2020 (arXiv:1912.09729) eq. 5: where A < 0 the objective is at least dual_clip * A,
    however large the ratio is. Clipped tokens, and those with A = 0, have gradient 0 at any ratio.

    Args:
        logprobs: Log-probs of the sampled tokens under the policy that is trained, at the sampling temperature, nats,
            [n]; the only argument with a gradient.
        old_logprobs: The same before the update, [n].
        advantages: [n].
        clip_low: The ratio is bounded below by 1 - clip_low, for A < 0.
        clip_high: The ratio is bounded above by 1 + clip_high, for A > 0.
        dual_clip: The constant c > 1, or None.

    Returns:
        Loss per token, float32 [n]; and its statistics.

    Raises:
        ValueError: `dual_clip` is not above 1.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}: at or below 1 it would cut ordinary gradients")
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.detach().exp()  # infinite above 88.7 nats
    bound = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = torch.where(advantages > 0, ratio > bound, (advantages < 0) & (ratio < bound))
    if dual_clip is not None:
        too_large = (advantages < 0) & (ratio > dual_clip)
        clipped, bound = clipped | too_large, torch.where(too_large, dual_clip, bound)
    # Chosen before exp, not after: the gradient of an exp that overflows is inf, and 0 * inf is NaN.
    without_gradient = clipped | (advantages == 0)
    loss = -advantages * torch.where(without_gradient, bound, torch.where(without_gradient, 0.0, log_ratio).exp())
    return loss, _policy_stats(log_ratio.detach(), ratio, clipped)


def _policy_stats(log_ratio: Tensor, ratio: Tensor, clipped: Tensor) -> PolicyStats:
    old = torch.zeros_like(log_ratio)  # the estimators depend only on the difference of the two
    infinity = ratio.new_full((1,), torch.inf)  # a filler micro-batch has no token, so no smallest ratio
    return PolicyStats(
        clipped=clipped.sum().float(),
        kl_k1=k1(old, log_ratio).sum(),
        kl_k3=k3(old, log_ratio).sum(),
        ratio_min=torch.cat([ratio, infinity]).amin(),
        ratio_max=torch.cat([ratio, -infinity]).amax(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """The critic's squared error, 0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the old V.

    openai/lm-human-preferences@cbfd210 lm_human_preferences/train_policy.py:344-348; "The N Implementation Details of
    RLHF with PPO". The clip is in units of reward.

    Args:
        values: Values of the critic that is trained, [n]; the only argument with a gradient.
        old_values: The same before the update, [n].
        returns: The critic's targets, [n].
        clip: How far a value may move from its old one, or None for the plain squared error.

    Returns:
        Loss per token, float32 [n]; and the number of tokens in the clipped branch, float32, 0-d.

    Raises:
        ValueError: `clip` is not above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clipping; got {clip}")
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error, error.new_zeros(())
    change = values - old_values
    clipped = (old_values + change.clamp(-clip, clip) - returns) ** 2
    # A smaller change is not clipped, but old + (new - old) may round to a larger error.
    held = (change.abs() > clip) & (clipped > error)
    return 0.5 * torch.maximum(error, clipped), held.sum().float()


@dataclass(frozen=True)
class Importance:
    """Importance weights for a sampler whose log-probs differ from the trainer's, and their difference. float32."""

    weights: Tensor
    """[N, T], 0 at padding."""
    gap_mean: Tensor
    """Mean absolute difference of the log-probs over response tokens, nats, 0-d."""
    gap_max: Tensor
    """The largest absolute difference, 0-d."""
    truncated: Tensor
    """Fraction of response tokens whose weight is truncated, 0-d."""


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, response_mask: Tensor, most: float) -> Importance:
    """Truncated importance weights, min(exp(logprobs - sampler_logprobs), most), for each token's policy loss.

    A sampler with other kernels or another precision samples from a policy that differs a little from the trainer's, so
    the data is off-policy. Yao 2025 ("Your efficient RL framework secretly brings you off-policy RL training", TIS)
    weights the gradient by the truncated ratio of the two; the truncation, which bounds the variance, is V-trace's rho
    (Espeholt 2018, arXiv:1802.01561, eq. 1). Both log-probs are of the whole distribution at the sampling temperature.

    Args:
        logprobs: Log-probs of the sampled tokens before the update, recomputed by the trainer, [N, T].
        sampler_logprobs: The same as reported by the sampler, [N, T].
        response_mask: bool [N, T].
        most: The largest weight.

    Raises:
        ValueError: `most` is below 1: it would truncate tokens on which the two agree.
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
