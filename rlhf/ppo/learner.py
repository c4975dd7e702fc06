"""PPO's learning phase: epochs of minibatches over one experience, one optimizer step each, one summed loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.batching import Batcher, RankBatches, endless
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.losses import normalised, policy_loss, value_loss
from rlhf.ppo.masked import unflatten
from rlhf.ppo.types import Experience, MicroBatch
from rlhf.training.engine import Engine


@dataclass(frozen=True)
class StepSums:
    """Sums over the answer tokens of one minibatch (all ranks), and extremes of the ratio."""

    tokens: float
    kl_k1: float
    kl_k3: float
    clipped: float
    policy_loss: float
    value_loss: float
    entropy: float
    ptx_loss: float
    ratio_min: float
    ratio_max: float

    @classmethod
    def of(cls, figures: Sequence[tuple[Tensor, Tensor]]) -> list[StepSums]:
        """Of some steps, in two collectives: this rank's eight sums, and minus the smallest and the largest ratio."""
        sums, extremes = (torch.stack(parts) for parts in zip(*figures))
        lows, highs = distributed.all_max(extremes).T.tolist()
        columns = [*distributed.all_sum(sums).T.tolist(), [-low for low in lows], highs]
        return [cls(**dict(zip(cls.__dataclass_fields__, step))) for step in zip(*columns)]


@dataclass(frozen=True)
class PtxBatches:
    """The demonstrations of the ptx term (InstructGPT eq. 2): some for each optimizer step, in random passes."""

    batcher: Batcher
    batch_size: int
    seed: tuple[int, ...]

    def take(self, step: int, micro_batches: int) -> tuple[list[MicroBatch], int]:
        """This rank's demonstrations for an optimizer step, one micro-batch each, and their tokens on all ranks."""
        rows = endless(len(self.batcher.rows), step * self.batch_size, self.batch_size, *self.seed)
        ranks = distributed.world_size()
        share: RankBatches = [
            [rows[r + ranks * m :: ranks * micro_batches] for m in range(micro_batches)] for r in range(ranks)
        ]
        return self.batcher.share(share), sum(self.batcher.counts[row] for row in rows)


