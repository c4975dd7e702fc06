"""`rlhf pipeline`: the stages of a pipeline file one after the other, each in a process of its own, then the export.

A run that is complete with the same config and the same parents is skipped, and an interrupted one continues, so the
same command can be repeated until everything is complete. With `rounds` the pipeline stops while people rank:

stages -> (propose answers -> people rank them -> train reward model and PPO again) x rounds -> export
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.annotate.rounds import Round, collect, is_dataset, new_rankings, sources
from rlhf.cli import entry
from rlhf.cli.child import run_command
from rlhf.cli.errors import exit_on_error, resume_line
from rlhf.cli.options import ConfigFile, DryRun, Hostfile, Processes
from rlhf.cli.pipeline_config import PipelineConfig, RoundsConfig
from rlhf.cli.preflight import check
from rlhf.cli.stage_configs import STAGES
from rlhf.config.base import DataConfig, StageConfig
from rlhf.config.load import load_stage_config
from rlhf.core.console import format_number, say, table
from rlhf.core.errors import UserError
from rlhf.data.schema import KINDS
from rlhf.data.selection import eval_records, open_datasets, train_records
from rlhf.data.store import open_dataset
from rlhf.export.export import check_out
from rlhf.runs.changes import check_inputs
from rlhf.runs.run import check_run_folder, data_facts, delete_run, is_complete, is_run, read_run

WAITING = 3
"""Exit status of a pipeline that waits for people to rank."""


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline: its config file and the overrides for it."""

    stage: str
    file: str
    overrides: list[str]
    config: StageConfig

    def state(self) -> str:
        """`new`, `interrupted` or `complete`.

        Raises:
            UserError: The folder holds a run of another stage or config, or one whose parents were trained again.
        """
        again = is_run(self.config.run)
        check_run_folder(self.config, self.stage, resume=again, overwrite=False)
        if not again:
            return "new"
        info = read_run(self.config.run)
        for parent in info.get("parents", []):
            path = parent["path"]
            if is_run(path) and read_run(path).get("model_fingerprint") != parent.get("fingerprint"):
                raise UserError(
                    f"{self.config.run}: was trained from an earlier result of {path}",
                    "Continuing would mix the two.",
                    "Give --overwrite to run the whole pipeline again, or another name: " + f"{self.stage}.run=...",
                )
        check_inputs(Path(self.config.run), info, {"data": self._data_now(info)})
        return "complete" if is_complete(self.config) else "interrupted"

    @staticmethod
    def _data_now(info: dict[str, Any]) -> list[dict[str, Any]]:
        """The datasets of a run with their fingerprints of now. One that was deleted since has nothing to compare."""
        paths = [str(one["path"]) for one in info.get("data", []) if "path" in one and Path(one["path"]).exists()]
        return data_facts(open_dataset(path) for path in paths)


def read_pipeline(file: str | Path, overrides: Sequence[str]) -> tuple[PipelineConfig, list[Step]]:
    """Read a pipeline file and the configs that it names. An override such as `ppo.updates=3` goes to that stage.

    Raises:
        UserError: A fault in any of the files.
    """
    by_stage: dict[str, list[str]] = {stage: [] for stage in STAGES}
    own = []
    for override in overrides:
        stage, dot, _ = override.partition("=")[0].partition(".")
        if dot and stage in by_stage:
            by_stage[stage].append(override[len(stage) + 1 :])
        else:
            own.append(override)
    entry.refuse_other_stage("pipeline", file)
    config = load_stage_config(PipelineConfig, file, own)
    steps = []
    for stage, kind in STAGES.items():
        path = getattr(config, stage)
        if path is not None:
            entry.refuse_other_stage(stage, path)
            steps.append(Step(stage, path, by_stage[stage], load_stage_config(kind, path, by_stage[stage])))
        elif by_stage[stage]:
            raise UserError(f"override {stage}.{by_stage[stage][0]}: {file} has no {stage} stage")
    return config, steps


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
    """Check everything and print configs and checks."""
    processes: int | None = None
    """Number of processes of each stage, for the checks."""
    words: Sequence[str] = ()
    """The options that start these processes."""


def command(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="name=..., rounds.size=..., or a stage's: ppo.updates=3."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Skip complete runs and continue interrupted ones; or neither.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete existing runs of those names first.")] = False,
    dry_run: DryRun = False,
    num_processes: Processes = None,
    hostfile: Hostfile = None,
) -> None:
    """Run the stages and the export in a row, optionally in rounds with new rankings by people.

    Exit status 3: the pipeline waits for people to rank.
    """
    words = entry.launch_words(num_processes, hostfile)
    with exit_on_error(resume_line(_again(config, overrides or (), words))):
        count = entry.process_count(num_processes, hostfile)
        if not run(config, overrides or (), StartOptions(resume, overwrite, dry_run, count, words)):
            raise typer.Exit(WAITING)


