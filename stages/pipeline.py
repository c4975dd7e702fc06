"""`rlhf pipeline`: the stages of a pipeline file in order, each in its own process, then the export.

A run that is complete with the same config and the same parents is skipped, and an interrupted one continues, so the
same command can be repeated until everything is complete. With `rounds` the pipeline stops while people rank:

stages -> (propose answers -> people rank them -> train reward model and PPO again) x rounds -> export
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from data_tools.annotate.rounds import Round, collect, is_dataset, new_rankings, sources
from rlhf.cli import entry
from rlhf.cli.child import run_command
from rlhf.cli.errors import exit_on_error, resume_line
from rlhf.cli.options import ConfigFile, DryRun, Hostfile, Processes
from rlhf.cli.pipeline_config import PipelineConfig, RoundsConfig
from rlhf.cli.preflight import check
from rlhf.core.console import say, table
from rlhf.data.store import open_dataset
from rlhf.export.export import check_out
from rlhf.runs.run import delete_run
from stages.pipeline_steps import (
    PipelineStep,
    before_rankings,
    check_rounds,
    headline,
    in_round,
    policies,
    propose_words,
    read_pipeline,
    rounds_table,
    waiting_for,
)

WAITING = 3
"""Exit status of a pipeline that waits for people to rank."""


SummaryRow = tuple[str, str, str, str, float | None]
"""A row of the summary: stage, folder, status, result, seconds."""


@dataclass(frozen=True)
class StartOptions:
    """How the stages are started."""

    resume: bool = True
    """Skip complete runs and continue interrupted ones; otherwise an existing run is refused."""
    overwrite: bool = False
    """Delete existing runs."""
    dry_run: bool = False
    """Only check, and print configs and checks."""
    processes: int | None = None
    """Number of processes of each stage, for the checks."""
    words: Sequence[str] = ()
    """The options that start these processes."""


def command(
    *,
    config: ConfigFile,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: DryRun = False,
    num_processes: Processes = None,
    hostfile: Hostfile = None,
) -> None:
    """Run the stages and the export in a row, optionally in rounds with new rankings by people.

    Exit status 3: the pipeline waits for people to rank.

    Args:
        overrides ([KEY=VALUE]...): name=..., rounds.size=..., or a stage's: ppo.updates=3.
        resume: Skip complete runs and continue interrupted ones; or neither.
        overwrite: Delete existing runs of those names first.
    """
    words = entry.launch_words(num_processes, hostfile)
    with exit_on_error(resume_line(_again(config, overrides or (), words))):
        count = entry.process_count(num_processes, hostfile)
        if not run(config, overrides or (), StartOptions(resume, overwrite, dry_run, count, words)):
            raise typer.Exit(WAITING)


def _again(file: str | Path, overrides: Sequence[str], words: Sequence[str]) -> str:
    """The command that continues the pipeline: the given one without --overwrite."""
    return shlex.join(["rlhf", "pipeline", "--config", str(file), *overrides, *words])


def run(file: str | Path, overrides: Sequence[str] = (), start: StartOptions = StartOptions()) -> bool:
    """Run a pipeline and print a summary.

    Args:
        file: The pipeline's YAML file.
        overrides: `name=...`, `export=...`, `rounds....`, or a stage's: `ppo.updates=3`.
        start: How the stages are started.

    Returns:
        False if a round waits for human rankings; how to continue has been printed.

    Raises:
        UserError: A fault in a config, found before the first stage starts, or a stage that failed.
    """
    config, steps = read_pipeline(file, overrides)
    first = steps if config.rounds is None else before_rankings(steps)
    _check_all(first, start)
    if config.rounds is not None:
        check_rounds(config.rounds, steps)
    if config.export is not None:
        check_out(Path(config.export), Path(_policy_run(steps)), overwrite=True)
    if start.dry_run:
        if config.rounds is not None:
            table("Preflight: rounds", ("what", "how"), rounds_table(config.rounds, steps))
        return True
    names = [step.stage for step in first]
    names += [f"{config.rounds.count} rounds"] if config.rounds else []
    names += ["export"] if config.export else []
    say(f"Pipeline {config.name}: {' -> '.join(names)}")
    if start.overwrite:
        _delete_runs(config, steps)
        start = replace(start, overwrite=False, resume=True)
    rows = [_train(step, start) for step in first]
    waiting = None
    if config.rounds is not None:
        waiting, steps = _run_rounds(config.rounds, steps, start, rows)
    if waiting is None and config.export is not None:
        begun, source = time.monotonic(), _policy_run(steps)
        _child("export", ["export", source, "--out", config.export, "--overwrite"])
        rows.append(("export", config.export, "done", f"from {source}", time.monotonic() - begun))
    shown = [(*row[:-1], "-" if row[-1] is None else _clock(row[-1])) for row in rows]
    table(f"Pipeline {config.name}", ("stage", "folder", "status", "result", "time"), shown)
    if waiting is not None:
        say(f"{waiting}\n  then continue          {_again(file, overrides, start.words)}")
    return waiting is None


def _delete_runs(config: PipelineConfig, steps: Sequence[PipelineStep]) -> None:
    """Delete the runs of all stages and rounds before the first stage starts.

    If they were deleted one by one, a killed pipeline would leave runs whose parents were trained again.
    """
    rounds = config.rounds.count if config.rounds is not None else 0
    for step in reversed(steps):
        for suffix in ("", *(f"-round-{number}" for number in range(1, rounds + 1))):
            delete_run(step.config.run + suffix)


def _train(step: PipelineStep, start: StartOptions) -> SummaryRow:
    """Run a stage, unless it is complete."""
    begun, state = time.monotonic(), step.state()
    if state == "complete":
        return (step.stage, step.config.run, "complete already", headline(step), None)
    words = ["--resume"] * (state == "interrupted")
    _child(step.stage, [step.stage, "--config", step.file, *step.overrides, *words, *start.words])
    return (step.stage, step.config.run, "done", headline(step), time.monotonic() - begun)


def _check_all(steps: Sequence[PipelineStep], start: StartOptions) -> None:
    """Check every stage before the first one starts; parents that an earlier stage makes need not exist."""
    pending: dict[str, str] = {}
    for step in steps:
        state = "new" if start.overwrite or not start.resume else step.state()
        again = state != "new"
        if start.dry_run:
            entry.prepare(step.stage, step.file, step.overrides, again, start.overwrite, True, start.processes, pending)
        elif state != "complete":
            check(step.stage, step.config, again, start.overwrite, start.processes, pending)
        if state != "complete":
            pending[step.config.run] = step.stage


def _child(name: str, words: Sequence[str]) -> None:
    remedy = "Fix it and repeat the command without --overwrite: complete stages are skipped, others continue."
    run_command(words, f"the pipeline stopped: {name}", remedy)


def _policy_run(steps: Sequence[PipelineStep]) -> str:
    """The run whose policy is exported: the last stage that trains one."""
    return next(step.config.run for step in reversed(steps) if step.stage != "reward")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _run_rounds(
    config: RoundsConfig, steps: list[PipelineStep], start: StartOptions, rows: list[SummaryRow]
) -> tuple[str | None, list[PipelineStep]]:
    """Rank and train in rounds; adds rows to the summary.

    Returns:
        What the pipeline waits for, None if all rounds are done; and the steps of the last training.
    """
    now = before_rankings(steps)
    for turn in range(1, config.count + 1):
        rounds = [Round(n, Path(config.folder.replace("{round}", str(n)))) for n in range(1, turn + 1)]
        last, begun = rounds[-1], time.monotonic()
        if not is_dataset(last.candidates):
            _child("propose", propose_words(config, rounds, policies(steps, now)))
        if not is_dataset(last.collected):
            arrived = len(new_rankings(rounds, sources(rounds)))
            wanted = config.min_rankings or int(open_dataset(last.candidates).manifest["count"])
            if arrived < wanted:
                rows.append((f"round {turn}", str(last.folder), "waiting", f"{arrived:,} of {wanted:,} rankings", None))
                return waiting_for(last, config.count, arrived, wanted), now
            collect(rounds)
        learned = int(open_dataset(last.collected).manifest["count"])
        rows.append((f"round {turn}", str(last.folder), "ranked", f"{learned:,} rankings", time.monotonic() - begun))
        now = [step if step.stage == "sft" else in_round(step, steps, rounds) for step in steps]
        _check_all(now, start)
        rows += [_train(step, start) for step in now if step.stage != "sft"]
    return None, now
