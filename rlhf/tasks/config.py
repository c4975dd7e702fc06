"""The config of a labelled task."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from rlhf.config.base import Strict
from rlhf.core.table import Pick
from rlhf.tasks.answers import AnswerPattern, Take, answer_pattern
from rlhf.tasks.metrics import METRICS


class TaskConfig(Strict):
    dataset: Annotated[str, Field(min_length=1)]
    """A dataset of demonstrations: a folder or JSONL file. Their answers count as correct."""
    metrics: list[Annotated[Pick, METRICS]] = []
    """What is measured. By default `accuracy` and `f1` if `labels` are listed, else `exact_match`."""
    labels: list[str] = []
    """The labels of a classification task. With the metrics `accuracy` and `f1`, by default the answers of the data."""
    pattern: str = ""
    """How to find the answer in a text, both in the data and in what a model writes: gsm8k, the-answer-is, number,
    letter, boxed, last-line, or a regular expression. By default the whole text."""
    take: Take = "last"
    """Which match of `pattern` counts."""
    split: str | None = None
    """The records that are measured: train, eval or test. By default eval, or everything if there are no splits."""
    limit: PositiveInt | None = None
    """The most records that are measured; the first ones are taken."""

    def pattern_or_none(self) -> AnswerPattern | None:
        """The compiled pattern.

        Raises:
            UserError: It does not compile.
        """
        return answer_pattern(self.pattern, self.take)
