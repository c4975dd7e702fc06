"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.metrics import classification_report
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf.specialist.head import Batch, Head, LabelledRow, field, fitted_labels, label_name, text_field
from rlhf.tasks.metrics import METRICS, MetricValue, Outcomes, measure


@dataclass(frozen=True)
class Classification(Head):
    """The heads `text` and `pair`."""

    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ()
    class_weights: str = "none"
    weights: tuple[float, ...] = ()
    """The weight of each label in the loss; empty where all are 1."""

    auto_class = "AutoModelForSequenceClassification"
    tuning_task = "scalar"
    headline = ("accuracy", "f1")

    def example(self, row: Mapping[str, Any]) -> LabelledRow:
        texts = tuple(text_field(row, column, column) for column in self.columns)
        return LabelledRow(texts, label_name(field(row, self.label, "label"), "label", self.labels))

    def fitted(self, train: Sequence[LabelledRow], held_out: Sequence[LabelledRow]) -> Classification:
        counts = Counter(example.target for example in train)
        labels = fitted_labels(self.labels, set(counts), {example.target for example in held_out})
        weights: tuple[float, ...] = ()
        if self.class_weights == "balanced":
            weights = tuple(len(train) / (len(counts) * counts[name]) if counts[name] else 0.0 for name in labels)
        return replace(self, labels=labels, weights=weights)

    def encode(self, tokenizer: Any, example: LabelledRow, limit: int) -> dict[str, Any]:
        encoded = tokenizer(*example.inputs, verbose=False)
        cut = len(encoded["input_ids"]) > limit
        if cut:
            encoded = tokenizer(*example.inputs, truncation=True, max_length=limit)
        target = self.labels.index(example.target)
        return {**encoded, "target": target, "length": len(encoded["input_ids"]), "cut": cut}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(logits, batch.targets, self._weights(logits.device), reduction="sum")

    def items(self, targets: Tensor) -> Tensor:
        weights = self._weights(targets.device)
        return torch.tensor(float(len(targets)), device=targets.device) if weights is None else weights[targets].sum()

    def _weights(self, device: Any) -> Tensor | None:
        return torch.tensor(self.weights, device=device) if self.weights else None

    def predictions(self, logits: Tensor, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return [self.labels[index] for index in logits.argmax(-1).tolist()]

    def metrics(self, examples: Sequence[LabelledRow], predictions: Sequence[str]) -> list[MetricValue]:
        # Macro F1 is over the labels that occur, as scikit-learn's default.
        seen = sorted({example.target for example in examples} | set(predictions))
        outcomes = Outcomes([example.target for example in examples], predictions, seen)
        return [measure(METRICS.pick({"name": name, "normalise": "none"}), outcomes) for name in self.headline]

    def by_label(self, examples: Sequence[LabelledRow], predictions: Sequence[str]) -> dict[str, dict[str, float]]:
        gold = [example.target for example in examples]
        names = list(self.labels)
        report = classification_report(gold, predictions, labels=names, output_dict=True, zero_division=0)
        return {name: report[name] for name in names}
