"""What passes between PPO's phases: prompts, rollout, minibatch plan, experience. Frozen, typed, complete at birth.

Every rank holds the rollout and the experience of the whole batch (a few dozen bytes a token), so whitening, group
baselines and minibatches are the same on every rank and for any number of ranks; only the passes through models are
shared out. Episodes are numbered 0..N-1 over the whole batch; answers to one prompt follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.ppo.losses import Importance
from rlhf.ppo.masked import unflatten
from rlhf.rollout.types import Completion


@dataclass(frozen=True)
class Prompts:
    """The prompts of one update, each repeated once for every answer to it."""

    ids: list[list[int]]
    """Token ids, N lists."""
    messages: list[list[dict[str, str]]]
    """The same as chat messages."""
    groups: Tensor
    """int64 [N]: equal for answers to one prompt."""
    seeds: list[int]
    """The random stream of each episode."""


@dataclass(frozen=True)
class Rollout:
    """Prompts with the answers that the policy gave, of all ranks."""

    prompts: Prompts
    answers: list[Completion]

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [N]: tokens of each answer."""
        return torch.tensor([len(answer.ids) for answer in self.answers])

    @cached_property
    def totals(self) -> list[int]:
        """Tokens of prompt and answer together, N numbers."""
        return [len(p) + len(a.ids) for p, a in zip(self.prompts.ids, self.answers)]

    @cached_property
    def ended(self) -> Tensor:
        """bool [N]: whether the answer ended by itself."""
        return torch.tensor([answer.ended for answer in self.answers])

    @cached_property
    def response_mask(self) -> Tensor:
        """bool [N, T]: True at the tokens of each answer, T being the longest one's."""
        return torch.arange(int(self.lengths.max()))[None] < self.lengths[:, None]

    @cached_property
    def sampler_logprobs(self) -> Tensor | None:
        """float32 [N, T], 0 at padding: as the sampler reported them; None where it reports none."""
        found = [answer.logprobs for answer in self.answers if answer.logprobs is not None]
        if len(found) < len(self.answers):
            return None
        return unflatten(torch.tensor([value for row in found for value in row]), self.lengths)


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that was computed about it before learning. float32 on the CPU, 0 at padding."""

    rollout: Rollout
    logprobs: Tensor
    """[N, T]: of the policy that sampled, at the sampling temperature, recomputed by the trainer."""
    ref_logprobs: Tensor
    """[N, T]: of the frozen reference, at the same temperature."""
    values: Tensor | None
    """[N, T]: the critic's value of the state in which each token was chosen; None without a critic."""
    scores: Tensor
    """[N]: from the reward source, as it gave them."""
    entropy: float
    """Mean entropy of the policy over answer tokens, nats."""
    importance: Importance | None = None
    """What a sampler that sees other log-probs than the trainer calls for; None where none are reported."""
    trunk: Mapping[int, Tensor] | None = None
    """Episode -> [tokens, H], hidden states that enter the layers with adapters, where roles share a frozen trunk; see
    `rlhf.ppo.frozen_layers`."""


class MicroBatch(NamedTuple):
    """Sequences for one forward pass of one rank, on its device. (ZeRO-3 looks into tuples.)

    Either one in each row, padded on the right; or packed: all in one row [1, L], one after the other.
    A rank that has fewer micro-batches than the others gets fillers: `rows` is empty, nothing in `response_mask`.
    """

    rows: list[int]
    """Which episodes (or demonstrations) these are, N numbers."""
    input_ids: Tensor
    """int64 [B, L]."""
    attention_mask: Tensor | None
    """int64 [B, L], 1 where there is a token; None where packed."""
    position_ids: Tensor | None
    """int64 [1, L], from 0 in each sequence, which keeps them apart; None where not packed."""
    response_mask: Tensor
    """bool [B, L], True at the tokens whose log-probs are asked for."""
    lengths: Tensor
    """int64 [N], how many these are in each sequence; [0] for a filler."""
    chunks: int
    """Parts that the language model's head works in, the same on every rank."""
    trunk: Tensor | None = None
    """[B, L, H] what enters the layers with adapters, where that is known."""
