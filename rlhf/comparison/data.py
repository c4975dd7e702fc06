"""The datasets of a comparison: what ways learn from, without the prompts that they are measured on."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.cli.compare_config import ComparedTask
from rlhf.core.errors import UserError
from rlhf.data.selection import open_datasets
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.tasks.task import Task, load_task

MAX_SELECTION_RECORDS = 200
"""Most `eval` records that choose the best checkpoint of a training."""


def open_task(config: ComparedTask) -> Task:
    """Read a task's data and the records that are measured.

    Raises:
        UserError: See `load_task`; or nothing is held out.
    """
    splits = open_dataset(config.dataset).splits()
    split = config.split or next((name for name in ("test", "eval") if name in splits), None)
    if split is None:
        raise UserError(
            f"{config.dataset}: nothing is held out to measure on",
            remedy="Make splits first: rlhf data split DATASET --out ...",
        )
    return load_task(config.model_copy(update={"split": split}))


def training_data(
    config: ComparedTask, task: Task, folder: Path, rankings: bool, examples: int | None, seed: int
) -> dict[str, str]:
    """Write what a cell learns from, unless it exists.

    Args:
        config: The task.
        task: The same, opened. Records of prompts that are measured are left out.
        folder: Where the datasets are written.
        rankings: Whether the way needs rankings.
        examples: Training prompts to keep, drawn with the seed; None for all.
        seed: Which draw.

    Returns:
        `train`, and `rankings` if they are needed -> path of a dataset.

    Raises:
        UserError: No record is left.
    """
    paths = {}
    sources = {"train": [config.dataset]} | ({"rankings": config.rankings} if rankings else {})
    for name, datasets in sources.items():
        path = folder / (f"{name}-all" if examples is None else f"{name}-{examples}-{seed}")
        paths[name] = str(path)
        if not (path / "manifest.json").is_file():
            kind = "demonstration" if name == "train" else "ranking"
            _write(path, datasets, kind, {record.prompt_id for record in task.records}, examples, seed)
    return paths


def _write(path: Path, datasets: list[str], kind: str, measured: set[str], examples: int | None, seed: int) -> None:
    records: list[Any] = []
    selecting: list[Any] = []
    for record in (r for one in open_datasets(datasets, [kind], "tasks") for r in one.records()):
        if record.prompt_id in measured:
            continue
        if record.split in (None, "train"):
            records.append(replace(record, split="train"))
        elif record.split == "eval" and len(selecting) < MAX_SELECTION_RECORDS:
            selecting.append(record)
    records = _drawn(records, examples, seed)
    if not records:
        raise UserError(
            f"{', '.join(datasets)}: no {kind} is left to learn from",
            "Records of the split `train` or without a split are used, if their prompt is not measured.",
        )
    with DatasetWriter(path, kind, {"compare": datasets, "examples": examples, "seed": seed}) as writer:
        for record in [*records, *selecting]:
            writer.write(record)


def _drawn(records: list[Any], examples: int | None, seed: int) -> list[Any]:
    """All records of `examples` prompts, drawn with the seed, in their order."""
    prompts = list(dict.fromkeys(record.prompt_id for record in records))
    if examples is None or examples >= len(prompts):
        return records
    chosen = set(random.Random(seed).sample(prompts, examples))
    return [record for record in records if record.prompt_id in chosen]
