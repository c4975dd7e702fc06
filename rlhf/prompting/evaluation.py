"""Ways of prompting measured on a task: one line of a table for each way and number of shots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.core.console import format_number, say, table
from rlhf.core.table import Pick
from rlhf.data.schema import Prompt
from rlhf.data.selection import train_records, with_system
from rlhf.inference.policy import Policy
from rlhf.prompting.masked import MaskedModel
from rlhf.prompting.run import Answered, Prompter, generation_params
from rlhf.prompting.ways import Prompting
from rlhf.rollout.types import SamplingParams
from rlhf.tasks.metrics import MetricValue, Outcomes, needs
from rlhf.tasks.task import Task


@dataclass(frozen=True)
class PromptingCell:
    """One way of prompting, with one number of shots, on one task."""

    prompting: Prompting
    answered: Answered
    measured: list[MetricValue]

    def as_dict(self) -> dict[str, Any]:
        """The metrics and facts of the cell."""
        return {
            "way": self.prompting.name, "title": self.prompting.title, "shots": self.prompting.count,
            "samples": self.prompting.samples,
            "instruction": self.prompting.wording.instruction,
            "metrics": [one.as_dict() for one in self.measured], **self.answered.facts(),
        }  # fmt: skip


def evaluate_prompting(
    model: Policy | MaskedModel, task: Task, prompting: Prompting, params: SamplingParams,
    temperature: float | None = None, seed: int = 0, system: str | None = None,
) -> PromptingCell:  # fmt: skip
    """Measure one way of prompting on a task.

    Args:
        model: A policy, or a masked language model for `cloze`.
        task: The records, and what is measured.
        prompting: The way.
        params: Sampling options; the temperature is replaced.
        temperature: By default greedy, or where answers are voted on 0.7.
        seed: Seed of examples, samples and bootstraps.
        system: A system message for questions that have none.

    Raises:
        UserError: See `Prompter` and `generation_params`.
    """
    own = prompting.count and not (prompting.shots and prompting.shots.examples_from)
    examples = list(train_records([task.data])) if own else []
    prompter = Prompter(model, prompting, task.rules, seed, examples)
    questions: Sequence[Prompt] = [with_system(record, system) for record in task.records]
    answered = prompter.answer(questions, generation_params(params, temperature, prompting, prompter.builder.layout))
    for record, right, row in zip(task.records, task.references, answered.rows):
        if row is not None:
            row["reference"] = right
            row["right"] = row["answer"] is not None and task.rules.same(row["answer"], right)
            row["prompt_id"] = record.prompt_id  # also where a system message was added
    found = outcomes(prompter, task, task.metrics, answered)
    return PromptingCell(prompting, answered, task.measure(found, seed))


def outcomes(prompter: Prompter, task: Task, metrics: Sequence[Pick], answered: Answered) -> Outcomes:
    """What metrics are computed from: the answers to the task's records that the chat template accepts.

    Args:
        prompter: The way of prompting.
        task: The records.
        metrics: Which metrics; log-probs are only computed for those that need them.
        answered: The answers to the records.
    """
    kept = [i for i, row in enumerate(answered.rows) if row is not None]
    rows, right = [answered.rows[i] or {} for i in kept], [task.references[i] for i in kept]
    found = Outcomes(right, [row["answer"] for row in rows], prompter.rules.labels)
    if any(needs(metric) == "logprobs" for metric in metrics):
        if prompter.prompting.label_words:  # of the label, among the labels
            values = [row["probabilities"][prompter.rules.label(one)] for row, one in zip(rows, right)]
            found = replace(found, logprobs=[math.log(max(p, 1e-300)) for p in values], tokens=[1] * len(rows))
        else:
            pairs = prompter.reference_logprobs([task.records[i] for i in kept])
            found = replace(found, logprobs=[total for total, _ in pairs], tokens=[size for _, size in pairs])
    return found


def show(cells: Sequence[PromptingCell], task: Task, model: str) -> None:
    """Print the table, and what pattern the answers were taken by."""
    names = [one.metric for one in cells[0].measured]
    rows = []
    for cell in cells:
        facts = cell.answered.facts()
        rows.append([
            cell.prompting.title, cell.prompting.count,
            *(_with_interval(next(m for m in cell.measured if m.metric == name)) for name in names),
            facts["unanswered"], round(facts["prompt_tokens"]), facts["examples_left_out"],
        ])  # fmt: skip
    table(
        f"{model} on {task.data.path}: {len(task.records):,} records, with 95% intervals",
        ["way", "shots", *names, "no answer", "prompt", "left out"], rows,
    )  # fmt: skip
    say("prompt: mean tokens; left out: examples that did not fit in the context")
    pattern = task.rules.pattern
    if pattern is not None:
        where = "" if task.rules.in_data else "; answers of the data are right answers as a whole"
        say(f"answer: the {pattern.take} match of {pattern.pattern}{where}")
    if task.rules.labels:
        say(f"labels: {', '.join(task.rules.labels)}")


def _with_interval(one: MetricValue) -> str:
    if one.low is None or one.high is None:
        return format_number(one.value, 3)
    return f"{format_number(one.value, 3)} [{format_number(one.low, 3)}, {format_number(one.high, 3)}]"


def answer_rows(cells: Sequence[PromptingCell]) -> list[dict[str, Any]]:
    """The answers of all cells, for JSON lines."""
    return [
        {"way": cell.prompting.title, "shots": cell.prompting.count, **row}
        for cell in cells for row in cell.answered.rows if row is not None
    ]  # fmt: skip
