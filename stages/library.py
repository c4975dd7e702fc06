"""The stages as functions, for notebooks and scripts: `from rlhf import train_sft, train_reward, train_dpo`."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.cli import entry
from rlhf.cli.preflight import check
from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import check_config, read_values
from rlhf.core.errors import UserError
from rlhf.data.schema import Record
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.reward.sources import import_function
from rlhf.runs.lock import unlock
from rlhf.runs.run import is_complete, is_run

Config = Mapping[str, Any] | str | Path
"""The keys of docs/config.md as nested mappings, or the path of a YAML file."""
RewardFunction = Callable[[list[dict[str, str]], str], float]
"""(prompt messages, completion text) -> score."""


def train_sft(
    config: Config, data: Sequence[Record] | None = None, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Instruction tuning, as `rlhf sft`.

    Args:
        config: The keys of the SFT stage.
        data: Demonstrations or rankings, in place of `data.train`. Records of the split `eval` are held out. They are
            saved as a dataset next to the run, in `RUN-data`, so that the run can be continued and repeated.
        resume: Continue the run in the folder.
        overwrite: Delete the run in the folder first.

    Returns:
        The run folder; its `model` folder holds the result.

    Raises:
        UserError: As on the command line: what is wrong, and what to do.
    """
    return _train("sft", config, "train", data, resume, overwrite)


def train_reward(
    config: Config, data: Sequence[Record] | None = None, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """A reward model from rankings, as `rlhf reward`. For the arguments see `train_sft`."""
    return _train("reward", config, "train", data, resume, overwrite)


def train_dpo(
    config: Config, data: Sequence[Record] | None = None, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """A policy from rankings without RL, as `rlhf dpo`. For the arguments see `train_sft`."""
    return _train("dpo", config, "train", data, resume, overwrite)


def train_ppo(
    config: Config,
    prompts: Sequence[Record] | None = None,
    reward: RewardFunction | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """PPO against a reward, as `rlhf ppo`.

    Args:
        config: The keys of the PPO stage.
        prompts: Records whose prompts are used, in place of `data.prompts`.
        reward: A function in place of the key `reward`. It must be defined at the top of a module or in a cell of a
            notebook, so that the run knows it by its name.
        resume: Continue the run in the folder.
        overwrite: Delete the run in the folder first.

    Returns:
        The run folder; its `model` folder holds the policy.

    Raises:
        UserError: As on the command line: what is wrong, and what to do.
    """
    return _train("ppo", config, "prompts", prompts, resume, overwrite, reward)


def _train(
    stage: str, config: Config, key: str, records: Sequence[Record] | None, resume: bool, overwrite: bool,
    reward: RewardFunction | None = None,
) -> Path:  # fmt: skip
    """Run a stage; `records`, where they are given, become the dataset of the key `data.KEY`."""
    where, values = f"train_{stage}", copy.deepcopy(config)
    if isinstance(config, str | Path):
        where, values = str(config), read_values(config)
    values = dict(values)
    path = f"{str(values.get('run')).rstrip('/')}-data/{key}"
    if records is not None:
        values["data"] = {**values.get("data", {}), key: path}
    if reward is not None:
        values["reward"] = {"name": "function", "function": _name(reward)}
    checked = check_config(STAGES[stage], values, where)
    there = is_run(checked.run)
    if records is not None and (resume or overwrite or not there):  # else the run is refused below; its data stays
        _save(records, Path(path), known=resume and there)
    check(stage, checked, resume, overwrite)
    folder = Path(checked.run)
    if not (resume and is_complete(checked)):
        try:
            entry.run(importlib.import_module(f"stages.{stage}").run, checked, resume, overwrite)
        finally:
            unlock(folder)  # a notebook's process survives an error
    return folder


def _save(records: Sequence[Record], folder: Path, known: bool) -> None:
    """Write a dataset; the same records give the same bytes.

    Args:
        records: Its records.
        folder: Its folder.
        known: A run that was started with the dataset in `folder` is resumed, so the records must be the same.

    Raises:
        UserError: They are not.
    """
    new = folder.with_name(f"{folder.name}.new") if known else folder
    with DatasetWriter(new, None, {"function": f"train, {folder.name}"}, overwrite=True) as writer:
        for record in records:
            writer.write(record)
    if not known:
        return
    try:
        same = open_dataset(new).fingerprint == open_dataset(folder).fingerprint
    finally:
        shutil.rmtree(new)
    if not same:
        raise UserError(
            f"{folder}: the run was started with other records, so resume=True would not continue the same run",
            remedy="Give the same records in the same order, or start again with overwrite=True.",
        )


def _name(function: Callable[..., Any]) -> str:
    name = f"{function.__module__}:{function.__qualname__}"
    try:
        found = import_function(name)
    except ValueError:
        found = None
    if found is not function:
        raise UserError(
            f"reward: {function.__qualname__} cannot be imported by its name",
            "A run is resumed with the name of its reward function; a lambda or an inner function has none.",
            "Define it at the top of a module, or in a cell of a notebook.",
        )
    return name
