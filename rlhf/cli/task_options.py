"""The options of commands that measure answers on a labelled task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from rlhf.config.load import check_config
from rlhf.core.errors import UserError, blame
from rlhf.core.limits import parse_yaml
from rlhf.prompting.ways import Prompting
from rlhf.tasks.answers import answer_pattern
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.metrics import METRICS, needs
from rlhf.tasks.task import AnswerRules

Metric = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC",
        help="exact_match, accuracy, f1, rouge1, rouge2, rougeL, bleu, log_likelihood, or '{name: ..., OPTION: ...}'."
        " May be repeated. By default accuracy and f1 with --labels, else exact_match.",
    ),
]
Labels = Annotated[
    str | None, typer.Option(metavar="A,B,...", help="The labels of a classification; by default the data's answers.")
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|REGEX",
        help="How to find the answer in a text: gsm8k, the-answer-is, number, letter, boxed, last-line, or a regular"
        " expression. By default the whole text.",
    ),
]


def task_config(
    dataset: str, split: str | None, limit: int | None, metric: list[str] | None, labels: str | None,
    pattern: str | None,
) -> TaskConfig:  # fmt: skip
    """The task that options describe.

    Raises:
        UserError: A value is wrong; the pattern does not compile.
    """
    values: dict[str, Any] = {"dataset": dataset, "split": split, "limit": limit, "pattern": pattern or ""}
    values["labels"] = _names(labels)
    with blame("--metric"):
        values["metrics"] = [parse_yaml(one) if one.lstrip().startswith("{") else one for one in metric or []]
    found = check_config(TaskConfig, values, "the options")
    for one in found.metrics:
        if needs(one) in ("scores", "rival_scores"):
            raise UserError(
                f"--metric {one.name}: needs a reward, which --prompting does not have",
                remedy="Leave out --prompting and give --reward (and --against), or use `rlhf compare`.",
            )
    found.pattern_or_none()
    return found


def with_label_metrics(config: TaskConfig, ways: Sequence[Prompting]) -> TaskConfig:
    """The task, measured by accuracy and F1 if a way chooses among the labels of the data and no metric is named."""
    if config.metrics or config.labels or not any(way.label_words and not way.label_words.verbaliser for way in ways):
        return config
    return config.model_copy(update={"metrics": [METRICS.pick("accuracy"), METRICS.pick("f1")]})


def answer_rules(labels: str | None, pattern: str | None) -> AnswerRules:
    """How answers are read, without data to check the labels by.

    Raises:
        UserError: The pattern does not compile.
    """
    found = answer_pattern(pattern)
    return AnswerRules(found, tuple(_names(labels)))


def _names(labels: str | None) -> list[str]:
    return [label.strip() for label in labels.split(",")] if labels else []
