"""The base of the heads, and what they share: examples, batches, labels of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord
from rlhf.tasks.metrics import MetricValue

IGNORED = -100
"""The target of a position without a loss."""


@dataclass(frozen=True)
class LabelledRow:
    """A labelled row, checked."""

    inputs: tuple[Any, ...]
    """One text, two texts, or a list of words: what the tokenizer takes."""
    target: Any
    """The label, the tags, or the `SpanAnswers` of the row."""
    split: str | None = None
    """train, eval, test, or None."""


@dataclass(frozen=True)
class Batch:
    """B rows on this process's device."""

    inputs: dict[str, Tensor]
    """int64 [B, T] each, padded: what the model takes."""
    targets: Tensor
    """int64: [B] labels, [B, T] tags (IGNORED where a position has none), [B, 2] first and last token of a span."""


class Head(ABC):
    """A row of the table HEADS. Subclasses are frozen dataclasses.

    An encoded row is a mapping of `input_ids`, perhaps `token_type_ids`, `target`, `length` (tokens) and `cut` (whether
    the model reads only the start of the text).
    """

    auto_class: ClassVar[str]
    """The class of transformers that loads the model."""
    tuning_task: ClassVar[str]
    """What the tuning methods call this head."""
    headline: ClassVar[tuple[str, ...]]
    """Names of the metrics."""
    labels: tuple[str, ...] = ()

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> LabelledRow:
        """The example of a row.

        Raises:
            BadRecord: A field is missing, of the wrong kind, or contradicts another.
        """

    def fitted(self, train: Sequence[LabelledRow], held_out: Sequence[LabelledRow]) -> Head:
        """The head with the labels and weights of the training examples.

        Raises:
            UserError: There are fewer than two labels, or a held-out label is not among the training ones.
        """
        return self

    @abstractmethod
    def encode(self, tokenizer: Any, example: LabelledRow, limit: int) -> dict[str, Any]:
        """The encoded row of an example, of at most `limit` tokens.

        Raises:
            BadRecord: Nothing is left to learn from.
        """

    def logits(self, output: Any) -> Tensor:
        """Float32 logits of a model's output: [B, labels], [B, T, labels], or [B, T, 2] for first and last tokens."""
        return output.logits.float()

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss summed over the items of a batch, nats."""

    @abstractmethod
    def items(self, targets: Tensor) -> Tensor:
        """What the summed loss is divided by: a scalar."""

    @abstractmethod
    def predictions(self, logits: Tensor, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The model's prediction for each row, in the form of an example's target."""

    @abstractmethod
    def metrics(self, examples: Sequence[LabelledRow], predictions: Sequence[Any]) -> list[MetricValue]:
        """The metrics of the held-out rows, with their intervals."""

    def by_label(self, examples: Sequence[LabelledRow], predictions: Sequence[Any]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number of each label; empty for spans."""
        return {}

    def target_tensor(self, rows: Sequence[Mapping[str, Any]], width: int) -> Tensor:
        """The targets of encoded rows, for inputs padded to `width` tokens."""
        return torch.tensor([row["target"] for row in rows])

    def batch(self, tokenizer: Any, rows: Sequence[Mapping[str, Any]], device: Any) -> Batch:
        """Encoded rows as padded tensors."""
        names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
        inputs = tokenizer.pad({name: [row[name] for row in rows] for name in names}, return_tensors="pt")
        inputs["attention_mask"] = torch.stack(
            [torch.arange(inputs["input_ids"].shape[1]) < row["length"] for row in rows]
        ).long()
        targets = self.target_tensor(rows, inputs["input_ids"].shape[1])
        return Batch({name: part.to(device) for name, part in inputs.items()}, targets.to(device))


def field(row: Mapping[str, Any], column: str, what: str) -> Any:
    """The value of a column.

    Raises:
        BadRecord: There is none.
    """
    if row.get(column) is None:
        columns = ", ".join(map(repr, list(row)[:20]))
        raise BadRecord(f"{what}: missing", f"no value in column {column!r}; the row has {columns}", _NAME_IT)
    return row[column]


_NAME_IT = "Name its column in the options of `task`, or leave the row out."


def text_field(row: Mapping[str, Any], column: str, what: str) -> str:
    """The text of a column.

    Raises:
        BadRecord: It is missing, empty or no text.
    """
    value = field(row, column, what)
    if not isinstance(value, str):
        raise BadRecord(f"{what}: not text", f"{type(value).__name__} in column {column!r}", _NAME_IT)
    if not value.strip():
        raise BadRecord(f"{what}: empty", f"column {column!r}")
    return value


def label_name(value: Any, what: str, known: Sequence[str]) -> str:
    """A label as text: itself, or with `known` labels also by its number from 0.

    Raises:
        BadRecord: It is empty, no text or number, or not one of `known`.
    """
    if not isinstance(value, (str, int, float)):
        raise BadRecord(f"{what}: neither text nor a number", type(value).__name__)
    name = str(int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value)
    name = name.strip()
    if not name:
        raise BadRecord(f"{what}: empty")
    if not known or name in known:
        return name
    if name.isdecimal() and len(name) < 6 and int(name) < len(known):
        return known[int(name)]
    raise BadRecord(f"{what}: not one of `labels`", f"{name[:100]!r}; they are {', '.join(map(repr, known[:20]))}")


def fitted_labels(known: Sequence[str], train: set[str], held_out: set[str]) -> tuple[str, ...]:
    """The labels of a head: `known` ones, or those of the training rows, sorted.

    Raises:
        UserError: The training rows have fewer than two, or a held-out label is not among them.
    """
    if len(train) < 2:
        only = f"All of them have the label {next(iter(train))!r}." if train else "No row has a label."
        raise UserError(
            "data.train: a specialist needs rows of two labels or more", only, "Add rows of other labels to data.train."
        )
    new = sorted(held_out - train)
    if new:
        raise UserError(
            f"data.eval: held-out rows have labels that no training row has: {', '.join(map(repr, new[:10]))}",
            "The model could never predict them.",
            "Add training rows of these labels, or remove or rename them in the held-out rows.",
        )
    return tuple(known) or tuple(sorted(train))