def _again(file: str | Path, overrides: Sequence[str], words: Sequence[str]) -> str:
    """The command that continues the pipeline: as it was given, but without --overwrite."""
    return shlex.join(["rlhf", "pipeline", "--config", str(file), *overrides, *words])


def run(file: str | Path, overrides: Sequence[str] = (), start: StartOptions = StartOptions()) -> bool:
    """Run a pipeline and print a summary.

    Args:
        file: The pipeline's YAML file.
        overrides: `name=...`, `export=...`, `rounds....`, or a stage's: `ppo.updates=3`.
        start: How the stages are started.

    Returns:
        False if a round waits for people's rankings; the way to continue has been printed.

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
    names += [f"{config.rounds.count} rounds"] if config.rounds is not None else []
    names += ["export"] if config.export is not None else []
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


def _delete_runs(config: PipelineConfig, steps: Sequence[Step]) -> None:
    """Delete the runs of all stages and rounds before the first stage starts.

    If they were deleted one by one, a killed pipeline would leave runs whose parents were trained again.
    """
    rounds = config.rounds.count if config.rounds is not None else 0
    for step in reversed(steps):
        for suffix in ("", *(f"-round-{number}" for number in range(1, rounds + 1))):
            delete_run(step.config.run + suffix)


def _train(step: Step, start: StartOptions) -> SummaryRow:
    """Run a stage, unless it is complete."""
    begun = time.monotonic()
    state = step.state()
    if state == "complete":
        return (step.stage, step.config.run, "complete already", headline(step), None)
    words = {"new": [], "interrupted": ["--resume"]}[state]
    _child(step.stage, [step.stage, "--config", step.file, *step.overrides, *words, *start.words])
    return (step.stage, step.config.run, "done", headline(step), time.monotonic() - begun)


def _check_all(steps: Sequence[Step], start: StartOptions) -> None:
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


def headline(step: Step) -> str:
    """The first three metrics of a finished run."""
    metrics: dict[str, Any] = read_run(step.config.run).get("metrics") or {}
    numbers = [(key, value) for key, value in metrics.items() if isinstance(value, (int, float))]
    return ", ".join(f"{key} {format_number(value)}" for key, value in numbers[:3])


def _policy_run(steps: Sequence[Step]) -> str:
    """The run whose policy is exported: the last stage that trains one."""
    return next(step.config.run for step in reversed(steps) if step.stage != "reward")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


# ---- rounds ------------------------------------------------------------------------------------------------------


def before_rankings(steps: Sequence[Step]) -> list[Step]:
    """The stages of the first training: only SFT if the reward model has no rankings yet."""
    reward = next(step for step in steps if step.stage == "reward")
    return list(steps) if reward.config.data.train else [step for step in steps if step.stage == "sft"]


def check_rounds(config: RoundsConfig, steps: Sequence[Step]) -> None:
    """Find faults of the rounds before the first stage starts.

    Raises:
        UserError: The prompts are not a dataset or leak between splits, or PPO would not use the new reward models.
    """
    of = {step.stage: step.config for step in steps}
    _check_splits(config, of["reward"].data)
    if "ppo" in of and _with_path(_reward(of["ppo"]), of["reward"].run, "another") == _reward(of["ppo"]):
        raise UserError(
            f"rounds: the reward of PPO does not name the run {of['reward'].run}",
            "The rankings of the rounds would never reach the policy.",
            "Set reward.path in its config to that run.",
        )


def _check_splits(config: RoundsConfig, data: DataConfig) -> None:
    """Refuse prompts that the reward model would both train on and be evaluated on, before people rank them."""
    (prompts,) = open_datasets([config.prompts], list(KINDS), "rounds.prompts")
    base, held_out = (
        open_datasets(data.train, ["ranking"], "data.train"),
        open_datasets(data.eval, ["ranking"], "data.eval"),
    )
    trained = {r.prompt_id for r in train_records(base)} if not held_out else set()
    held = {r.prompt_id for r in eval_records(held_out or base, bool(held_out))}
    against = {None: held, "train": held, "eval": trained}
    leaks = {p.prompt_id for p in prompts.records() if p.prompt_id in against.get(p.split, ())}
    if leaks:
        raise UserError(
            f"rounds.prompts: {len(leaks):,} prompts of {config.prompts} are in another split of reward's data",
            "The model would train on them and be evaluated on them.",
            "Split both by prompt, with the same seed: rlhf data split DATASET --by prompt --out ...",
        )


def rounds_table(config: RoundsConfig, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """The preflight table of the rounds."""
    first = before_rankings(steps)
    trained = ", ".join(step.stage for step in first) or "nothing"
    wanted = "one of each prompt" if config.min_rankings is None else f"{config.min_rankings:,}"
    return [
        ("before the first round", f"{trained} trained"),
        ("rounds", f"{config.count}, in {config.folder}"),
        ("proposed in each", f"{config.k} answers to each of {config.size:,} prompts of {config.prompts}"),
        ("first answered by", ", ".join(policies(steps, first))),
        ("rankings awaited", f"{wanted}, in {config.folder}/rankings*"),
        ("trained in each", ", ".join(f"{s.config.run}-round-N" for s in steps if s.stage != "sft")),
    ]


def _run_rounds(
    config: RoundsConfig, steps: list[Step], start: StartOptions, rows: list[SummaryRow]
) -> tuple[str | None, list[Step]]:
    """Rank and train in rounds; adds rows to the summary.

    Returns:
        What the pipeline waits for, None if all rounds are done; and the steps of the last training.
    """
    now = before_rankings(steps)
    for turn in range(1, config.count + 1):
        rounds = [Round(n, Path(config.folder.replace("{round}", str(n)))) for n in range(1, turn + 1)]
        last, begun = rounds[-1], time.monotonic()
        if not is_dataset(last.candidates):
            _child("propose", _propose_words(config, rounds, policies(steps, now)))
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


def policies(steps: Sequence[Step], trained: Sequence[Step]) -> list[str]:
    """The models whose answers are proposed: the newest PPO run and the SFT run, or the model that PPO starts from."""
    runs = [step.config.run for step in reversed(trained) if step.stage != "reward"]
    return runs or [step.config.model.path for step in steps if step.stage == "ppo"]


def _propose_words(config: RoundsConfig, rounds: Sequence[Round], models: Sequence[str]) -> list[str]:
    words = ["data", "propose", *models, "--prompts", config.prompts, "--count", str(config.size)]
    words += ["--k", str(config.k), "--out", str(rounds[-1].candidates)]
    words += [word for earlier in rounds[:-1] for word in ("--skip", str(earlier.candidates))]
    words += ["--temperature", str(config.temperature)] if config.temperature is not None else []
    return [*words, *(["--max-new-tokens", str(config.max_new_tokens)] if config.max_new_tokens else [])]


def in_round(step: Step, steps: Sequence[Step], rounds: Sequence[Round]) -> Step:
    """The reward or PPO stage of the last of the rounds: a new run, from the same initial model.

    The reward model is trained on its own data and all rounds' rankings, and PPO against that reward model.
    """
    suffix = f"-round-{rounds[-1].number}"
    changes: dict[str, Any] = {"run": step.config.run + suffix}
    if step.stage == "reward":
        changes["data.train"] = [*step.config.data.train, *(str(one.collected) for one in rounds)]
    else:
        reward = next(one.config.run for one in steps if one.stage == "reward")
        changes["reward"] = _with_path(_reward(step.config), reward, reward + suffix)
    overrides = [*step.overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
    return Step(step.stage, step.file, overrides, load_stage_config(STAGES[step.stage], step.file, overrides))


def _reward(config: StageConfig) -> Any:
    """PPO's reward as in its config file."""
    return config.model_dump(mode="json")["reward"]


def _with_path(value: Any, old: str, new: str) -> Any:
    """A config value in which every path `old` is replaced by `new`."""
    if isinstance(value, dict):
        return {key: _with_path(part, old, new) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_path(part, old, new) for part in value]
    return new if isinstance(value, str) and os.path.normpath(value) == os.path.normpath(old) else value


def waiting_for(last: Round, count: int, arrived: int, wanted: int) -> str:
    """What a round waits for, and the commands that collect it."""
    candidates, pulled = shlex.quote(str(last.candidates)), shlex.quote(str(last.folder / "rankings-label-studio"))
    so_far = f"{arrived:,} of {wanted:,} rankings have arrived in {last.pattern}"
    return (
        f"Round {last.number} of {count} waits for people: {so_far}\n"
        f"  at a terminal          rlhf data rank {candidates} --annotator NAME\n"
        f"  or in Label Studio     rlhf data label-studio push {candidates} --url URL\n"
        f"    and what was ranked  rlhf data label-studio pull {candidates} --url URL --out {pulled}"
    )
