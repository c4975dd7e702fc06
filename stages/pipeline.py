"""`rlhf pipeline`: the stages of a pipeline file one after the other, each in a process of its own, then the export.

A run that is complete with the same config and the same parents is skipped, one that was interrupted continues; so
the same command may be given until all is done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import entry
from rlhf.config import STAGES, PipelineConfig, StageConfig
from rlhf.config_file import load_config
from rlhf.console import number, say, table
from rlhf.errors import UserError
from rlhf.export import check_out
from rlhf.launch import PARENT, run_child
from rlhf.plan import check
from rlhf.runs import check_run_folder, is_run, read_run


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline: its config file and the overrides that are meant for it."""

    stage: str
    file: str
    overrides: list[str]
    config: StageConfig

    def state(self) -> str:
        """`new`, `interrupted` or `complete`.

        Raises:
            UserError: The folder holds something else: another stage, another config, or a result that was made from
                other parents than the ones there now.
        """
        check_run_folder(self.config, self.stage, resume=True, overwrite=False)
        if not is_run(self.config.run):
            return "new"
        info = read_run(self.config.run)
        for parent in info.get("parents", []):
            path = parent["path"]
            if is_run(path) and read_run(path).get("model_fingerprint") != parent.get("fingerprint"):
                raise UserError(
                    f"{self.config.run}: was made from another result of {path} than the one there now",
                    "Continuing would mix the two.",
                    "Give --overwrite to run the whole pipeline anew, or another name: " + f"{self.stage}.run=...",
                )
        return "complete" if info.get("status") == "complete" else "interrupted"


def read_pipeline(file: str | Path, overrides: Sequence[str]) -> tuple[PipelineConfig, list[Step]]:
    """A pipeline file and the configs that it names. Overrides such as `ppo.updates=3` go to that stage's config.

    Raises:
        UserError: A fault in any of the files.
    """
    apart: dict[str, list[str]] = {stage: [] for stage in STAGES}
    own = []
    for override in overrides:
        stage, dot, _ = override.partition("=")[0].partition(".")
        if dot and stage in apart:
            apart[stage].append(override[len(stage) + 1 :])
        else:
            own.append(override)
    config = load_config(PipelineConfig, file, own)
    steps = []
    for stage, kind in STAGES.items():
        path = getattr(config, stage)
        if path is not None:
            steps.append(Step(stage, path, apart[stage], load_config(kind, path, apart[stage])))
        elif apart[stage]:
            raise UserError(f"override {stage}.{apart[stage][0]}: {file} has no {stage} stage")
    return config, steps


def run(
    file: str | Path,
    overrides: Sequence[str] = (),
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    processes: int | None = None,
    launch_words: Sequence[str] = (),
) -> None:
    """Run a pipeline and print a summary.

    Args:
        file: The pipeline's YAML file.
        overrides: `name=...`, `export=...`, or a stage's: `ppo.updates=3`.
        resume: Skip complete runs and continue interrupted ones; else any run that is there is refused.
        overwrite: Start all runs anew.
        dry_run: Check everything and print configs and plans.
        processes: How many each stage is going to have, for the checks.
        launch_words: The options that start them.

    Raises:
        UserError: A fault in a config, found before the first stage starts, or a stage that failed.
    """
    config, steps = read_pipeline(file, overrides)
    _check_all(steps, resume, overwrite, dry_run, processes)
    if config.export is not None:
        check_out(Path(config.export), Path(_policy_run(steps)), overwrite=True)
    if dry_run:
        return
    names = [step.stage for step in steps] + ["export"] * (config.export is not None)
    say(f"Pipeline {config.name}: {' -> '.join(names)}")
    rows = []
    for step in steps:
        begun = time.monotonic()
        state = "overwritten" if overwrite else step.state()
        skipped = state == "complete"
        if not skipped:
            how = {"new": [], "interrupted": ["--resume"], "overwritten": ["--overwrite"]}[state]
            _child(step.stage, [step.stage, "--config", step.file, *step.overrides, *how, *launch_words])
        took = None if skipped else time.monotonic() - begun
        rows.append((step.stage, step.config.run, "complete already" if skipped else "done", headline(step), took))
    if config.export is not None:
        begun, source = time.monotonic(), _policy_run(steps)
        _child("export", ["export", source, "--out", config.export, "--overwrite"])
        rows.append(("export", config.export, "done", f"from {source}", time.monotonic() - begun))
    shown = [(*row[:-1], "-" if row[-1] is None else _clock(row[-1])) for row in rows]
    table(f"Pipeline {config.name}", ("stage", "folder", "status", "result", "time"), shown)


def _check_all(steps: list[Step], resume: bool, overwrite: bool, dry_run: bool, processes: int | None) -> None:
    """Check every stage before the first one starts; parents that an earlier stage makes need not exist."""
    coming: dict[str, str] = {}
    for step in steps:
        state = "new" if overwrite or not resume else step.state()
        again = state == "interrupted"
        if dry_run:
            entry.prepare(step.stage, step.file, step.overrides, again, overwrite, True, processes, coming)
        elif state != "complete":
            check(step.stage, step.config, again, overwrite, processes, coming)
        if state != "complete":
            coming[step.config.run] = step.stage


def _child(name: str, words: Sequence[str]) -> None:
    """Run `rlhf WORDS` in a process of its own, so that its memory is given back at its end."""
    status = run_child([sys.executable, "-m", "stages.cli", *words], {**os.environ, PARENT: "pipeline"})
    if status == 130:
        raise KeyboardInterrupt
    if status:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        raise UserError(
            f"the pipeline stopped: {name} {how}",
            "Its own message stands above.",
            "Mend it and give the command again, without --overwrite: complete stages are skipped, others continue.",
        )


def headline(step: Step) -> str:
    """The first few figures of a finished run."""
    metrics: dict[str, Any] = read_run(step.config.run).get("metrics") or {}
    figures = [(key, value) for key, value in metrics.items() if isinstance(value, (int, float))]
    return ", ".join(f"{key} {number(value)}" for key, value in figures[:3])


def _policy_run(steps: list[Step]) -> str:
    """The run whose policy is exported: the last stage that trains one."""
    return next(step.config.run for step in reversed(steps) if step.stage != "reward")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
