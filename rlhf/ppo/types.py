"""The values that pass between PPO's phases: prompts, rollout, micro-batches, experience. Frozen, typed, complete.

Every rank holds the rollout and the experience of the whole batch (a few dozen bytes per token), so whitening, group
baselines and minibatches are the same on every rank and for any number of ranks; only the forward passes are divided.
Episodes are numbered 0..N-1 over the whole batch; completions of one prompt follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf import distributed
from rlhf.ppo.losses import Importance
from rlhf.ppo.masked import unflatten
from rlhf.rollout.types import Completion


@dataclass(frozen=True)
class Prompts:
    """The prompts of one update, each repeated once per completion."""

    ids: list[list[int]]
    """Token ids, N lists."""
    messages: list[list[dict[str, str]]]
    """The prompts as chat messages, N lists."""
    groups: Tensor
    """int64 [N]: equal for completions of one prompt."""
    seeds: list[int]
    """The random stream of each episode."""


@dataclass(frozen=True)
class Rollout:
    """Prompts with the completions that the policy sampled, of all ranks."""

    prompts: Prompts
    completions: list[Completion]

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [N]: tokens of each completion."""
        return torch.tensor([len(completion.ids) for completion in self.completions])

    @cached_property
    def ended(self) -> Tensor:
        """bool [N]: whether the completion ended by itself."""
        return torch.tensor([completion.ended for completion in self.completions])

    @cached_property
    def response_mask(self) -> Tensor:
        """bool [N, T]: True at the tokens of each completion; T is the longest one's length."""
        return torch.arange(int(self.lengths.max()))[None] < self.lengths[:, None]

    @cached_property
    def sampler_logprobs(self) -> Tensor | None:
        """float32 [N, T], 0 at padding: as the sampler reported them; None where it reports none."""
        reported = [c.logprobs for c in self.completions if c.logprobs is not None]
        if len(reported) < len(self.completions):
            return None
        return unflatten(torch.tensor([value for row in reported for value in row]), self.lengths)


class MicroBatch(NamedTuple):
    """Sequences for one forward pass of one rank, on its device. (NamedTuple: ZeRO-3 finds tensors
    in tuples, not in dataclasses.)

    Either one sequence per row, padded on the right; or packed: all in one row [1, L], one after the other.
    A rank that has fewer micro-batches than the others gets fillers: `episodes` is empty, `response_mask` all False.
    """

    episodes: list[int]
    """Indices of the episodes (or demonstrations), N numbers."""
    input_ids: Tensor
    """int64 [B, L]."""
    attention_mask: Tensor | None
    """int64 [B, L], 1 at tokens; None where packed."""
    position_ids: Tensor | None
    """int64 [1, L], from 0 in each sequence, which separates them; None where not packed."""
    response_mask: Tensor
    """bool [B, L], True at the tokens whose log-probs are needed."""
    lengths: Tensor
    """int64 [N], the number of these tokens per sequence; [0] for a filler."""
    most_tokens: int
    """Most response tokens on any rank: under ZeRO-3 every rank must run the LM head in the same number of chunks."""
    frozen_states: Tensor | None = None
    """[B, L, H] hidden states that enter the first layer with adapters, where they are cached."""


class TokenOutputs(NamedTuple):
    """Outputs for the response tokens of a micro-batch, row after row. float32 [n]."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    """None without a critic."""
    ptx_logprobs: Tensor | None
    """[m] log-probs of the demonstrations' tokens at temperature 1, where demonstrations were given."""


class TokenScores(NamedTuple):
    """What the models compute for the response tokens of a micro-batch, row after row. float32 [n]."""

    logprobs: Tensor | None
    """Log-probs under the policy; None without its pass."""
    ref_logprobs: Tensor
    """Log-probs under the reference."""
    entropies: Tensor | None
    """Entropies of the policy, nats; None without its pass."""
    values: Tensor | None
    """The critic's values; None without a critic."""


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
    """[N]: raw scores of the reward source."""
    disagreement: Tensor | None
    """[N]: the standard deviation of each score over the members of an ensemble; None without one."""
    entropy: float
    """Mean entropy of the policy over response tokens, nats."""
    importance: Importance | None = None
    """Weights for a sampler whose log-probs differ from the trainer's; None where none are reported."""
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each, from the observers: `gold`, `watch`, and `watch_disagreement` where `watch` is an ensemble."""
    frozen_states: Mapping[int, Tensor] | None = None
    """Episode -> [tokens, H], hidden states that enter the first layer with adapters; see `rlhf.ppo.frozen_layers`."""


# ---- from one rank's part to the whole -----------------------------------------------------------------------------


def gather_completions(mine: Sequence[Completion], first: int) -> list[Completion]:
    """The completions of all ranks in the order of their episodes; `mine` are this rank's, from episode `first` on."""
    device = distributed.device()
    facts = [[first + i, len(c.ids), c.ended, c.logprobs is not None] for i, c in enumerate(mine)]
    ids = [token for completion in mine for token in completion.ids]
    logprobs = [value for completion in mine for value in completion.logprobs or ()]
    all_facts = distributed.all_gather_rows(torch.tensor(facts, dtype=torch.int64, device=device).view(-1, 4)).tolist()
    all_ids = distributed.all_gather_rows(torch.tensor(ids, dtype=torch.int64, device=device)).tolist()
    all_logprobs = distributed.all_gather_rows(torch.tensor(logprobs, dtype=torch.float32, device=device)).tolist()
    gathered: list[Completion | None] = [None] * len(all_facts)
    token, value = 0, 0
    for episode, length, ended, has_logprobs in all_facts:
        row = all_logprobs[value : value + length] if has_logprobs else None
        gathered[episode] = Completion(all_ids[token : token + length], bool(ended), row)
        token += length
        value += length if has_logprobs else 0
    return [completion for completion in gathered if completion is not None]


def gather_parts(
    episodes: Sequence[int], columns: Tensor, scores: Tensor, lengths: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """What was computed for this rank's k episodes -> the same for all N episodes, on the CPU. Every rank calls it.

    Args:
        episodes: Numbers of this rank's episodes.
        columns: float32 [n, C], a row for each of their n response tokens, one episode after the other.
        scores: float32 [k, S], a row for each of them.
        lengths: int64 [N], response tokens of each episode.

    Returns:
        C tensors float32 [N, T], 0 at padding, and S tensors float32 [N].
    """
    device = distributed.device()
    order = distributed.all_gather_rows(torch.tensor(list(episodes), dtype=torch.int64, device=device)).cpu()
    flat = distributed.all_gather_rows(columns).cpu().T
    rows = distributed.all_gather_rows(scores.to(device)).cpu().T
    mask = torch.arange(int(lengths.max()))[None] < lengths[order][:, None]
    gathered = flat.new_zeros(len(flat), *mask.shape)
    gathered[:, mask] = flat
    per_token, per_episode = torch.zeros_like(gathered), torch.zeros_like(rows)
    per_token[:, order], per_episode[:, order] = gathered, rows
    return list(per_token), list(per_episode)
