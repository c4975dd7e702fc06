"""EleutherAI's lm-evaluation-harness on a policy: tasks with right answers, before and after alignment.

Needs the extra `lm-eval`. The harness decides how a task is asked and scored.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt

from rlhf.cli.sampling_options import SamplingOptions
from rlhf.config.base import Strict
from rlhf.config.load import check_config, inline_values, read_values
from rlhf.core.console import format_number, table
from rlhf.core.errors import UserError
from rlhf.evaluation.tables import between
from rlhf.runs.parents import resolve_model_path

if TYPE_CHECKING:  # imports torch
    from rlhf.inference.policy import Policy

SEED = 1234
"""The harness's own seed of few-shot examples and generation, to which --seed is added."""


class HarnessConfig(Strict):
    tasks: list[str]
    """Names of tasks or groups of the harness, or of those in `include_path`."""
    include_path: str = ""
    """A folder with task files of your own. Functions that such a file names are Python code that runs."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question; by default as the task says."""
    limit: PositiveInt | None = None
    """Only the first questions of each task; for trying out."""
    batch_size: PositiveInt = 8
    """Sequences in one forward pass."""
    apply_chat_template: bool = False
    """Ask in the model's chat template, the task's description as system message."""
    gen_kwargs: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Options of generation, such as max_gen_toks, in place of the task's."""


def evaluate_harness(model: str, against: str | None, spec: str, sampling: SamplingOptions) -> dict[str, Any]:
    """One or two policies on tasks of the harness, printed and returned.

    Raises:
        UserError: There is no such model, or see `read_harness` and `open_tasks`.
    """
    config = read_harness(spec)
    for name in [model, *([against] if against else [])]:
        resolve_model_path(name)
    manager = open_tasks(config)
    found = run_tasks(sampling.open(model), config, manager, sampling.seed)
    rows = found["scores"]
    if against:
        rows = compared(found, run_tasks(sampling.open(against), config, manager, sampling.seed))
    columns = ("task", "metric", "questions", model, *((against, "difference, 95% interval") if against else ()))
    table("lm-evaluation-harness", columns, score_rows(rows, bool(against)))
    facts = {"model": model, "seed": sampling.seed, "lm_eval": config.model_dump()}
    facts |= {"version": importlib.metadata.version("lm_eval")}
    return facts | ({"against": against} if against else {}) | {"scores": rows}


def read_harness(spec: str) -> HarnessConfig:
    """The tasks that `--lm-eval` names.

    Args:
        spec: Names of tasks with commas between them, a mapping such as ``{tasks: [arc_easy], num_fewshot: 5}``, or a
            YAML file of one.

    Raises:
        UserError: It is none of these, or a value is wrong.
    """
    values = read_values(spec) if spec.endswith((".yaml", ".yml")) else inline_values(spec, "--lm-eval")
    if values is None:
        values = {"tasks": [name.strip() for name in spec.split(",") if name.strip()]}
    config = check_config(HarnessConfig, values, "--lm-eval")
    if not config.tasks:
        raise UserError("--lm-eval: names no task", remedy="Name some, such as arc_easy,hellaswag.")
    if config.include_path and not Path(config.include_path).is_dir():
        raise UserError(f"--lm-eval: include_path {config.include_path}: is no folder")
    return config


def open_tasks(config: HarnessConfig) -> Any:
    """The harness's `TaskManager`, which knows all tasks.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        what = f"--lm-eval needs the package lm-eval, which cannot be imported ({error})"
        raise UserError(what, remedy="Install it: pip install 'rlhf-rankings[lm-eval]'") from None
    manager = TaskManager(include_path=config.include_path or None)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            near = ", ".join(get_close_matches(name, manager.all_tasks)) or "`lm-eval ls tasks` lists them"
            raise UserError(f"--lm-eval: there is no task {name!r}", remedy=f"Near: {near}.")
    return manager


def run_tasks(policy: Policy, config: HarnessConfig, manager: Any, seed: int) -> dict[str, Any]:
    """A policy on the tasks.

    Returns:
        `scores`: rows of {task, metric, filter, value, stderr, questions}, stderr None where the harness gives none;
        and `samples`: (task, metric, filter) -> the value of each question, where it is a number.

    Raises:
        UserError: A task cannot be run, mostly because its dataset is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if policy.prompt_learning:
        what = f"{policy.path}: lm-eval cannot use learned virtual tokens"
        raise UserError(what, remedy="Name a run of another tuning.")
    model = HFLM(
        pretrained=policy.model, tokenizer=policy.chat.tokenizer, batch_size=config.batch_size, max_length=policy.limit
    )
    try:
        found = simple_evaluate(
            model=model, tasks=list(config.tasks), task_manager=manager, num_fewshot=config.num_fewshot,
            limit=config.limit, apply_chat_template=config.apply_chat_template, gen_kwargs=config.gen_kwargs or None,
            batch_size=config.batch_size, bootstrap_iters=1000, random_seed=seed, numpy_random_seed=SEED + seed,
            torch_random_seed=SEED + seed, fewshot_random_seed=SEED + seed,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"--lm-eval {','.join(config.tasks)}: {type(error).__name__}: {error}",
            "Most tasks load their dataset from the Hugging Face hub, which needs a network and no HF_HUB_OFFLINE.",
            "Without one, write a task of your own with `dataset_path: json`; see docs/policy-evaluation.md.",
        ) from error
    assert found is not None  # this is the only process
    return {"scores": _scores(found), "samples": _samples(found.get("samples", {}))}


def _scores(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = metrics.get(f"{metric}_stderr,{kind}")
                rows.append({
                    "task": task, "metric": metric, "filter": kind, "value": float(value),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "questions": counts.get("effective"),
                })  # fmt: skip
    return rows


def _samples(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str, str], list[float]]:
    columns: dict[tuple[str, str, str], list[float]] = {}
    for task, rows in found.items():
        for row in sorted(rows, key=lambda one: one["doc_id"]):
            for metric in row.get("metrics", []):
                if isinstance(value := row.get(metric), (int, float)):
                    columns.setdefault((task, metric, row.get("filter", "none")), []).append(float(value))
    return columns


def compared(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of the first with `against` and the difference of the two, paired by question where both have values
    of each: see `rlhf.evaluation.estimates.clustered_mean`."""
    import numpy as np

    from rlhf.evaluation.estimates import clustered_mean

    others = {(row["task"], row["metric"], row["filter"]): row for row in theirs["scores"]}
    rows = []
    for row in mine["scores"]:
        key = (row["task"], row["metric"], row["filter"])
        pair = [np.array(side["samples"].get(key, [])) for side in (mine, theirs)]
        paired = len(pair[0]) == len(pair[1]) > 0
        gap = clustered_mean(pair[0] - pair[1], np.arange(len(pair[0]))) if paired else None
        rows.append(row | {"against": others[key]["value"] if key in others else None, "difference": gap})
    return rows


def score_rows(rows: Sequence[Mapping[str, Any]], against: bool) -> list[tuple[Any, ...]]:
    """Rows of the printed table."""
    found = []
    for row in rows:
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else f" +- {format_number(row['stderr'])}"
        cells = [row["task"], name, row["questions"], format_number(row["value"]) + error]
        if against:
            gap = row["difference"]
            known = gap is not None and gap["low"] is not None
            difference = f"{gap['value']:+.4f} ({between(gap, '+.4f')})" if known else "-"
            cells += [format_number(row["against"]), difference]
        found.append(tuple(cells))
    return found
