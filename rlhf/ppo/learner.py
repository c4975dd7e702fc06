"""PPO's learning phase: epochs of minibatches from one experience, one optimizer step and one summed loss for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.batching import Minibatch, Minibatches, RankBatches, TokenBudget, TokenRows
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.losses import policy_loss, value_loss
from rlhf.ppo.types import Experience, MicroBatch
from rlhf.rollout.streams import endless
from rlhf.training.engine import Engine

SUMS = ("tokens", "kl_k1", "kl_k3", "clipped", "values_clipped", "policy_loss", "value_loss", "entropy", "ptx_loss")


@dataclass(frozen=True)
class StepSums:
    """Sums over the response tokens of one minibatch on all ranks, and extremes of the ratio."""

    tokens: float
    kl_k1: float
    kl_k3: float
    clipped: float
    values_clipped: float
    policy_loss: float
    value_loss: float
    entropy: float
    ptx_loss: float
    ratio_min: float
    ratio_max: float

    @property
    def approx_kl(self) -> float:
        """The k3 estimate of KL(old policy || policy), nats a token."""
        return self.kl_k3 / self.tokens

    @classmethod
    def reduced(cls, steps: Sequence[tuple[Tensor, Tensor]]) -> list[StepSums]:
        """Reduce several steps in two collectives: per step this rank's `SUMS` and [-smallest, largest ratio]."""
        sums, extremes = (torch.stack(parts) for parts in zip(*steps))
        negative_lows, highs = distributed.all_max(extremes).T.tolist()
        columns = [*distributed.all_sum(sums).T.tolist(), [-low for low in negative_lows], highs]
        return [cls(**dict(zip((*SUMS, "ratio_min", "ratio_max"), step))) for step in zip(*columns)]


@dataclass(frozen=True)
class PtxBatches:
    """The demonstrations of the ptx term (InstructGPT eq. 2): a batch per optimizer step, in endless random passes."""

    rows: TokenRows
    batch_size: int
    seed: tuple[int, ...]

    def batch(self, step: int, micro_batches: int) -> tuple[list[MicroBatch], int]:
        """This rank's demonstrations for an optimizer step in `micro_batches` parts, and their tokens on all ranks."""
        chosen = endless(len(self.rows.rows), step * self.batch_size, self.batch_size, *self.seed)
        ranks = distributed.world_size()
        per_rank: RankBatches = [
            [chosen[rank + ranks * part :: ranks * micro_batches] for part in range(micro_batches)]
            for rank in range(ranks)
        ]
        return self.rows.micro_batches(per_rank), sum(self.rows.flagged[row] for row in chosen)


