"""Minibatches and micro-batches: which rank passes which episodes through the models, and tensors for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf import distributed
from rlhf.models.logprobs import head_chunks
from rlhf.ppo.masked import unflatten
from rlhf.ppo.types import MicroBatch, Rollout
from rlhf.rollout.types import Completion, stream_seed

# ---- sharing episodes out ------------------------------------------------------------------------------------------

PASS_TOKENS = {"cpu": 128, "cuda": 1024}
"""What a forward and backward pass costs besides its tokens, in tokens: calls of kernels, mostly."""

RankBatches = list[list[list[int]]]
"""[rank][micro-batch] -> episodes; every rank has the same number of micro-batches, some of them empty."""


def permutation(count: int, *seed: int) -> list[int]:
    """A random order of 0..count-1 that follows from the seed parts alone."""
    generator = torch.Generator().manual_seed(stream_seed(*seed))
    return torch.randperm(count, generator=generator).tolist()


def endless(count: int, first: int, number: int, *seed: int) -> list[int]:
    """Places `first`, `first + 1`, ... of endless passes over 0..count-1, each pass in a random order of its own.

    They follow from the arguments alone, so that where the data stands needs no state.
    """
    passes = range(first // count, (first + number - 1) // count + 1)
    order = [row for turn in passes for row in permutation(count, *seed, turn)]
    start = first - passes.start * count
    return order[start : start + number]


def plan_minibatches(
    totals: Sequence[int], order: Sequence[int], minibatches: int, budget: int, packed: bool = False
) -> list[RankBatches]:
    """Cut an order of episodes into minibatches and share each out over the ranks by length.

    Within a minibatch the longest episode goes to the rank with the fewest tokens so far; each rank then makes
    micro-batches of up to `budget` tokens: of episodes of similar length, or packed into even parts.

    Args:
        totals: Tokens of each episode.
        order: A permutation of the episodes (or a part of one).
        minibatches: How many optimizer steps.
        budget: Tokens of one micro-batch, padding included.
        packed: Whether sequences stand in one row, so that there is no padding.

    Returns:
        One share for each minibatch; the same on every rank.
    """
    plan = []
    for part in torch.tensor_split(torch.tensor(list(order)), minibatches):
        longest_first = sorted(part.tolist(), key=lambda e: (-totals[e], e))
        ranks = _dealt(longest_first, totals, distributed.world_size())
        cut = _packed if packed else _padded
        plan.append(_even([cut(rank, totals, budget) for rank in ranks]))
    return plan


def _padded(episodes: list[int], totals: Sequence[int], budget: int) -> list[list[int]]:
    """Episodes, sorted from long to short, cut where padding and passes together cost least.

    A micro-batch of rows x longest tokens costs that many, and `PASS_TOKENS` for being a pass of its own.
    """
    own = PASS_TOKENS[distributed.device().type]
    least, starts = [0], [0]  # of the first 0, 1, 2, ... episodes: their cost, and where their last micro-batch starts
    for end in range(1, len(episodes) + 1):
        found = (least[end - 1] + own + totals[episodes[end - 1]], end - 1)
        for start in range(end - 2, -1, -1):
            padded = (end - start) * totals[episodes[start]]
            if padded > budget:
                break
            found = min(found, (least[start] + own + padded, start))
        least.append(found[0])
        starts.append(found[1])
    batches, end = [], len(episodes)
    while end:
        batches.append(episodes[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def _packed(episodes: list[int], totals: Sequence[int], budget: int) -> list[list[int]]:
    """Episodes, sorted from long to short, in the fewest parts of about one size within the budget."""
    fewest = math.ceil(sum(totals[e] for e in episodes) / budget)
    for count in range(fewest, len(episodes) + 1):
        parts = _dealt(episodes, totals, count)
        if all(len(part) == 1 or sum(totals[e] for e in part) <= budget for part in parts):
            return parts
    return [[episode] for episode in episodes]


def _dealt(episodes: list[int], totals: Sequence[int], count: int) -> list[list[int]]:
    """Episodes, sorted from long to short, each to the part with the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for episode in episodes:
        lightest = loads.index(min(loads))
        parts[lightest].append(episode)
        loads[lightest] += totals[episode]
    return parts


def _even(share: RankBatches) -> RankBatches:
    most = max(map(len, share))
    return [[*batches, *([[]] * (most - len(batches)))] for batches in share]


