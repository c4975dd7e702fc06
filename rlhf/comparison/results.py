"""Measured cells, on disk and as tables: means over seeds, intervals over records, the recommendation of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.cli.compare_config import CompareConfig
from rlhf.comparison.cells import Cell, seeds_of
from rlhf.comparison.quality import Quality, quality, recommend
from rlhf.comparison.show import TaskResult, WayRow
from rlhf.core.files import write_json
from rlhf.core.limits import read_json_object
from rlhf.tasks.metrics import Outcomes, limits, needs


@dataclass(frozen=True)
class CellResult:
    """What was measured in a cell."""

    outcomes: Outcomes
    """The answers to the task's held-out records, in the same order for all cells of the task."""
    training_prompts: int
    trained_parameters: int
    stored_bytes: int
    training_seconds: float
    peak_bytes: float | None
    prompt_tokens: float
    latency: float

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))


def read_result(path: Path) -> CellResult | None:
    """A stored cell; None if it is not measured yet."""
    if not path.is_file():
        return None
    values = read_json_object(path)
    return CellResult(**values | {"outcomes": Outcomes(**values["outcomes"])})


def collect(config: CompareConfig, found: Mapping[Cell, CellResult]) -> list[TaskResult]:
    """The tasks with what is measured of them so far."""
    return [_task_result(config, task, found) for task in config.tasks]


def _task_result(config: CompareConfig, task: str, found: Mapping[Cell, CellResult]) -> TaskResult:
    metric, baseline = config.tasks[task].metric, next(iter(config.ways))
    qualities: dict[str, Quality] = {}
    rows: list[WayRow] = []
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    for way, settings in config.ways.items():
        for examples in (*sorted(set(config.examples)), None):
            cells = [Cell(task, way, examples, seed) for seed in seeds_of(config, way)]
            if not all(cell in found for cell in cells):
                continue
            repeats = [found[cell] for cell in cells]
            rivals = [found.get(_baseline(config, task, cell.seed)) for cell in cells]
            if needs(metric) == "rival_scores" and not all(rivals):
                continue
            outcomes = [  # with the scores of the baseline's answers, which `win_rate` compares with
                replace(one.outcomes, rival_scores=rival.outcomes.scores) if rival is not None else one.outcomes
                for one, rival in zip(repeats, rivals)
            ]
            columns = [metric(one) for one in outcomes]
            of = quality(columns, limits(metric))
            curves.setdefault(way, []).append((repeats[0].training_prompts, of.value, *of.interval))
            if examples is None:
                qualities[way] = of
                rows.append(_row(way, settings.about, of, repeats))
    costs = {
        row.way: (row.trained_parameters, row.stored_bytes, row.training_seconds, row.prompt_tokens) for row in rows
    }
    complete = len(rows) == len(config.ways)
    chosen = recommend(qualities, costs, baseline) if complete else None
    return TaskResult(task, metric.name, rows, curves, chosen)


def _baseline(config: CompareConfig, task: str, seed: int) -> Cell:
    """The cell of the first way whose answers are compared with those of a cell with this seed."""
    way = next(iter(config.ways))
    seeds = seeds_of(config, way)
    return Cell(task, way, None, seed if seed in seeds else seeds[0])


def _row(way: str, about: str, of: Quality, repeats: Sequence[CellResult]) -> WayRow:
    low, high = of.interval

    def mean(name: str) -> float:
        return float(np.mean([getattr(one, name) for one in repeats]))

    peaks: list[Any] = [one.peak_bytes for one in repeats if one.peak_bytes]
    return WayRow(
        way, about, of.value, low, high, of.by_seed, len(repeats[0].outcomes), repeats[0].trained_parameters,
        round(mean("stored_bytes")), mean("training_seconds"), max(peaks, default=None), mean("prompt_tokens"),
        mean("latency"),
    )  # fmt: skip
