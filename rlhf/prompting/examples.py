"""Which solved examples precede a question: at random, by similarity, balanced by label."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np

from rlhf.core.errors import UserError
from rlhf.data.schema import Demonstration, Message, Prompt
from rlhf.prompting.ways import Shots

MOST_EXAMPLES = 10_000
"""Records from which examples are chosen; of more, a seeded sample."""
Embed = Callable[[Sequence[str]], Any]
"""Texts -> float [texts, dimensions] of length 1."""


@dataclass(frozen=True)
class Example:
    """A solved question."""

    messages: tuple[Message, ...]
    answer: str
    """The text that is shown as its answer."""
    label: str
    """Its label, or its answer in a task without labels."""
    prompt_id: str


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The turns of a conversation, without its system message."""
    return [message for message in messages if message.role != "system"]


class ExamplePool:
    """Records from which examples are chosen. The choice depends on the seed and the question alone.

    With the same seed, the first examples at random or balanced are the same for any number of shots. No question is
    its own example.

    Args:
        records: Solved records.
        shots: How examples are chosen; the number is given to `take`.
        label: Label of a record's answer, or None for a record that is not shown.
        shown: (record, label) -> the text that is shown as its answer, None for a record that is not shown.
        labels: The labels of the task; empty for other tasks.
        seed: Seed of all choices.
        embed: For `similarity: embedding`.

    Raises:
        UserError: No record can be shown.
    """

    def __init__(
        self, records: Sequence[Demonstration], shots: Shots, label: Callable[[Demonstration], str | None],
        shown: Callable[[Demonstration, str], str | None], labels: Sequence[str], seed: int, embed: Embed | None = None,
    ) -> None:  # fmt: skip
        self._shots, self._seed, self._embed = shots, seed, embed
        kept = []
        for record in records:
            found = label(record)
            if found is not None and shown(record, found) is not None:
                kept.append((record, found))
        if not kept:
            why = "They have no rationale." if shots.rationales else "Their answers are none of the labels."
            raise UserError(f"none of the {len(records):,} records can be shown as an example", why if records else "")
        if len(kept) > MOST_EXAMPLES:
            kept = random.Random(f"{seed}:pool").sample(kept, MOST_EXAMPLES)
        choices = list(labels) or sorted({answer for _, answer in kept})
        self._examples = []
        for record, found in kept:
            if shots.random_labels:
                found = random.Random(f"{seed}:{record.prompt_id}:label").choice(choices)
            answer = shown(record, found) or found
            self._examples.append(Example(record.messages, answer, found, record.prompt_id))

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, record: Prompt, count: int) -> list[Example]:
        """Examples for a question, in the order in which they are shown; fewer than `count` if there are fewer."""
        if not count:
            return []
        if self._shots.choose == "similar":
            ranked = iter(self._by_similarity(record))
        else:
            ranked = iter(self._order_of(record.prompt_id) if self._shots.redraw else self._order)
        asked = without_system(record.messages)
        others = (self._examples[i] for i in ranked if without_system(self._examples[i].messages) != asked)
        if self._shots.choose == "balanced":
            found = self._balanced(list(others), count)
        else:
            found = [example for example, _ in zip(others, range(count))]
        if self._shots.order_seed is not None:
            random.Random(f"{self._shots.order_seed}:order").shuffle(found)
        elif self._shots.choose == "similar":
            found.reverse()  # the most similar one is next to the question (Liu et al. 2022, section 3.2)
        elif self._shots.choose == "balanced":
            random.Random(f"{self._seed}:order").shuffle(found)
        return found

    def _order_of(self, name: str) -> list[int]:
        order = list(range(len(self._examples)))
        random.Random(f"{self._seed}:examples:{name}").shuffle(order)
        return order

    @cached_property
    def _order(self) -> list[int]:
        """The order for all questions."""
        return self._order_of("")

    def _balanced(self, others: Sequence[Example], count: int) -> list[Example]:
        """In turn from each label, in the order in which labels first appear."""
        by_label: dict[str, list[Example]] = {}
        for example in others:
            by_label.setdefault(example.label, []).append(example)
        return [one for turn in zip_longest(*by_label.values()) for one in turn if one is not None][:count]

    # ---- similarity --------------------------------------------------------------------------------------------------

    def _by_similarity(self, record: Prompt) -> list[int]:
        """Indices of the examples, the most similar question first."""
        (query,) = self._vectors([record.messages[-1].content])
        return np.argsort(-np.asarray(self._matrix @ query).ravel(), kind="stable").tolist()

    @cached_property
    def _matrix(self) -> Any:
        return self._vectors([example.messages[-1].content for example in self._examples])

    def _vectors(self, texts: Sequence[str]) -> Any:
        """Vectors [texts, dimensions] of length 1."""
        if self._shots.similarity == "embedding":
            if self._embed is None:
                raise UserError("similarity: embedding needs a causal language model", remedy="Use tfidf.")
            return self._embed(texts)
        return self._tfidf.transform(texts).toarray() if len(texts) == 1 else self._tfidf.transform(texts)

    @cached_property
    def _tfidf(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer  # a second to import

        return TfidfVectorizer(token_pattern=r"(?u)\w+").fit([e.messages[-1].content for e in self._examples])
