"""A tag for each word. Entities and their F1 are those of seqeval, which follows conlleval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf.data.schema import BadRecord
from rlhf.specialist.head import IGNORED, Batch, Head, LabelledRow, field, fitted_labels, label_name
from rlhf.tasks.metrics import MetricColumns, MetricValue, measure_columns

OUTSIDE = "O"


@dataclass(frozen=True)
class Tagging(Head):
    """The head `tags`."""

    tokens: str
    tags: str
    labels: tuple[str, ...] = ()

    auto_class = "AutoModelForTokenClassification"
    tuning_task = "tokens"
    headline = ("entity_f1", "accuracy")

    def example(self, row: Mapping[str, Any]) -> LabelledRow:
        words, tags = _items(row, self.tokens, "tokens"), _items(row, self.tags, "tags")
        if len(words) != len(tags):
            raise BadRecord("tags: not one for each token", f"{len(words)} tokens, {len(tags)} tags")
        for word in words:
            if not isinstance(word, str):
                raise BadRecord("tokens: not text", type(word).__name__)
        return LabelledRow((words,), [label_name(tag, "tags", self.labels) for tag in tags])

    def fitted(self, train: Sequence[LabelledRow], held_out: Sequence[LabelledRow]) -> Tagging:
        seen = [{tag for example in part for tag in example.target} for part in (train, held_out)]
        return replace(self, labels=fitted_labels(self.labels, *seen))

    def encode(self, tokenizer: Any, example: LabelledRow, limit: int) -> dict[str, Any]:
        encoded = tokenizer(example.inputs[0], is_split_into_words=True, truncation=True, max_length=limit)
        words, target, before = encoded.word_ids(), [], None
        for word in words:
            first = word is not None and word != before
            target.append(self.labels.index(example.target[word]) if first else IGNORED)
            before = word
        if all(one == IGNORED for one in target):
            raise BadRecord("tokens: none of them has a piece in the tokenizer")
        cut = max(word for word in words if word is not None) < len(example.target) - 1
        return {
            **encoded, "target": target, "length": len(target), "cut": cut, "words": len(example.target),
            "word_ids": [-1 if word is None else word for word in words],
        }  # fmt: skip

    def target_tensor(self, rows: Sequence[Mapping[str, Any]], width: int) -> Tensor:
        return torch.tensor([row["target"] + [IGNORED] * (width - row["length"]) for row in rows])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def items(self, targets: Tensor) -> Tensor:
        return (targets != IGNORED).sum()

    def predictions(self, logits: Tensor, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Tags of all words; OUTSIDE (or the first label) where the text was cut or a word has no piece."""
        missing = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        found = []
        for row, best in zip(rows, logits.argmax(-1).tolist()):
            tags = [missing] * row["words"]
            for index, (word, target) in enumerate(zip(row["word_ids"], row["target"])):
                if target != IGNORED:
                    tags[word] = self.labels[best[index]]
            found.append(tags)
        return found

    def metrics(self, examples: Sequence[LabelledRow], predictions: Sequence[list[str]]) -> list[MetricValue]:
        gold = [example.target for example in examples]
        right = [[sum(a == b for a, b in zip(*pair)), len(pair[0])] for pair in zip(gold, predictions)]
        accuracy = MetricColumns(np.array(right, dtype=float), lambda sums: sums[:, 0] / sums[:, 1])
        entities = [[set(get_entities(tags)) for tags in pair] for pair in zip(gold, predictions)]
        counts = [[len(one & other), len(one), len(other)] for one, other in entities]
        # F1 = 2 TP / (entities + predicted entities), summed over the rows
        f1 = MetricColumns(
            np.array(counts, dtype=float), lambda sums: 2 * sums[:, 0] / np.maximum(sums[:, 1] + sums[:, 2], 1)
        )
        return [measure_columns("entity_f1", f1), measure_columns("accuracy", accuracy)]

    def by_label(
        self, examples: Sequence[LabelledRow], predictions: Sequence[list[str]]
    ) -> dict[str, dict[str, float]]:
        gold = [example.target for example in examples]
        if not any(get_entities(tags) for tags in gold):
            return {}
        report = classification_report(gold, list(predictions), output_dict=True, zero_division=0)
        return {
            name: {key: float(value) for key, value in row.items()}
            for name, row in report.items()
            if not name.endswith(" avg")
        }


def _items(row: Mapping[str, Any], column: str, what: str) -> list[Any]:
    value = field(row, column, what)
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list):
        raise BadRecord(f"{what}: neither a list nor text", f"{type(value).__name__} in column {column!r}")
    if not items:
        raise BadRecord(f"{what}: empty", f"column {column!r}")
    return items