class Batcher:
    """Builds this rank's micro-batches from token rows.

    Args:
        rows: (token ids, flags) for each row; a flag marks a token whose log-prob is asked for.
        pad_id: Fills rows up to the longest.
        vocab_size: For the number of parts that the head works in.
        packed: Put the sequences of a micro-batch into one row instead.
        trunk: Row -> hidden states of the frozen trunk, as in `Experience`.
    """

    def __init__(
        self, rows: Sequence[tuple[list[int], list[bool]]], pad_id: int, vocab_size: int, packed: bool = False,
        trunk: Mapping[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.pad_id, self.vocab_size, self.packed, self.trunk = rows, pad_id, vocab_size, packed, trunk
        self.counts = [sum(flags) for _, flags in rows]

    def share(self, share: RankBatches) -> list[MicroBatch]:
        """This rank's micro-batches of one minibatch."""
        mine = share[distributed.rank()]
        most = [max(sum(self.counts[i] for i in rank[m]) for rank in share) for m in range(len(mine))]
        return [self._build(episodes, head_chunks(tokens, self.vocab_size)) for episodes, tokens in zip(mine, most)]

    def padded(self, episodes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sequences in rows of their own, and 1 where there is a token: int64 [B, L] both. A filler for no episodes."""
        found = [ids for ids, _ in self._found(episodes)]
        width = max(map(len, found))
        rows = [ids + [self.pad_id] * (width - len(ids)) for ids in found]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in found]
        device = distributed.device()
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)

    def _found(self, episodes: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
        shortest = min((ids for ids, _ in self.rows), key=len)
        return [self.rows[i] for i in episodes] or [(shortest, [False] * len(shortest))]

    def _build(self, episodes: list[int], chunks: int) -> MicroBatch:
        found, device = self._found(episodes), distributed.device()
        lengths = torch.tensor([sum(flags) for _, flags in found], device=device)
        trunk = self._trunk(episodes)
        if self.packed:
            ids = torch.tensor([[token for ids, _ in found for token in ids]], device=device)
            positions = torch.tensor([[place for ids, _ in found for place in range(len(ids))]], device=device)
            wanted = torch.tensor([[flag for _, flags in found for flag in flags]], device=device)
            return MicroBatch(episodes, ids, None, positions, wanted, lengths, chunks, trunk)
        ids, mask = self.padded(episodes)
        width = ids.shape[1]
        wanted = torch.tensor([flags + [False] * (width - len(flags)) for _, flags in found], device=device)
        return MicroBatch(episodes, ids, mask, None, wanted, lengths, chunks, trunk)

    def _trunk(self, episodes: Sequence[int]) -> Tensor | None:
        if self.trunk is None:
            return None
        shortest = min(range(len(self.rows)), key=lambda i: len(self.rows[i][0]))
        found = [self.trunk[i] for i in episodes or [shortest]]
        states = torch.cat(found)[None] if self.packed else pad_sequence(found, batch_first=True)
        return states.to(distributed.device())

    def over(self, trunk: Mapping[int, Tensor] | None) -> Batcher:
        """The same, whose micro-batches go on from the frozen trunk's hidden states."""
        return Batcher(self.rows, self.pad_id, self.vocab_size, self.packed, trunk)


def episode_batcher(rollout: Rollout, pad_id: int, vocab_size: int, packed: bool = False) -> Batcher:
    """Micro-batches of a rollout's episodes: prompt and answer, the answer's tokens flagged."""
    rows = [
        (prompt + answer.ids, [False] * len(prompt) + [True] * len(answer.ids))
        for prompt, answer in zip(rollout.prompts.ids, rollout.answers)
    ]
    return Batcher(rows, pad_id, vocab_size, packed)


# ---- between flat and padded, between one rank and all -------------------------------------------------------------


def gather_completions(mine: Sequence[Completion], first: int) -> list[Completion]:
    """The answers of all ranks in the order of their episodes; `mine` are this rank's, from episode `first` on."""
    if distributed.world_size() == 1:
        return list(mine)
    device = distributed.device()
    facts = [[first + i, len(a.ids), a.ended, a.logprobs is not None] for i, a in enumerate(mine)]
    tokens = [token for answer in mine for token in answer.ids]
    told = [value for answer in mine for value in answer.logprobs or ()]
    all_facts = distributed.all_gather_rows(torch.tensor(facts, dtype=torch.int64, device=device).view(-1, 4)).tolist()
    all_tokens = distributed.all_gather_rows(torch.tensor(tokens, dtype=torch.int64, device=device)).tolist()
    all_told = distributed.all_gather_rows(torch.tensor(told, dtype=torch.float32, device=device)).tolist()
    answers: list[Completion | None] = [None] * len(all_facts)
    start, first_told = 0, 0
    for episode, length, ended, has_logprobs in all_facts:
        logprobs = all_told[first_told : first_told + length] if has_logprobs else None
        answers[episode] = Completion(all_tokens[start : start + length], bool(ended), logprobs)
        start, first_told = start + length, first_told + length * has_logprobs
    return [answer for answer in answers if answer is not None]


def gather_tokens(columns: Tensor, episodes: Sequence[int], lengths: Tensor) -> list[Tensor]:
    """Per-token figures of all ranks, put in the order of the episodes and padded.

    Args:
        columns: float32 [n, F]: this rank's tokens, episode after episode.
        episodes: Which episodes they belong to.
        lengths: int64 [N]: answer lengths of all episodes.

    Returns:
        F tensors float32 [N, T] on the CPU, 0 at padding.
    """
    device = columns.device
    order = distributed.all_gather_rows(torch.tensor(list(episodes), dtype=torch.int64, device=device)).cpu()
    flat = distributed.all_gather_rows(columns).cpu()
    padded = [unflatten(column, lengths[order]) for column in flat.unbind(1)]
    width = int(lengths.max())
    return [torch.zeros(len(lengths), width).index_copy(0, order, column) for column in padded]
