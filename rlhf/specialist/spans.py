"""The part of a context that answers a question, by SQuAD's rules (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf.data.schema import BadRecord
from rlhf.specialist.head import Batch, Head, LabelledRow, field, text_field
from rlhf.tasks.answers import normalised
from rlhf.tasks.metrics import MetricValue, fraction_of, mean_of, measure_columns


class SpanAnswers(NamedTuple):
    """The right answers of a question; none where its context has no answer."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]
    """The index in the context of the first character of each."""


@dataclass(frozen=True)
class Spans(Head):
    """The head `span`."""

    question: str
    context: str
    answer: str
    start: str | None
    longest: int
    no_answer: bool

    auto_class = "AutoModelForQuestionAnswering"
    tuning_task = "span"
    headline = ("exact_match", "token_f1")

    def example(self, row: Mapping[str, Any]) -> LabelledRow:
        question, context = (text_field(row, name, name) for name in (self.question, self.context))
        texts, starts = _given(field(row, self.answer, "answer"), None if self.start is None else row.get(self.start))
        places = []
        for text, start in zip(texts, starts):
            place = context.find(text) if start is None else start
            if place < 0:
                raise BadRecord("answer: does not occur in the context", f"{text[:100]!r}")
            if context[place : place + len(text)] != text:
                found = context[place : place + len(text)]
                raise BadRecord(
                    "answer: is not where `start` says", f"{text[:60]!r}; at {place} there is {found[:60]!r}"
                )
            places.append(place)
        if not texts and not self.no_answer:
            raise BadRecord("answer: empty", remedy="Set the task's option no_answer, or leave the row out.")
        return LabelledRow((question, context), SpanAnswers(tuple(texts), tuple(places)))

    def encode(self, tokenizer: Any, example: LabelledRow, limit: int) -> dict[str, Any]:
        question, context = example.inputs
        asked = len(tokenizer(question, verbose=False)["input_ids"])
        if asked + 8 > limit:
            raise BadRecord("question: leaves no room for its context", f"{asked} of {limit} tokens")
        encoded = tokenizer(
            question, context, truncation="only_second", max_length=limit, return_offsets_mapping=True, verbose=False
        )
        parts = encoded.sequence_ids()
        offsets = [pair if part == 1 else (-1, -1) for pair, part in zip(encoded.pop("offset_mapping"), parts)]
        starts, ends = [pair[0] for pair in offsets], [pair[1] for pair in offsets]
        cut = max(ends) < len(context.rstrip())
        row = {**encoded, "length": len(parts), "cut": cut, "starts": starts, "ends": ends, "context": context}
        return {**row, "target": _tokens_of(example.target, starts, ends)}

    def logits(self, output: Any) -> Tensor:
        return torch.stack([output.start_logits, output.end_logits], -1).float()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean of the losses of first and last token; a row whose answer was cut off has none."""
        hidden = batch.inputs["attention_mask"][..., None] == 0
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        both = [cross_entropy(logits[..., i], batch.targets[:, i], ignore_index=-1, reduction="sum") for i in (0, 1)]
        return (both[0] + both[1]) / 2

    def items(self, targets: Tensor) -> Tensor:
        return (targets[:, 0] >= 0).sum()

    def predictions(self, logits: Tensor, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return [self._best(one.cpu().numpy(), row) for one, row in zip(logits, rows)]

    def _best(self, logits: Any, row: Mapping[str, Any]) -> str:
        """The text of the most likely span of at most `longest` tokens; empty if no answer is more likely."""
        length = row["length"]
        inside = np.array(row["starts"][:length]) >= 0
        first, last = (np.where(inside, logits[:length, i], -np.inf) for i in (0, 1))
        allowed = np.triu(np.tri(length, k=self.longest - 1)) > 0
        scores = np.where(allowed, first[:, None] + last[None], -np.inf)
        i, j = np.unravel_index(np.argmax(scores), scores.shape)
        if self.no_answer and logits[0].sum() >= scores[i, j]:
            return ""
        return str(row["context"][row["starts"][i] : row["ends"][j]])

    def metrics(self, examples: Sequence[LabelledRow], predictions: Sequence[str]) -> list[MetricValue]:
        pairs = [(example.target.texts or ("",), text) for example, text in zip(examples, predictions)]
        plain = [([normalised(one, "squad") for one in gold], normalised(text, "squad")) for gold, text in pairs]
        exact = [text in gold for gold, text in plain]
        f1 = [max(token_f1(one, text) for one in gold) for gold, text in pairs]
        return [measure_columns("exact_match", fraction_of(exact)), measure_columns("token_f1", mean_of(np.array(f1)))]


def token_f1(gold: str, predicted: str) -> float:
    """F1 of the words that two answers share, articles and punctuation left out (SQuAD's `compute_f1`)."""
    one, other = normalised(gold, "squad").split(), normalised(predicted, "squad").split()
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))


def _given(value: Any, start: Any) -> tuple[list[str], list[int | None]]:
    """Texts of the answers, and where the row says that they start."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
    else:
        texts, starts = value, start
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("answer: neither text nor {text: [...], answer_start: [...]}", type(value).__name__)
    starts = starts if isinstance(starts, list) else [starts] * len(texts)
    if len(starts) != len(texts):
        raise BadRecord("answer: not one start for each text", f"{len(texts)} texts, {len(starts)} starts")
    try:
        places = [None if one in (None, "") else int(one) for one in starts]
    except (TypeError, ValueError):
        raise BadRecord("answer: a start that is no whole number", repr(starts)[:100]) from None
    if any(place is not None and place < 0 for place in places):
        raise BadRecord("answer: a start below 0", repr(starts)[:100])
    kept = [(text, place) for text, place in zip(texts, places) if text]
    return [text for text, _ in kept], [place for _, place in kept]


def _tokens_of(answers: SpanAnswers, starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """First and last token of the first answer; [0, 0] (the classification token) without one, [-1, -1] if cut off."""
    if not answers.texts:
        return [0, 0]
    begin, stop = answers.starts[0], answers.starts[0] + len(answers.texts[0])
    inside = [i for i, (a, b) in enumerate(zip(starts, ends)) if a >= 0 and a < stop and b > begin]
    whole = bool(inside) and ends[inside[-1]] >= stop
    return [inside[0], inside[-1]] if whole else [-1, -1]
