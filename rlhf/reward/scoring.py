"""Scores of texts and of whole rankings by a scalar model. Each distinct text is encoded once."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rlhf import distributed
from rlhf.core.console import track
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_prompt import PromptWithCompletions, SharedPrompts, pad_rows
from rlhf.reward.metrics import ScoredRanking


def score_texts(
    scalar: ScalarModel,
    chat: ChatTokenizer,
    read: Callable[[int], Sequence[int]],
    lengths: Sequence[int],
    batch_tokens: int,
    bar: bool = False,
) -> list[float]:
    """Raw scores (the head's output, before `mean` and `std`) of tokenised texts. Every rank calls it.

    Texts of similar length are scored together, without dropout and without gradients, distributed over the ranks.

    Args:
        read: Index of a text -> its token ids.
        lengths: Tokens of each text.
        batch_tokens: Most tokens, padding included, in one forward pass; a longer text has its own.
        bar: Show a progress bar. Must be off while another one is shown.

    Returns:
        One score per text, the same on every rank.
    """
    members = [[number] for number in range(len(lengths))]
    return _score_rows(scalar, chat, lambda number: ([], [read(number)]), lengths, members, batch_tokens, bar)


def _score_rows(
    scalar: ScalarModel,
    chat: ChatTokenizer,
    read: Callable[[int], PromptWithCompletions],
    lengths: Sequence[int],
    members: Sequence[Sequence[int]],
    batch_tokens: int,
    bar: bool,
) -> list[float]:
    """`score_texts` of rows with several texts: `members[i]` are the indices of the texts in row i, 0..n-1 over all."""
    device, training = next(scalar.parameters()).device, scalar.training

    def score(batch: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        inputs = pad_rows(chat, [read(row) for row in batch] or [([], [[chat.pad_id]])], device)
        return [text for row in batch for text in members[row]], scalar(*inputs) * scalar.std + scalar.mean

    scalar.eval()
    scores = shared_scores(list(batches_by_length(lengths, batch_tokens)), score, "scoring" if bar else "")
    scalar.train(training)
    return scores


def shared_scores(
    batches: Sequence[Sequence[int]],
    score: Callable[[Sequence[int]], tuple[Sequence[int], torch.Tensor]],
    title: str = "",
) -> list[Any]:
    """The score of each text, or its row of scores; the same on every rank. The ranks share the batches. Without
    gradients.

    Args:
        batches: What is scored together.
        score: Gives the numbers of a batch's texts, 0..n-1 over all batches, and their scores, which may be followed by
            others. An empty batch is one that a rank has less than others: it is scored too, for the collective calls.
        title: Of a progress bar; none without it.
    """
    ranks, device = distributed.world_size(), distributed.device()
    mine = [*batches, *[[]] * (-len(batches) % ranks)][distributed.rank() :: ranks]
    found = []
    with torch.no_grad():
        for batch in track(mine, title, unit="batch") if title else mine:
            texts, scores = score(batch)
            numbers = torch.tensor(texts, dtype=torch.float64, device=device)
            found.append(torch.column_stack((numbers, scores[: len(texts)].double().to(device))))
    if not found:
        return []
    rows = distributed.all_gather_rows(torch.cat(found))
    return rows[rows[:, 0].argsort(), 1:].squeeze(1).tolist()


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by decreasing length, in batches of at most `batch_tokens` tokens with padding; or of one longer text."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class _DistinctTexts:
    """The distinct texts (prompt and candidate) of a table of rankings, arranged in rows that are read on demand."""

    def __init__(self, table: Sequence[dict[str, Any]], sharing: SharedPrompts, batch_tokens: int) -> None:
        self.table = table
        self.members: list[list[int]] = []
        """For each ranking, the text of each of its candidates."""
        self.rows: list[list[int]] = []
        """The texts of each row, which share one prompt."""
        self.lengths: list[int] = []
        """Tokens of each row."""
        self._places: list[tuple[int, int]] = []
        known: dict[bytes, int] = {}
        prompts: dict[
            bytes, tuple[int, dict[int, int]]
        ] = {}  # distinct prompt: its tokens, text -> tokens of the candidate
        longest = 0
        for row, ranking in enumerate(table):
            prompt, numbers = ranking["prompt"], []
            _, of_prompt = prompts.setdefault(_digest(prompt), (len(prompt), {}))
            for column, candidate in enumerate(ranking["candidates"]):
                number = known.setdefault(_digest([*prompt, *candidate]), len(known))
                if number == len(self._places):
                    self._places.append((row, column))
                    of_prompt[number] = len(candidate)
                    longest = max(longest, len(prompt) + len(candidate))
                numbers.append(number)
            self.members.append(numbers)
        for prompt_tokens, of_prompt in prompts.values():
            texts, tokens = list(of_prompt), list(of_prompt.values())
            for part in sharing.for_length(longest).rows(prompt_tokens, tokens, batch_tokens):
                self.rows.append([texts[i] for i in part])
                self.lengths.append(prompt_tokens + sum(tokens[i] for i in part))

    def read(self, row: int) -> PromptWithCompletions:
        """Token ids of a row's prompt and candidates."""
        places = [self._places[number] for number in self.rows[row]]
        return self.table[places[0][0]]["prompt"], [self.table[i]["candidates"][column] for i, column in places]


def _digest(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("i", tokens).tobytes(), digest_size=16).digest()


def score_rankings(
    scalar: ScalarModel, chat: ChatTokenizer, table: Sequence[dict[str, Any]], batch_tokens: int, bar: bool = False
) -> list[ScoredRanking]:
    """Raw scores of every ranking in a table of `rlhf.data.tables` (or a list of such rows). Every rank calls it.

    A text that is in several rankings is scored once, and a prompt is encoded once for several candidates if the
    model's `shared_prompts` allow it. Lengths are in characters. See `score_texts`.
    """
    texts = _DistinctTexts(table, scalar.shared_prompts, batch_tokens)
    scores = _score_rows(scalar, chat, texts.read, texts.lengths, texts.rows, batch_tokens, bar)
    return [ScoredRanking.of(row, (scores[number] for number in numbers)) for row, numbers in zip(table, texts.members)]
