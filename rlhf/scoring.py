"""Scores of texts and of whole rankings by a scalar model, each text encoded once."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rlhf import distributed
from rlhf.console import track
from rlhf.models import ScalarModel
from rlhf.reward_metrics import ScoredRanking
from rlhf.tokenization import ChatTokenizer


def score_texts(
    scalar: ScalarModel,
    chat: ChatTokenizer,
    read: Callable[[int], Sequence[int]],
    lengths: Sequence[int],
    batch_tokens: int,
    bar: bool = False,
) -> list[float]:
    """Raw scores (the head's output, before `mean` and `std`) of tokenised texts. Every rank calls it together.

    Texts of similar length are scored together, without dropout and without gradients, spread over the ranks.

    Args:
        read: Gives the token ids of a text by its number, when its turn comes.
        lengths: Tokens of each text.
        batch_tokens: Most tokens, padding included, in one forward pass; a longer text goes alone.
        bar: Show a progress bar. Not where another one is shown.

    Returns:
        One score per text, the same on every rank.
    """
    batches = list(_batches(lengths, batch_tokens))
    ranks = distributed.world_size()
    batches += [[]] * (-len(batches) % ranks)  # every rank makes the same number of calls
    device = next(scalar.parameters()).device
    training = scalar.training
    scalar.eval()
    found = [torch.zeros(0, 2, dtype=torch.float64, device=device)]
    mine = batches[distributed.rank() :: ranks]
    with torch.no_grad():
        for batch in track(mine, "scoring", unit="batch") if bar else mine:
            ids, mask = chat.pad([read(i) for i in batch] or [[chat.pad_id]], device)
            scores = (scalar(ids, mask) * scalar.std + scalar.mean)[: len(batch)]
            index = torch.tensor(batch, dtype=torch.float64, device=device)
            found.append(torch.stack((index, scores.double()), 1))
    scalar.train(training)
    scored = distributed.all_gather_rows(torch.cat(found)).tolist()
    by_index = {int(index): score for index, score in scored}
    return [by_index[i] for i in range(len(lengths))]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, cut where the padded batch would pass `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class _Answers:
    """The distinct texts (prompt and candidate) of a table of rankings, read from it when asked for."""

    def __init__(self, table: Sequence[dict[str, Any]]) -> None:
        self.table = table
        self.lengths: list[int] = []
        self.members: list[list[int]] = []
        """Of each ranking, which text each of its candidates is."""
        self._places: list[tuple[int, int]] = []
        known: dict[bytes, int] = {}
        for row, ranking in enumerate(table):
            numbers = []
            for column, answer in enumerate(ranking["candidates"]):
                text = array("i", [*ranking["prompt"], *answer])
                number = known.setdefault(hashlib.blake2b(text.tobytes(), digest_size=16).digest(), len(known))
                if number == len(self._places):
                    self._places.append((row, column))
                    self.lengths.append(len(text))
                numbers.append(number)
            self.members.append(numbers)

    def read(self, number: int) -> Sequence[int]:
        """Token ids of a text."""
        row, column = self._places[number]
        ranking = self.table[row]
        return [*ranking["prompt"], *ranking["candidates"][column]]


def score_rankings(
    scalar: ScalarModel, chat: ChatTokenizer, table: Sequence[dict[str, Any]], batch_tokens: int, bar: bool = False
) -> list[ScoredRanking]:
    """Raw scores of every ranking in a table of `rlhf.data` (or a list of such rows). Every rank calls it together.

    A text that stands in several rankings is scored once. Lengths are in characters. See `score_texts`.
    """
    answers = _Answers(table)
    scores = score_texts(scalar, chat, answers.read, answers.lengths, batch_tokens, bar)
    return [
        ScoredRanking(
            ranks=tuple(row["ranks"]),
            scores=tuple(scores[number] for number in numbers),
            lengths=tuple(row["characters"]),
            source=row["source"],
            annotator=row["annotator"],
            group=row["group"],
        )
        for row, numbers in zip(table, answers.members)
    ]
