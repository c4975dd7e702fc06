"""`rlhf compare`: which method suits a task? Prompting, tuning, DPO, PPO under one budget.

tasks x ways -> stage runs, each in a process of its own -> answers to held-out records -> one table, plots, a page

Finished stage runs and measured cells are kept, so the same command continues a comparison that was stopped.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from rlhf.cli.child import run_command
from rlhf.cli.compare_config import CompareConfig
from rlhf.cli.errors import exit_on_error
from rlhf.cli.options import ConfigFile
from rlhf.cli.preflight import check
from rlhf.cli.teacher_options import distill_words
from rlhf.comparison.cells import Cell, StageRun, cells, stage_runs
from rlhf.comparison.data import open_task, training_data
from rlhf.comparison.results import CellResult, collect, read_result
from rlhf.comparison.show import COLUMNS, LEGEND, TaskResult, markdown
from rlhf.config.load import dump_config, load_stage_config
from rlhf.core.console import say, table
from rlhf.core.errors import UserError, blame
from rlhf.core.files import write_json, write_text
from rlhf.data.selection import train_records
from rlhf.data.store import open_dataset
from rlhf.inference.teacher import is_server
from rlhf.runs.metrics import read_metrics
from rlhf.runs.parents import resolve_model_path
from rlhf.runs.run import is_finished, is_run, read_run
from rlhf.tasks.task import Task

PROBE_STEPS = 6
"""Steps that are timed for a budget in seconds; the first two are left out as warm-up."""


def command(
    *,
    config: ConfigFile,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Compare prompting, tuning, DPO and PPO on your own tasks: a table of quality and cost, plots, a recommendation.

    A comparison that was stopped continues with the same command.

    Args:
        overrides ([KEY=VALUE]...): Values that replace the file's: budget.updates=50 seeds=[0].
        overwrite: Delete an earlier comparison first.
        dry_run: Check everything, list the cells, and stop.
    """
    again = shlex.join(["rlhf", "compare", "--config", str(config), *(overrides or ())])
    with exit_on_error(f"Continue with: {again}"):
        compare(load_stage_config(CompareConfig, config, overrides or ()), overwrite, dry_run)


def compare(config: CompareConfig, overwrite: bool = False, dry_run: bool = False) -> list[TaskResult]:
    """Run the missing cells of a comparison, and show all results.

    Args:
        config: The comparison.
        overwrite: Delete an earlier comparison in the folder first.
        dry_run: Only check, and list the cells.

    Returns:
        The results by task.

    Raises:
        UserError: A fault in the config or data, found before training; or a stage failed.
    """
    folder = Path(config.run)
    _check_folder(folder, config, overwrite)
    new, work = not folder.exists(), Comparison(config, folder)
    try:
        work.check()
        if dry_run:
            work.list_cells()
    finally:
        if new and (dry_run or sys.exc_info()[0] is not None):
            shutil.rmtree(folder, ignore_errors=True)  # the data that was drawn for the check
    if dry_run:
        return []
    write_text(folder / "config.yaml", dump_config(config))
    todo = list(cells(config))
    for number, cell in enumerate(todo, 1):
        if read_result(work.result_file(cell)) is None:
            say(f"\n[{number}/{len(todo)}] {cell.task}: {cell.way}{cell.detail}", style="bold")
            work.run_cell(cell)
            work.write_tables()
    results = work.write_tables()
    show(results)
    say(f"Table: {folder / 'table.md'}; page: {folder / 'compare.html'}")
    return results


def _check_folder(folder: Path, config: CompareConfig, overwrite: bool) -> None:
    """Delete an earlier comparison with `overwrite`.

    Raises:
        UserError: The folder holds something else.
    """
    file = folder / "config.yaml"
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not file.is_file() or is_run(folder):
        raise UserError(f"run: {folder} exists and is not a comparison", remedy="Name another folder: run=...")
    if overwrite:
        shutil.rmtree(folder)
        return
    before, now = yaml.safe_load(file.read_text("utf-8")), config.model_dump(mode="json")
    # more tasks, ways, examples and seeds extend a comparison; earlier measurements stay valid
    for key in ("model", "budget"):
        if before.get(key) != now[key]:
            raise UserError(
                f"run: {folder} holds a comparison with another {key}",
                "Its cells cannot be compared with new ones.",
                "Use --overwrite to start again, or another folder: run=...",
            )
    for key in ("tasks", "ways"):
        for name, values in before.get(key, {}).items():
            if values != now[key].get(name, values):
                raise UserError(
                    f"run: {folder} holds a comparison with a different {key}.{name}",
                    remedy="Give the changed one a new name, use --overwrite, or another folder: run=...",
                )


