"""Minibatches of an update: which rank passes which episodes through the models, and the tensors for each pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf import distributed
from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.ppo.types import MicroBatch, Rollout

PASS_TOKENS = {"cpu": 128, "cuda": 1024}
"""Fixed cost of one forward and backward pass (mostly kernel launches), as a number of tokens."""

RankBatches = list[list[list[int]]]
"""[rank][micro-batch] -> episodes; every rank has the same number of micro-batches, some of them empty."""


# ---- rows and their tensors ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRows:
    """Token rows from which micro-batches are built."""

    rows: Sequence[tuple[list[int], list[bool]]]
    """(token ids, flags) per row; a flag marks a token whose log-prob is needed."""
    pad_id: int
    """Pads rows to the longest."""
    packed: bool = False
    """Put the sequences of a micro-batch into one row instead of padding them."""
    rank: int = field(default_factory=distributed.rank)
    """The rank whose micro-batches are built."""
    device: torch.device = field(default_factory=distributed.device)

    @cached_property
    def flagged(self) -> list[int]:
        """The number of flagged tokens of each row."""
        return [sum(flags) for _, flags in self.rows]

    @cached_property
    def filler(self) -> int:
        """The row that a rank without a row of its own takes, since all ranks make the same number of passes: the
        shortest."""
        return min(range(len(self.rows)), key=lambda row: len(self.rows[row][0]))

    def micro_batches(
        self, per_rank: RankBatches, frozen_states: Mapping[int, Tensor] | None = None
    ) -> list[MicroBatch]:
        """This rank's micro-batches of one minibatch. `frozen_states` are cached, as in `Experience`."""
        mine = per_rank[self.rank]
        most = [max(sum(self.flagged[row] for row in rows) for rows in ranks) for ranks in zip(*per_rank)]
        return [self._build(rows, tokens, frozen_states) for rows, tokens in zip(mine, most)]

    def _build(self, rows: list[int], most_tokens: int, frozen_states: Mapping[int, Tensor] | None) -> MicroBatch:
        used = rows or [self.filler]
        device, ids = self.device, [self.rows[row][0] for row in used]
        flags = [self.rows[row][1] if rows else [False] * len(self.rows[row][1]) for row in used]
        lengths = torch.tensor([sum(row) for row in flags], device=device)
        states = None if frozen_states is None else [frozen_states[row] for row in used]
        if self.packed:
            flat = torch.tensor([[token for row in ids for token in row]], device=device)
            positions = torch.tensor([[place for row in ids for place in range(len(row))]], device=device)
            wanted = torch.tensor([[flag for row in flags for flag in row]], device=device)
            joined = None if states is None else torch.cat(states)[None].to(device)
            return MicroBatch(rows, flat, None, positions, wanted, lengths, most_tokens, joined)
        width = max(map(len, ids))
        padded = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        wanted = torch.tensor([row + [False] * (width - len(row)) for row in flags], device=device)
        joined = None if states is None else pad_sequence(states, batch_first=True).to(device)
        return MicroBatch(rows, padded, mask, None, wanted, lengths, most_tokens, joined)


@dataclass(frozen=True)
class Minibatch:
    """The episodes of one optimizer step, divided among ranks and micro-batches."""

    per_rank: RankBatches
    rows: TokenRows
    budget: int
    """Tokens of a micro-batch."""
    tokens: int
    """Response tokens on all ranks."""

    @classmethod
    def of(cls, per_rank: RankBatches, rows: TokenRows, budget: int) -> Minibatch:
        """A minibatch of these rows."""
        tokens = sum(rows.flagged[episode] for rank in per_rank for batch in rank for episode in batch)
        return cls(per_rank, rows, budget, tokens)

    @property
    def episodes(self) -> list[int]:
        """All episodes of the minibatch, in increasing order."""
        return sorted(episode for rank in self.per_rank for batch in rank for episode in batch)

    def within(self, budget: int) -> Minibatch:
        """The same episodes in micro-batches of up to `budget` tokens."""
        if budget == self.budget:
            return self
        totals = [len(ids) for ids, _ in self.rows.rows]
        return Minibatch.of(divide(totals, self.episodes, 1, budget, self.rows.packed)[0], self.rows, budget)

    def micro_batches(self, frozen_states: Mapping[int, Tensor] | None = None) -> list[MicroBatch]:
        """This rank's part, as tensors; see `TokenRows.micro_batches`."""
        return self.rows.micro_batches(self.per_rank, frozen_states)


@dataclass(frozen=True)
class Minibatches:
    """All minibatches of an update."""

    rows: TokenRows
    epochs: list[list[Minibatch]]

    @classmethod
    def of_rollout(
        cls, rollout: Rollout, pad_id: int, packed: bool, orders: Sequence[Sequence[int]], minibatches: int, budget: int
    ) -> Minibatches:
        """Divide the episodes of a rollout, in one random order per epoch; see `divide`."""
        pairs = zip(rollout.prompts.ids, rollout.completions)
        episodes = [(prompt + c.ids, [False] * len(prompt) + [True] * len(c.ids)) for prompt, c in pairs]
        totals = [len(ids) for ids, _ in episodes]
        rows, processes = TokenRows(episodes, pad_id, packed), distributed.world_size()
        divisions = [divide(totals, order, minibatches, budget, packed, processes) for order in orders]
        return cls(rows, [[Minibatch.of(per_rank, rows, budget) for per_rank in division] for division in divisions])


