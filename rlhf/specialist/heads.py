"""What a specialist learns. One table, HEADS: the columns of its rows, its head in transformers, its loss and metrics.

The options of a row name the columns of the labelled rows. Calling a pick gives a `Head` (see `rlhf.specialist.head`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from rlhf.core.lazy import lazy
from rlhf.core.table import Table

if TYPE_CHECKING:
    from rlhf.specialist import classification, spans, tagging
else:
    classification, spans = lazy("rlhf.specialist.classification"), lazy("rlhf.specialist.spans")
    tagging = lazy("rlhf.specialist.tagging")

HEADS = Table("specialist task")
Names = Annotated[list[str], Field(min_length=2)] | None
ClassWeights = Literal["none", "balanced"]


@HEADS.row("text")
def text(
    *, text: str = "text", label: str = "label", labels: Names = None, class_weights: ClassWeights = "none"
) -> Any:
    """One label for a text, such as its sentiment.

    `text` and `label` name columns. `labels` lists the labels, in the order of numeric ones (0 is the first); by
    default they are those of the training rows. `class_weights: balanced` weighs the loss of a row by
    rows / (labels x rows of its label), as scikit-learn does.
    """
    return classification.Classification((text,), label, labels=tuple(labels or ()), class_weights=class_weights)


@HEADS.row("pair")
def pair(
    *, first: str = "premise", second: str = "hypothesis", label: str = "label", labels: Names = None,
    class_weights: ClassWeights = "none",
) -> Any:  # fmt: skip
    """One label for two texts, such as whether one follows from the other.

    `first`, `second` and `label` name columns. The other options are those of `text`.
    """
    return classification.Classification(
        (first, second), label, labels=tuple(labels or ()), class_weights=class_weights
    )


@HEADS.row("tags")
def tags(*, tokens: str = "tokens", tags: str = "tags", labels: Names = None) -> Any:
    """A tag for each word, such as named entities in BIO form (B-PER, I-PER, O).

    `tokens` and `tags` name columns with lists of equal length, or texts of words separated by spaces. The first piece
    of a word carries its tag (Devlin et al. 2019, section 5.3). `labels` is as in `text`.
    """
    return tagging.Tagging(tokens, tags, labels=tuple(labels or ()))


@HEADS.row("span")
def span(
    *, question: str = "question", context: str = "context", answer: str = "answer", start: str | None = None,
    longest: PositiveInt = 30, no_answer: bool = False,
) -> Any:  # fmt: skip
    """The part of a context that answers a question (Rajpurkar et al. 2016).

    `question`, `context` and `answer` name columns. An answer is a text, or SQuAD's
    `{text: [...], answer_start: [...]}`. Its position is the column `start` (the index of its first character) if that
    is set, else its first occurrence. `longest` is the most tokens of a predicted span. With `no_answer` an empty
    answer means that the context has none (SQuAD 2); without it such rows are rejected.
    """
    return spans.Spans(question, context, answer, start, longest, no_answer)
