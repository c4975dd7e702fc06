"""A recorded update recomputed by the functions of `rlhf.ppo`, and compared with what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.ppo import kl
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.masked import zero_padding
from rlhf.ppo.metrics import experience_metrics
from rlhf.ppo.types import Experience
from rlhf.replay.record import UpdateRecord

ROUNDING = 1e-5
"""Largest difference that is rounding, relative to the largest value: other processors add in another order."""


@dataclass(frozen=True)
class Recomputed:
    """A recorded quantity and the recomputed one."""

    name: str
    how: str
    """What it was computed from."""
    values: int
    difference: float
    """The largest absolute difference; infinite where one side is not finite or has another shape."""
    allowed: float
    """The largest difference that counts as rounding."""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed

    @property
    def verdict(self) -> str:
        """`equal`, `equal up to rounding` or `DIFFERS`."""
        return "equal" if self.difference == 0 else "equal up to rounding" if self.agrees else "DIFFERS"


@dataclass(frozen=True)
class Shaped:
    """Phases 4 and 5 of an update: what `rlhf.ppo` makes of an experience."""

    kl: Tensor
    """[N, T]."""
    scores: Tensor
    """[N], shaped."""
    rewards: Tensor
    """[N, T]."""
    advantages: Advantages


def shaped(config: PPOConfig, experience: Experience, kl_coef: float, mean: float, std: float) -> Shaped:
    """KL, shaped scores, rewards, advantages and returns of an experience.

    Args:
        config: Estimators and shaping.
        experience: Log-probs, values, raw scores.
        kl_coef: Coefficient of the KL penalty.
        mean, std: What scores are normalised by.
    """
    rollout, rule = experience.rollout, config.shaping
    mask = rollout.response_mask
    per_token = config.kl.estimator(experience.logprobs, experience.ref_logprobs)
    scores = kl.shape_scores(
        experience.scores, rollout.ended, mean=mean, std=std, clip=rule.clip_score, missing_eos=rule.missing_eos
    )
    rewards = kl.shape_rewards(scores, per_token, mask, kl_coef, scale=rule.whiten_rewards)
    advantages = config.advantage(rewards, experience.values, mask, rollout.prompts.groups)
    return Shaped(per_token, scores, rewards, advantages)


def check_mathematics(config: PPOConfig, record: UpdateRecord) -> list[Recomputed]:
    """KL, scores, rewards, advantages and returns from the recorded log-probs, values and raw scores.

    Each step starts from what was recorded, so that a difference names the step in which it arose.
    """
    experience, rule = record.experience, config.shaping
    rollout = experience.rollout
    mask = rollout.response_mask
    whole = shaped(config, experience, record.kl_coef, record.score_mean, record.score_std)
    rewards = kl.shape_rewards(record.shaped_scores, record.kl, mask, record.kl_coef, scale=rule.whiten_rewards)
    made = config.advantage(record.rewards, experience.values, mask, rollout.prompts.groups)
    found = [
        _tokens("KL per token", "log-probs of policy and reference", record.kl, whole.kl, mask),
        _compare("shaped scores", "raw scores", record.shaped_scores, whole.scores),
        _tokens("rewards", "shaped scores and KL", record.rewards, rewards, mask),
        _tokens("advantages", "rewards and values", record.advantages.advantages, made.advantages, mask),
    ]
    if record.advantages.returns is not None and made.returns is not None:
        found.append(_tokens("returns", "rewards and values", record.advantages.returns, made.returns, mask))
    return found


def check_metrics(record: UpdateRecord, logged: Mapping[str, float]) -> list[Recomputed]:
    """The metrics that follow from the record, compared with the line of metrics.jsonl of that update."""
    made = experience_metrics(record.experience, record.shaped_scores, record.rewards, record.advantages)
    made["objective/kl_coef"] = record.kl_coef
    return [
        _compare(name, "the record", torch.tensor([logged[name]]), torch.tensor([value]))
        for name, value in made.items() if name in logged
    ]  # fmt: skip


def compare_models(record: UpdateRecord, made: Mapping[str, Tensor], allowed: float) -> list[Recomputed]:
    """Log-probs, values and raw scores by the models themselves, compared with the record.

    Args:
        made: `logprobs`, `ref_logprobs`, `values` [N, T] and `scores` [N]; those that were computed.
        allowed: Largest difference that is rounding.
    """
    mask, columns = record.experience.rollout.response_mask, record.columns
    names = {"logprobs": "log-probs", "ref_logprobs": "reference's log-probs", "values": "values"}
    found = [
        _tokens(title, "the models", columns[name], made[name], mask, allowed)
        for name, title in names.items() if name in made and name in columns
    ]  # fmt: skip
    if "scores" in made:
        found.append(_compare("raw scores", "the reward source", record.experience.scores, made["scores"], allowed))
    return found


def _tokens(name: str, how: str, recorded: Tensor, made: Tensor, mask: Tensor, allowed: float = 0.0) -> Recomputed:
    return _compare(name, how, zero_padding(recorded, mask)[mask], zero_padding(made, mask)[mask], allowed)


def _compare(name: str, how: str, recorded: Tensor, made: Tensor, allowed: float = 0.0) -> Recomputed:
    if recorded.shape != made.shape or not (torch.isfinite(recorded).all() and torch.isfinite(made).all()):
        return Recomputed(name, how, recorded.numel(), float("inf"), 0.0)
    size = float(recorded.abs().max()) if recorded.numel() else 0.0
    difference = float((recorded.double() - made.double()).abs().max()) if recorded.numel() else 0.0
    return Recomputed(name, how, recorded.numel(), difference, allowed or ROUNDING * max(1.0, size))