@dataclass
class Learner:
    """Trains policy and critic on one experience after another. `ptx` is None without the ptx term."""

    engine: Engine
    config: PPOConfig
    ptx: PtxBatches | None

    def __post_init__(self) -> None:
        self.budget = TokenBudget(self.config.batch.micro_batch_tokens)

    def learn(
        self,
        experience: Experience,
        advantages: Advantages,
        minibatches: Minibatches,
        update_index: int,
        lr_scale: float,
    ) -> dict[str, float]:
        """Run the epochs of one update.

        Args:
            experience: What was computed before learning.
            advantages: Weights of the policy gradient, and the critic's targets.
            minibatches: The minibatches of each epoch.
            update_index: Counts updates from 0.
            lr_scale: Learning rates as a fraction of their peak.

        Returns:
            Metrics, means over all optimizer steps.

        Raises:
            UserError: A loss or gradient is not finite, or a micro-batch of one episode does not fit in memory. That
                minibatch's step is not applied.
        """
        target_kl, epochs = self.config.loss.target_kl, minibatches.epochs
        critic_only = update_index < self.config.critic.warmup_updates and self.config.needs_critic
        sums: list[tuple[Tensor, Tensor]] = []
        norms: list[float] = []
        done = 0
        for epoch, parts in enumerate(epochs):
            for index, minibatch in enumerate(parts):
                step = (update_index * len(epochs) + epoch) * len(parts) + index
                sums.append(self._accumulate(experience, advantages, minibatch, step, critic_only))
                norm = self.engine.step(lr_scale)
                if norm is None:
                    where = f"update {update_index + 1}, epoch {epoch + 1}, minibatch {index + 1}"
                    raise _not_finite(experience, minibatch, where)
                norms.append(norm)
            done += 1
            if target_kl is not None and StepSums.reduced(sums[-1:])[0].approx_kl > target_kl:
                break
        steps = StepSums.reduced(sums)
        return _metrics(steps) | {
            "optimizer/grad_norm": sum(norms) / len(norms),
            "optimizer/epochs": done,
            "optimizer/steps": len(steps),
            "optimizer/halvings": self.budget.halvings,
        }

    def _accumulate(
        self, experience: Experience, advantages: Advantages, minibatch: Minibatch, step: int, critic_only: bool
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of a minibatch, in smaller micro-batches where memory runs out. Returns this rank's
        `SUMS` and [-smallest, largest ratio]."""
        if self.budget.halvings:
            minibatch = minibatch.within(self.budget.tokens)
        while True:
            count = len(minibatch.per_rank[0])
            ptx, ptx_tokens = self.ptx.batch(step, count) if self.ptx else ([None] * count, 1)
            batches = partial(minibatch.micro_batches, experience.frozen_states)
            loss_of = partial(self._loss, experience, advantages, minibatch.tokens, ptx, ptx_tokens, critic_only)
            smaller = f"batch.micro_batch_tokens={max(minibatch.budget // 2, 1)}"
            found = self.engine.accumulate(batches, loss_of, smaller)
            if found is not None:
                sums, extremes = zip(*found)
                return sum(sums[1:], sums[0]), torch.stack(extremes).amax(0)
            minibatch = self.budget.split(minibatch)

    def _loss(
        self, experience: Experience, advantages: Advantages, tokens: int, ptx: Sequence[MicroBatch | None],
        ptx_tokens: int, critic_only: bool, index: int, batch: MicroBatch,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        """The token losses of a micro-batch, divided by the tokens of the minibatch; and its sums and ratio extremes.

        Args:
            experience: What was computed before learning.
            advantages: Weights of the policy gradient, and the critic's targets.
            tokens: Response tokens of the minibatch on all ranks.
            ptx: The demonstrations that go with each micro-batch.
            ptx_tokens: Tokens of the step's demonstrations on all ranks.
            critic_only: Only the critic is trained in this update.
            index: Which micro-batch of the minibatch it is.
            batch: The micro-batch.
        """
        c, old = self.config.loss, _old_columns(experience, advantages, batch)
        out = self.engine.forward(batch, self.config.rollout.temperature, ptx[index])
        value = values_clipped = ptx_loss = out.logprobs.new_zeros(())
        if out.values is not None:
            assert old.values is not None and old.returns is not None
            per_token, values_clipped = value_loss(out.values, old.values, old.returns, clip=c.value_clip)
            value = per_token.sum() / tokens
        per_token, stats = policy_loss(
            out.logprobs, old.logprobs, old.advantages,
            clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip,
        )  # fmt: skip
        if old.importance is not None:
            per_token = per_token * old.importance
        policy = per_token.sum() / tokens
        # Always logged; its gradient, which goes through all logits, is computed only for an entropy bonus.
        entropy = (out.entropies if c.entropy_coef else out.entropies.detach()).sum() / tokens
        if out.ptx_logprobs is not None:
            ptx_loss = -out.ptx_logprobs.sum() / ptx_tokens
        # While only the critic learns, the policy's loss is multiplied by 0 instead of left out, so that every
        # parameter of the engine gets a gradient in every step.
        policy_part = policy - c.entropy_coef * entropy + c.ptx_coef * ptx_loss
        loss = policy_part * (0.0 if critic_only else 1.0) + c.value_coef * value
        count = policy.new_tensor(float(len(out.logprobs)))
        counted = torch.stack([count, stats.kl_k1, stats.kl_k3, stats.clipped, values_clipped])
        means = torch.stack([policy, value, entropy, ptx_loss]).detach() * tokens
        return loss, (torch.cat([counted, means]), torch.stack([-stats.ratio_min, stats.ratio_max]))


class _OldColumns(NamedTuple):
    """What was computed before learning, at the response tokens of a micro-batch, in the order of the model's outputs.
    float32 [n] each, on the device of the micro-batch."""

    logprobs: Tensor
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    importance: Tensor | None


def _old_columns(experience: Experience, advantages: Advantages, batch: MicroBatch) -> _OldColumns:
    mask, device = experience.rollout.response_mask[batch.episodes], batch.input_ids.device

    def taken(column: Tensor) -> Tensor:
        return column[batch.episodes][mask].to(device)

    return _OldColumns(
        taken(experience.logprobs),
        taken(advantages.advantages),
        None if experience.values is None else taken(experience.values),
        None if advantages.returns is None else taken(advantages.returns),
        None if experience.importance is None else taken(experience.importance.weights),
    )


def _metrics(steps: Sequence[StepSums]) -> dict[str, float]:
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
        "val/clipfrac": mean("values_clipped"),
    }


def _not_finite(experience: Experience, minibatch: Minibatch, where: str) -> UserError:
    episodes = minibatch.episodes
    scores = [f"{e} (score {experience.scores[e]:.3g})" for e in episodes[:8]]
    return UserError(
        f"{where}: the gradient is not finite, so the step was not applied",
        f"The minibatch holds episodes {', '.join(scores)}{' ...' if len(episodes) > 8 else ''}.",
        "The last checkpoint is usable. Check these scores first; then try a lower learning rate in a new run.",
    )