@dataclass
class TokenBudget:
    """The most tokens of a micro-batch: `batch.micro_batch_tokens`, halved whenever memory runs out. Part of
    checkpoints, so that a resumed run divides minibatches as an uninterrupted one does."""

    configured: int
    halvings: int = 0

    @property
    def tokens(self) -> int:
        """The current budget."""
        return self.configured >> self.halvings

    def split(self, minibatch: Minibatch) -> Minibatch:
        """Halve the budget until it cuts the minibatch into smaller micro-batches, and return these.

        Raises:
            UserError: Each micro-batch is one episode.
        """
        before = self.tokens
        while self.tokens > 1:
            self.halvings += 1
            smaller = minibatch.within(self.tokens)
            if smaller.per_rank != minibatch.per_rank:
                say(f"Out of memory in a micro-batch: the token budget is halved, from {before:,} to {self.tokens:,}")
                return smaller
        longest = max(len(minibatch.rows.rows[episode][0]) for episode in minibatch.episodes)
        raise UserError(
            f"out of memory in a micro-batch of one episode (the longest has {longest:,} tokens)",
            "One episode cannot be divided further.",
            "Set gradient_checkpointing=true, train an adapter (tuning=lora), or make episodes shorter: "
            "rollout.max_new_tokens, data.max_prompt_tokens. `rlhf plan` shows what each saves.",
        )

    def load_state_dict(self, state: Mapping[str, int] | None) -> None:
        """Restore `vars` of a checkpoint's budget, unless the run now has another `batch.micro_batch_tokens`."""
        if state is not None and state["configured"] == self.configured:
            self.halvings = state["halvings"]


# ---- division among ranks and micro-batches ------------------------------------------------------------------------


def divide(
    totals: Sequence[int],
    order: Sequence[int],
    minibatches: int,
    budget: int,
    packed: bool = False,
    processes: int | None = None,
) -> list[RankBatches]:
    """Cut an order of episodes into minibatches and divide each among the ranks by length.

    Within a minibatch the longest episode goes to the rank with the fewest tokens so far; each rank then makes
    micro-batches of up to `budget` tokens: of episodes of similar length, or packed into parts of about equal size.

    Args:
        totals: Tokens of each episode.
        order: A permutation of the episodes (or a part of one).
        minibatches: The number of optimizer steps.
        budget: Tokens of one micro-batch, padding included.
        packed: Sequences share one row, so there is no padding.
        processes: The number of ranks; this run's when left out.

    Returns:
        One division per minibatch; the same on every rank.
    """
    cut = _cut_packed if packed else _cut_padded
    processes = processes or distributed.world_size()
    divisions = []
    for part in torch.tensor_split(torch.tensor(list(order)), minibatches):
        longest_first = sorted(part.tolist(), key=lambda e: (-totals[e], e))
        ranks = [cut(rank, totals, budget) for rank in _deal(longest_first, totals, processes)]
        most = max(map(len, ranks))
        divisions.append([[*batches, *([[]] * (most - len(batches)))] for batches in ranks])
    return divisions


def _cut_padded(episodes: list[int], totals: Sequence[int], budget: int) -> list[list[int]]:
    """Cut episodes, sorted from long to short, into the micro-batches with the lowest total cost.

    A micro-batch costs rows x longest tokens, and `PASS_TOKENS` for the pass. Dynamic programming over the cuts.
    """
    pass_cost = PASS_TOKENS[distributed.device().type]
    least, starts = [0], [0]  # for the first 0, 1, 2, ... episodes: their cost, and where their last micro-batch starts
    for end in range(1, len(episodes) + 1):
        best = (least[end - 1] + pass_cost + totals[episodes[end - 1]], end - 1)
        for start in range(end - 2, -1, -1):
            padded = (end - start) * totals[episodes[start]]
            if padded > budget:
                break
            best = min(best, (least[start] + pass_cost + padded, start))
        least.append(best[0])
        starts.append(best[1])
    batches, end = [], len(episodes)
    while end:
        batches.append(episodes[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def _cut_packed(episodes: list[int], totals: Sequence[int], budget: int) -> list[list[int]]:
    """Put episodes, sorted from long to short, into the fewest parts of about equal size within the budget."""
    fewest = math.ceil(sum(totals[e] for e in episodes) / budget)
    for count in range(fewest, len(episodes) + 1):
        parts = _deal(episodes, totals, count)
        if all(len(part) == 1 or sum(totals[e] for e in part) <= budget for part in parts):
            return parts
    return [[episode] for episode in episodes]


def _deal(episodes: list[int], totals: Sequence[int], count: int) -> list[list[int]]:
    """Give episodes, sorted from long to short, each to the part with the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for episode in episodes:
        lightest = loads.index(min(loads))
        parts[lightest].append(episode)
        loads[lightest] += totals[episode]
    return parts
