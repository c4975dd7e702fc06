"""The KL penalty: estimators of the KL to the reference, controllers of its coefficient, and the shaped rewards.

`rlhf.ppo.masked` describes shapes and the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import NonNegativeFloat, PositiveFloat

from rlhf.core.lazy import lazy
from rlhf.core.table import Table
from rlhf.ppo.masked import completion_lengths, whiten, zero_padding

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


KL_ESTIMATORS = Table("KL estimator")
KL_CONTROLLERS = Table("KL controller")
MISSING_EOS = Table("rule for completions without EOS")
LARGEST_LOG_RATIO = 20.0
"""Largest log-ratio, in nats, whose exponential enters the estimator k3."""


# ---- estimators --------------------------------------------------------------------------------------------------
#
# J. Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html. There x ~ q and r = p(x)/q(x); here
# q is the policy that sampled the tokens and p the reference, so log r = ref_logprobs - logprobs, and each row
# estimates KL(policy || reference). All are elementwise: values at padding stay there, and `shape_rewards` and the
# masked sums ignore them.


@KL_ESTIMATORS.row("k1")
def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r: unbiased, and negative on about half of the tokens; the papers use it in the reward.

    Args:
        logprobs: Log-probs (nats) of the sampled tokens under the policy that sampled them, [N, T].
        ref_logprobs: The same tokens under the reference, [N, T].

    Returns:
        One estimate per token, [N, T].
    """
    return logprobs - ref_logprobs


@KL_ESTIMATORS.row("k2")
def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2: biased, low variance, never negative. Arguments and result as `k1`."""
    return 0.5 * (ref_logprobs - logprobs) ** 2


@KL_ESTIMATORS.row("k3")
def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r: unbiased, low variance, never negative. Arguments and result as `k1`.

    A log r above 20 counts as 20, as in verl: e^89 overflows float32, and a variance of rewards overflows from e^45 on.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(max=LARGEST_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio  # expm1 keeps the digits that r - 1 loses near r = 1


# ---- coefficients ------------------------------------------------------------------------------------------------


class KLController(Protocol):
    """Holds the coefficient of the KL penalty and adjusts it after every batch of episodes."""

    coef: float

    def update(self, kl_per_episode: float, episodes: int) -> None:
        """Adjust the coefficient after a batch.

        Args:
            kl_per_episode: Mean over the episodes of the summed per-token KL, nats.
            episodes: Number of episodes.

        Raises:
            ValueError: The KL is not finite; the coefficient is unchanged.
        """

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint needs to continue exactly."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()` of a controller of the same kind.

        Raises:
            ValueError: The state belongs to another kind of controller.
        """


def _check_kl(kl_per_episode: float) -> None:
    if not math.isfinite(kl_per_episode):
        raise ValueError(f"the batch's KL is {kl_per_episode}: the KL coefficient cannot be adjusted")


def _check_state(controller: KLController, state: dict[str, float]) -> None:
    if set(state) != set(controller.state_dict()):
        raise ValueError(
            f"the checkpoint's KL controller state holds {sorted(state) or 'nothing'}, the configured controller's "
            f"{sorted(controller.state_dict()) or 'nothing'}: it was written by another kind of controller"
        )


@KL_CONTROLLERS.row("fixed")
class FixedKL:
    """The same coefficient throughout, as in Stiennon 2020 and InstructGPT (arXiv:2203.02155, eq. 2)."""

    def __init__(self, *, coef: NonNegativeFloat = 0.05) -> None:
        self.coef = coef

    def update(self, kl_per_episode: float, episodes: int) -> None:
        _check_kl(kl_per_episode)

    def state_dict(self) -> dict[str, float]:
        return {}  # the coefficient comes from the config

    def load_state_dict(self, state: dict[str, float]) -> None:
        _check_state(self, state)


