"""A cell measured: the answers of a way's model to a task's held-out records, and what a request costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlhf.cli.compare_config import ComparedTask, WayConfig
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.schema import Prompt
from rlhf.inference.policy import Policy
from rlhf.inference.sampling import Sampled
from rlhf.inference.scorer import open_scorer
from rlhf.models.adapters import adapter_settings, is_adapter
from rlhf.prompting.evaluation import outcomes
from rlhf.prompting.masked import open_prompted
from rlhf.prompting.run import Prompter, generation_params
from rlhf.prompting.ways import Prompting
from rlhf.rollout.types import SamplingParams
from rlhf.runs.model_folder import read_safetensors_header
from rlhf.tasks.metrics import Outcomes, needs
from rlhf.tasks.task import Task

TIMED_REQUESTS = 5
"""Requests that are made alone for the latency, after one that warms up."""
ANSWERED_TOGETHER = 32


def answer_task(
    model: ModelConfig, way: WayConfig, config: ComparedTask, task: Task, examples: Sequence[Any], seed: int
) -> tuple[Outcomes, float, float]:
    """Ask a model the held-out records of a task.

    Args:
        model: The run or model folder, and how its chats are rendered.
        way: How it is asked.
        config: The task.
        task: The same, opened.
        examples: Records that few-shot examples are chosen from.
        seed: Of the examples and samples.

    Returns:
        The outcomes, mean tokens of a prompt, and the median seconds of a request that is alone.
    """
    prompting: Prompting = way.prompting()
    path = model.path
    opened = open_prompted(path, model.chat_template, model.trust_remote_code)
    prompter = Prompter(opened, prompting, task.rules, seed, examples if prompting.count else ())
    params = SamplingParams(config.max_new_tokens, batch_size=ANSWERED_TOGETHER)
    params = generation_params(params, None, prompting, prompter.builder.layout)
    answered = prompter.answer(task.records, params)
    if refused := sum(row is None for row in answered.rows):
        raise UserError(
            f"{config.dataset}: {refused:,} held-out records are refused by the chat template of {path}",
            "Ways can only be compared on the same records.",
            remedy="Remove them: `rlhf data check DATASET --model MODEL` names them.",
        )
    found = outcomes(prompter, task, [config.metric], answered)
    if needs(config.metric) in ("scores", "rival_scores"):
        if not isinstance(opened, Policy):
            raise UserError(f"{path}: is a masked language model, whose labels no reward can score")
        found = replace(found, scores=_scores(str(config.reward), opened, task.records, answered.rows))
    alone = []
    for record in task.records[: TIMED_REQUESTS + 1]:
        started = time.perf_counter()
        prompter.answer([record], params)
        alone.append(time.perf_counter() - started)
    virtual = opened.model.active_peft_config.num_virtual_tokens if getattr(opened, "prompt_learning", False) else 0
    return found, answered.prompt_tokens + virtual, statistics.median(alone[1:] or alone)


def _scores(reward: str, policy: Policy, records: Sequence[Prompt], rows: Sequence[Any]) -> list[float]:
    """Scores of the written answers by the task's reward."""
    scorer = open_scorer(reward, policy)
    found: list[float] = []
    for start in range(0, len(records), ANSWERED_TOGETHER):
        some = slice(start, start + ANSWERED_TOGETHER)
        found += scorer([
            Sampled.of(policy.chat, record, row["text"].strip()) for record, row in zip(records[some], rows[some])
        ])  # fmt: skip
    return found


def stored(run: str | Path, base: str | Path) -> tuple[int, int]:
    """Trained parameters and bytes that a run adds to the base: its adapter, or its whole model.

    Args:
        run: A run whose result is a policy.
        base: The model folder that it was trained from, to tell which weights of a whole model changed.
    """
    for folder in (Path(run) / "adapter", Path(run) / "model"):
        if (folder / "adapter_config.json").is_file():
            origin = Path(adapter_settings(folder)["base_model_name_or_path"])
            if origin.resolve() == Path(base).resolve():
                return _added(folder, {})
            if is_adapter(folder) and folder.name == "model":  # the result of an earlier stage is needed as well
                before, after = stored(origin.parent, base), _added(folder, {})
                return before[0] + after[0], before[1] + after[1]
    return _added(Path(run) / "model", _tensors(Path(base)))


def _added(folder: Path, before: Mapping[str, tuple[Path, int]]) -> tuple[int, int]:
    """Elements of the tensors that are new or changed, and bytes of all weights of the folder."""
    found = _tensors(folder)
    changed = (
        count for name, (file, count) in found.items() if name not in before or not _equal(file, before[name][0], name)
    )
    return sum(changed), sum(file.stat().st_size for file in {file for file, _ in found.values()})


def _tensors(folder: Path) -> dict[str, tuple[Path, int]]:
    """Tensor -> its file and number of elements."""
    files = sorted(folder.glob("*.safetensors"))
    headers = [(file, read_safetensors_header(file)) for file in files]
    return {name: (file, math.prod(facts["shape"])) for file, header in headers for name, facts in header.items()}


def _equal(one: Path, other: Path, name: str) -> bool:
    with safe_open(one, "pt") as mine, safe_open(other, "pt") as theirs:
        a, b = mine.get_tensor(name), theirs.get_tensor(name)
    return a.shape == b.shape and bool(torch.equal(a, b.to(a.dtype)))