class Comparison:
    """The cells of a comparison in its folder."""

    def __init__(self, config: CompareConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.base = resolve_model_path(config.model.path)
        self.tasks: dict[str, Task] = {name: open_task(task) for name, task in config.tasks.items()}

    def check(self) -> None:
        """Check the configs of all stages before the first one starts.

        Raises:
            UserError: A config has a fault; names the way.
        """
        for cell in cells(self.config):
            if cell.examples is not None or cell.seed != self.config.seeds[0]:
                continue
            teacher = (self.config.ways[cell.way].distill or {}).get("teacher")
            if teacher is not None and not is_server(teacher):
                with blame(f"ways.{cell.way}.distill.teacher"):
                    resolve_model_path(teacher)
            pending, data = dict[str, str](), self._learned(cell)
            if not Path(data["train"]).exists():  # until its teacher has answered: the same prompts, their own answers
                data = self._data(cell)
            for stage in stage_runs(self.config, cell, data):
                with blame(f"ways.{cell.way}"):
                    check(stage.stage, self._sized(stage).config(), is_run(stage.folder), False, None, pending)
                pending[stage.folder] = stage.stage

    def list_cells(self) -> None:
        """Print what would be run."""
        rows = []
        for cell in cells(self.config):
            done = "measured" if read_result(self.result_file(cell)) is not None else "to do"
            way = self.config.ways[cell.way]
            stages = " -> ".join(["distill"] * bool(way.distill) + way.stages) or "no training"
            rows.append((cell.task, cell.way, cell.examples or "all", cell.seed, stages, done))
        table("Cells", ("task", "way", "training prompts", "seed", "stages", "state"), rows)

    def result_file(self, cell: Cell) -> Path:
        return self.folder / "results" / f"{cell.name}.json"

    def _data(self, cell: Cell) -> dict[str, str]:
        way, task = self.config.ways[cell.way], self.config.tasks[cell.task]
        rankings, place = way.dpo is not None or way.reward is not None, self.folder / "data" / cell.task
        return training_data(task, self.tasks[cell.task], place, rankings, cell.examples, cell.seed)

    def _learned(self, cell: Cell) -> dict[str, str]:
        """The training data of the way: its own, or a teacher's answers to the same prompts.

        Checkpoints are selected by the data's own answers in both cases.
        """
        data, values = self._data(cell), self.config.ways[cell.way].distill
        if values is None:
            return data
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        held_out = {"eval": data["train"]} if "eval" in open_dataset(data["train"]).splits() else {}
        return data | {"train": f"{data['train']}-{digest}"} | held_out

    def _ask_teacher(self, cell: Cell) -> None:
        """Let the way's teacher answer the training prompts; replies are kept for other seeds and sizes."""
        values, plain, taught = self.config.ways[cell.way].distill, self._data(cell), self._learned(cell)
        if values is None or (Path(taught["train"]) / "manifest.json").is_file():
            return
        replies = self.folder / "data" / cell.task / f"replies-{taught['train'].rpartition('-')[2]}"
        words = ["data", "distill", plain["train"], "--split", "train", "--out", taught["train"], "--overwrite"]
        remedy = "Fix it and repeat the command: replies are kept."
        words += ["--cache", str(replies), *distill_words(values)]
        run_command(words, "the comparison stopped: data distill", remedy)

    def run_cell(self, cell: Cell) -> None:
        """Train and measure one cell."""
        from rlhf.comparison.measure import answer_task, stored  # imports torch

        settings, config = self.config.ways[cell.way], self.config.tasks[cell.task]
        self._ask_teacher(cell)
        data = self._learned(cell)
        stages = [self._trained(stage, len(settings.stages)) for stage in stage_runs(self.config, cell, data)]
        policies = [stage.folder for stage in stages if stage.stage != "reward"]
        examples = list(train_records([open_dataset(data["train"])]))
        model = self.config.model
        if policies:  # a run has its chat template with it
            model = model.model_copy(update={"path": policies[-1], "chat_template": "auto"})
        outcomes, prompt_tokens, latency = answer_task(
            model, settings, config, self.tasks[cell.task], examples, cell.seed
        )
        parameters, size = stored(policies[-1], self.base) if policies else (0, 0)
        peaks = [peak for stage in stages if (peak := read_run(stage.folder).get("peak_memory"))]
        seconds = sum(sum(step_seconds(Path(stage.folder))) for stage in stages)
        CellResult(
            outcomes, len({record.prompt_id for record in examples}), parameters, size, seconds,
            max(peaks, default=None), prompt_tokens, latency,
        ).write(self.result_file(cell))  # fmt: skip

    def _trained(self, stage: StageRun, stages: int) -> StageRun:
        """Run a stage, unless it is complete. Returns it with its number of steps."""
        if self.config.budget.seconds is not None:
            stage = stage.with_steps(self._steps(stage, self.config.budget.seconds / stages))
        if not is_finished(stage.folder):
            self._start(stage)
        return stage

    def _start(self, stage: StageRun) -> None:
        file = Path(f"{stage.folder}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(stage.values, sort_keys=False))
        words = [stage.stage, "--config", str(file), *(["--resume"] if is_run(stage.folder) else [])]
        remedy = "Fix it and repeat the command: what is complete is kept."
        run_command(words, f"the comparison stopped: {stage.stage}", remedy)

    def _sized(self, stage: StageRun) -> StageRun:
        """The stage with its number of steps; under a budget in seconds that has not been timed yet, with one."""
        if self.config.budget.seconds is None:
            return stage
        return stage.with_steps(self._known_steps().get(Path(stage.folder).name, 1))

    def _known_steps(self) -> dict[str, int]:
        """Name of a stage run -> steps that fit into its time."""
        file = self.folder / "steps.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def _steps(self, stage: StageRun, seconds: float) -> int:
        """Steps that fit into a time, extrapolated from a few steps of a separate run; measured once and stored."""
        known, name = self._known_steps(), Path(stage.folder).name
        if name not in known:
            probe = stage.with_steps(PROBE_STEPS, folder=f"{self.folder}/probes/{name}")
            if not is_finished(probe.folder):
                self._start(probe)
            typical = statistics.median(step_seconds(Path(probe.folder))[2:])
            known[name] = max(1, int(seconds / typical))
            write_json(self.folder / "steps.json", known)
            shutil.rmtree(self.folder / "probes")
        return known[name]

    # ---- tables ---------------------------------------------------------------------------------------------------

    def results(self) -> list[TaskResult]:
        """The results so far."""
        found = {cell: read_result(self.result_file(cell)) for cell in cells(self.config)}
        return collect(self.config, {cell: result for cell, result in found.items() if result is not None})

    def write_tables(self) -> list[TaskResult]:
        """Write `table.md` and `compare.html` of the results so far."""
        from rlhf.comparison.page import render  # imports matplotlib

        results = self.results()
        page = (f"Comparison {self.folder.name}", self.facts(), results)
        write_text(self.folder / "table.md", markdown(*page))
        write_text(self.folder / "compare.html", render(*page))
        return results

    def facts(self) -> str:
        """What all ways share, in a sentence."""
        budget = {key: value for key, value in self.config.budget.model_dump().items() if value is not None}
        (unit, amount), seeds = next(iter(budget.items())), len(self.config.seeds)
        return (
            f"Base: {self.config.model.path}. Budget of each trained way: {amount:,} {unit}. "
            f"{seeds} seed{'s' if seeds > 1 else ''}."
        )


def step_seconds(run: Path) -> list[float]:
    """Seconds of each optimizer step or update of a run, from its metrics: no start-up, evaluations or checkpoints."""
    times = read_metrics(run).filter([f"time/{part}" for part in ("step", "rollout", "score", "learn")])
    return times.dropna(how="all").sum(axis=1).tolist()


def show(results: list[TaskResult]) -> None:
    """Print the tables and recommendations."""
    for result in results:
        table(f"{result.name}: {result.metric}", COLUMNS, [row.cells() for row in result.rows])
        if result.recommendation is not None:
            say(result.recommendation.text)
    say(LEGEND, style="dim")