@dataclass(frozen=True)
class Learner:
    """Learns from one experience after another. `ptx` is None without the ptx term."""

    engine: Engine
    config: PPOConfig
    ptx: PtxBatches | None

    def learn(
        self,
        experience: Experience,
        advantages: Advantages,
        batcher: Batcher,
        plans: Sequence[list[RankBatches]],
        number: int,
        rate: float,
    ) -> dict[str, float]:
        """Run the epochs of update `number`.

        Args:
            experience: What was computed before learning.
            advantages: Weights of the policy gradient, and the critic's targets.
            batcher: Builds micro-batches of the experience's episodes.
            plans: The minibatches of each epoch.
            number: Of the update, from 0.
            rate: Learning rates as a share of their peak.

        Returns:
            The figures to log, means over all optimizer steps.

        Raises:
            UserError: A loss or gradient is not finite. Nothing has been changed by that minibatch.
        """
        warming = number < self.config.critic.warmup_updates and self.config.needs_critic
        steps: list[StepSums] = []
        norms: list[float] = []
        epochs = 0
        for epoch, plan in enumerate(plans):
            figures = []
            for index, share in enumerate(plan):
                step = (number * len(plans) + epoch) * len(plan) + index
                figures.append(self._minibatch(experience, advantages, batcher, share, step, warming))
                if not self.engine.gradients_are_finite():
                    raise _not_finite(
                        experience, share, f"update {number + 1}, epoch {epoch + 1}, minibatch {index + 1}"
                    )
                norms.append(self.engine.step(rate))
            epochs += 1
            steps += StepSums.of(figures)
            target = self.config.loss.target_kl
            if target is not None and steps[-1].kl_k3 / steps[-1].tokens > target:
                break
        return _figures(steps) | {
            "optimizer/grad_norm": sum(norms) / len(norms),
            "optimizer/epochs": epochs,
            "optimizer/steps": len(steps),
        }

    def _minibatch(
        self,
        experience: Experience,
        advantages: Advantages,
        batcher: Batcher,
        share: RankBatches,
        step: int,
        warming: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of one minibatch, normalised by its answer tokens on all ranks; this rank's figures to log."""
        device = distributed.device()
        batches = batcher.share(share)
        tokens = sum(batcher.counts[episode] for rank in share for rows in rank for episode in rows)
        ptx, ptx_tokens = self.ptx.take(step, len(batches)) if self.ptx else ([None] * len(batches), 1)
        sums, extremes = torch.zeros(8, device=device), torch.full((2,), -torch.inf, device=device)
        for i, (batch, demonstrations) in enumerate(zip(batches, ptx)):
            loss, parts, ratios = self._loss(experience, advantages, batch, tokens, demonstrations, ptx_tokens, warming)
            self.engine.backward(loss, last=i == len(batches) - 1)
            sums, extremes = sums + parts, torch.maximum(extremes, ratios)
        return sums, extremes

    def _loss(
        self,
        experience: Experience,
        advantages: Advantages,
        batch: MicroBatch,
        tokens: int,
        demonstrations: MicroBatch | None,
        ptx_tokens: int,
        warming: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss of a micro-batch (its share of the minibatch's mean), sums and ratio extremes to log."""
        c = self.config.loss
        out = self.engine(batch, self.config.rollout.temperature, demonstrations)
        lengths = batch.lengths
        width = int(lengths.max())
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]

        def before(column: Tensor) -> Tensor:
            return column[batch.rows or [0], :width].to(lengths.device)

        per_token, stats = policy_loss(
            unflatten(out.logprobs, lengths), before(experience.logprobs), before(advantages.advantages), mask,
            clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip,
        )  # fmt: skip
        if experience.importance is not None:
            per_token = per_token * before(experience.importance.weights)
        policy = normalised(per_token, mask, tokens)
        # Logged in any case, but only a bonus needs its gradient, which goes through all logits.
        entropy = (out.entropies if c.entropy_coef else out.entropies.detach()).sum() / tokens
        ptx = policy.new_zeros(()) if out.ptx_logprobs is None else -out.ptx_logprobs.sum() / ptx_tokens
        value = policy.new_zeros(())
        if out.values is not None:
            assert experience.values is not None and advantages.returns is not None
            values = unflatten(out.values, lengths)
            per_token, _ = value_loss(
                values, before(experience.values), before(advantages.returns), mask, clip=c.value_clip
            )
            value = normalised(per_token, mask, tokens)
        # While the critic warms up, the policy's gradient is zero, not absent: see rlhf.ppo.actor_critic.
        mine = policy - c.entropy_coef * entropy + c.ptx_coef * ptx
        loss = mine * (0.0 if warming else 1.0) + c.value_coef * value
        parts = torch.stack([stats.tokens, stats.kl_k1, stats.kl_k3, stats.clipped])
        means = torch.stack([policy, value, entropy, ptx]).detach() * tokens
        return loss, torch.cat([parts, means]), torch.stack([-stats.ratio_min, stats.ratio_max])


def _figures(steps: Sequence[StepSums]) -> dict[str, float]:
    tokens = sum(step.tokens for step in steps)

    def mean(name: str) -> float:
        return sum(getattr(step, name) for step in steps) / tokens

    return {
        "loss/policy": mean("policy_loss"),
        "loss/value": mean("value_loss"),
        "loss/ptx": mean("ptx_loss"),
        "policy/entropy": mean("entropy"),
        "policy/approx_kl": mean("kl_k3"),
        "policy/approx_kl_k1": mean("kl_k1"),
        "policy/clipfrac": mean("clipped"),
        "policy/ratio_min": min(step.ratio_min for step in steps),
        "policy/ratio_max": max(step.ratio_max for step in steps),
        "policy/first_ratio_min": steps[0].ratio_min,
        "policy/first_ratio_max": steps[0].ratio_max,
    }


def _not_finite(experience: Experience, share: RankBatches, where: str) -> UserError:
    episodes = sorted(e for rank in share for rows in rank for e in rows)
    scores = [f"{e} (score {experience.scores[e]:.3g})" for e in episodes[:8]]
    return UserError(
        f"{where}: the gradient is not finite, so nothing was changed",
        f"The minibatch holds episodes {', '.join(scores)}{' ...' if len(episodes) > 8 else ''}.",
        "The last checkpoint is usable. Look at these scores first; then try a lower learning rate in a new run.",
    )