@KL_CONTROLLERS.row("adaptive")
class AdaptiveKL:
    """A coefficient that steers the KL per episode towards a target: Ziegler 2019's proportional controller.

    arXiv:1909.08593 section 2.2, with the gain written as episodes / horizon as in
    openai/lm-human-preferences@cbfd210 lm_human_preferences/train_policy.py:115-124::

        error = clip(kl / target - 1, -0.2, 0.2)
        coef <- coef * (1 + error * episodes / horizon)

    The defaults are that repository's (launch.py:129-131, train_policy.py:28). A batch of more episodes than the
    horizon counts as `horizon` episodes; otherwise a low KL could set the coefficient to 0 or below, where it stays.

    Args:
        init_coef: The coefficient before the first update.
        target: The KL per episode to reach and keep, in nats.
        horizon: Episodes over which a full error of 0.2 moves the coefficient by 20%.
    """

    def __init__(
        self, *, init_coef: PositiveFloat = 0.15, target: PositiveFloat = 6.0, horizon: PositiveFloat = 10_000
    ) -> None:
        self.coef, self.target, self.horizon = init_coef, target, horizon

    def update(self, kl_per_episode: float, episodes: int) -> None:
        _check_kl(kl_per_episode)
        error = min(max(kl_per_episode / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * min(episodes / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        _check_state(self, state)
        self.coef = state["coef"]


# ---- scores and rewards ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunningMeanStd:
    """Count, mean and standard deviation of all scores so far (Chan et al. 1979, pairwise update)."""

    count: int = 0
    mean: float = 0.0
    std: float = 0.0
    """The population's standard deviation; 0 while all scores were equal."""

    @property
    def scale(self) -> float:
        """What centred scores are divided by: `std`, or 1 while all scores were equal."""
        return self.std or 1.0

    def add(self, values: Tensor) -> RunningMeanStd:
        """A copy that also counts `values`."""
        values = values.double()  # equal float32 scores then have the deviation 0 exactly
        new, mean, variance = len(values), float(values.mean()), float(values.var(correction=0))
        total, gap = self.count + new, mean - self.mean
        spread = self.std**2 * self.count + variance * new + gap**2 * self.count * new / total
        return RunningMeanStd(total, self.mean + gap * new / total, math.sqrt(spread / total))


@MISSING_EOS.row("keep")
def keep(scores: Tensor, ended: Tensor) -> Tensor:
    """Leave the score of a completion without EOS unchanged.

    Args:
        scores: One per episode, [N].
        ended: True where the completion ended by itself (EOS or a stop string), bool [N].

    Returns:
        [N].
    """
    return scores


@MISSING_EOS.row("score")
def fixed_score(scores: Tensor, ended: Tensor, *, value: float = -1.0) -> Tensor:
    """Give every completion without EOS the same score. Arguments and result as `keep`.

    "The N Implementation Details of RLHF with PPO" (rejection of answers without the end token, score -1);
    vwxyzjn/lm-human-preference-details@ccc1953 lm_human_preference_details/train_policy_accelerate.py:616-625.
    """
    return torch.where(ended, scores, value)


@MISSING_EOS.row("penalty")
def penalty(scores: Tensor, ended: Tensor, *, value: NonNegativeFloat = 1.0) -> Tensor:
    """Subtract `value` from the score of a completion without EOS. Arguments and result as `keep`."""
    return torch.where(ended, scores, scores - value)


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float | None = None,
    missing_eos: Callable[[Tensor, Tensor], Tensor] = keep,
) -> Tensor:
    """Scores on a common scale: (score - mean) / std, then clipped, then the rule for completions without EOS.

    The rule comes last, so that its numbers are in the final units and the clip cannot remove a penalty.
    Normalisation: Ziegler 2019 section 2 (mean 0 and variance 1 on the initial policy's completions).

    Args:
        scores: Raw scores of the reward source, float32 [N].
        ended: True where the completion ended by itself, bool [N].
        mean: The source's mean score.
        std: The standard deviation of its scores.
        clip: Normalised scores are clipped to [-clip, clip]; None does not clip.
        missing_eos: A row of MISSING_EOS (or its `Pick` with options).

    Returns:
        float32 [N].

    Raises:
        ValueError: `std` or `clip` is not above 0.
    """
    if not std > 0 or (clip is not None and not clip > 0):
        raise ValueError(f"std and clip must be above 0, got std={std}, clip={clip}")
    scores = (scores - mean) / std
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return missing_eos(scores, ended)


def shape_rewards(
    scores: Tensor, kl_per_token: Tensor, response_mask: Tensor, coef: float, *, scale: bool = False
) -> Tensor:
    """Per-token rewards: -coef * KL at every response token, plus the score at the last one.

    Ziegler 2019 eq. 2 (R = r - beta * log(pi/rho)) spread over the tokens as in
    openai/lm-human-preferences@cbfd210 lm_human_preferences/train_policy.py:149-154; Stiennon 2020 section 3.4 and
    InstructGPT eq. 2 use the same reward.

    Args:
        scores: float32 [N].
        kl_per_token: A row of KL_ESTIMATORS applied to the sampled tokens, [N, T].
        response_mask: bool [N, T].
        coef: Coefficient of the KL penalty.
        scale: Divide the rewards by their standard deviation over the batch, keeping the mean
            (same file, lines 324-325).

    Returns:
        float32 [N, T], 0 at padding.

    Raises:
        ValueError: An episode has no response token, or padding before one.
    """
    last = completion_lengths(response_mask)[:, None] - 1
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    rewards = zero_padding(-coef * kl_per_token, response_mask) + torch.where(positions == last, scores[:, None], 0.0)
    return whiten(rewards, response_mask, shift_mean=False) if scale else rewards
