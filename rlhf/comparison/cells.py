"""What a comparison runs: one cell for each task, way, number of examples and seed, and the stage configs behind it.

Stage runs are named by what they depend on, so ways that share their first stage share its run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.cli.compare_config import CompareConfig
from rlhf.cli.stage_configs import STAGES
from rlhf.config.base import StageConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError

SET_BY_COMPARISON = ("run", "model", "data", "seed", "updates")
"""Top-level keys of a stage that the comparison sets; `batch.max_steps` too."""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    task: str
    way: str
    examples: int | None
    """Training prompts; None for all."""
    seed: int

    @property
    def name(self) -> str:
        size = "all" if self.examples is None else str(self.examples)
        return f"{self.task}--{self.way}--{size}--{self.seed}"

    @property
    def detail(self) -> str:
        """What distinguishes it from the other cells of its way."""
        return (f", {self.examples:,} training prompts" if self.examples else "") + f", seed {self.seed}"


def cells(config: CompareConfig) -> Iterator[Cell]:
    """All cells: the full data first, then the smaller sets; in a row for each task, so that tables fill up early.

    A way that reads no training data has no curve: its cell with all data is the same for every number of examples.
    """
    for examples in (None, *sorted(set(config.examples))):
        for task in config.tasks:
            for way, settings in config.ways.items():
                if examples is None or settings.stages or settings.prompting().count:
                    yield from (Cell(task, way, examples, seed) for seed in seeds_of(config, way))


def seeds_of(config: CompareConfig, way: str) -> list[int]:
    """The seeds that a way is repeated with: only the first if its answers do not depend on them."""
    return config.seeds if config.ways[way].is_random else config.seeds[:1]


@dataclass(frozen=True)
class StageRun:
    """One stage of a way on a task."""

    stage: str
    values: dict[str, Any]
    """The config, with its run folder; the number of steps is not set yet if the budget is in seconds."""

    @property
    def folder(self) -> str:
        return str(self.values["run"])

    def config(self) -> StageConfig:
        """The checked config.

        Raises:
            UserError: An unknown key or an invalid value of the way.
        """
        return check_config(STAGES[self.stage], self.values, f"{self.folder} ({self.stage})")

    def with_steps(self, steps: int, folder: str | None = None) -> StageRun:
        """The same with a number of optimizer steps or updates, and optionally in another folder."""
        key = {"ppo": {"updates": steps}}.get(self.stage, {"batch": {"max_steps": steps}})
        return StageRun(self.stage, merged(self.values, key | ({"run": folder} if folder else {})))


def stage_runs(config: CompareConfig, cell: Cell, data: Mapping[str, str]) -> list[StageRun]:
    """The stages of a cell's way, in order.

    Args:
        config: The comparison.
        cell: Which.
        data: The datasets of the cell: `train`; `rankings` if the way needs them; `eval` if the records that SFT
            selects checkpoints by are not in `train`.
    """
    way = config.ways[cell.way]
    runs: list[StageRun] = []
    policy, reward = config.model.path, None
    for stage in way.stages:
        own = getattr(way, stage)
        check_own(cell.way, stage, own)
        model = config.model.model_dump(mode="json", exclude_defaults=True) | {"path": policy}
        values: dict[str, Any] = {"model": model, "seed": cell.seed, "log": {"every": 1}}
        if stage == "ppo":
            values["data"] = {"prompts": [data["train"]]}
            values |= {} if reward is None else {"reward": {"name": "model", "path": reward}}
        else:
            values["data"] = {"train": [data["train" if stage == "sft" else "rankings"]]}
            if stage == "sft" and "eval" in data:
                values["data"]["eval"] = [data["eval"]]
        values = merged(values, own)
        values = merged(values, _steps(config, stage, values, len(way.stages)))
        digest = hashlib.sha256(json.dumps([stage, values, config.budget.seconds], sort_keys=True).encode()).hexdigest()
        values["run"] = f"{config.run}/runs/{cell.task}-{stage}-{digest[:10]}"
        runs.append(StageRun(stage, values))
        if stage == "reward":
            reward = values["run"]
        else:
            policy = values["run"]
    return runs


def check_own(way: str, stage: str, own: Mapping[str, Any]) -> None:
    """Refuse keys that the comparison sets.

    Raises:
        UserError: Names the key.
    """
    wrong = [key for key in SET_BY_COMPARISON if key in own]
    wrong += ["batch.max_steps"] if "max_steps" in (own.get("batch") or {}) else []
    if wrong:
        raise UserError(
            f"ways.{way}.{stage}: sets {', '.join(wrong)}",
            "The comparison sets this, so that all ways have the same data and budget.",
            "Leave it out; the number of steps is `budget`.",
        )


def _steps(config: CompareConfig, stage: str, values: Mapping[str, Any], stages: int) -> dict[str, Any]:
    """The number of steps of a stage by the budget; nothing for a budget in seconds, which is measured first."""
    if config.budget.updates is not None:
        steps = config.budget.updates / stages
    elif config.budget.examples is not None:
        steps = config.budget.examples / stages / _examples_a_step(stage, values)
    else:
        return {}
    return StageRun(stage, {}).with_steps(max(1, math.ceil(steps))).values


def _examples_a_step(stage: str, values: Mapping[str, Any]) -> int:
    config = STAGES[stage].model_fields
    if stage == "ppo":
        rollout = values.get("rollout", {})
        default = config["rollout"].default
        return int(rollout.get("prompts_per_update", default.prompts_per_update)) * int(
            rollout.get("samples_per_prompt", default.samples_per_prompt)
        )
    return int(values.get("batch", {}).get("batch_size", config["batch"].default.batch_size))


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, in which the keys of `more` replace or extend those of `values`."""
    both = dict(values)
    for key, value in more.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return both
