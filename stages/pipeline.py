"""`rlhf pipeline`: the stages of a pipeline file one after the other, each in a process of its own, then the export.

A run that is complete with the same config and the same parents is skipped, one that was interrupted continues; so
the same command may be given until all is done. With `rounds` that includes the times when people rank:

stages -> (answers proposed -> people rank them -> reward model and PPO anew) x rounds -> export
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.annotate.rounds import Round, collect, is_dataset, sources, untaken
from rlhf.cli import entry
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
from rlhf.data.store import open_dataset
from rlhf.data.tables import eval_records, open_all, train_records
from rlhf.distributed.launch import PARENT, run_child
from rlhf.export.export import check_out
from rlhf.runs.run import check_run_folder, is_run, read_run

WAITING = 3
"""Exit status of a pipeline that waits for people to rank."""


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
    config = load_stage_config(PipelineConfig, file, own)
    steps = []
    for stage, kind in STAGES.items():
        path = getattr(config, stage)
        if path is not None:
            steps.append(Step(stage, path, apart[stage], load_stage_config(kind, path, apart[stage])))
        elif apart[stage]:
            raise UserError(f"override {stage}.{apart[stage][0]}: {file} has no {stage} stage")
    return config, steps


Row = tuple[str, str, str, str, float | None]
"""Of the summary: stage, folder, status, result, seconds."""


@dataclass(frozen=True)
class How:
    """How the stages are started."""

    resume: bool
    """Skip complete runs and continue interrupted ones; else any run that is there is refused."""
    overwrite: bool
    """Start all runs anew."""
    dry_run: bool
    """Check everything and print configs and plans."""
    processes: int | None
    """How many each stage is going to have, for the checks."""
    launch_words: Sequence[str]
    """The options that start them."""


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
    launching = entry.launch_words(num_processes, hostfile)
    again = ["rlhf", "pipeline", "--config", str(config), *(overrides or ()), *launching]
    with exit_on_error(resume_line(shlex.join(again))):
        count = entry.process_count(num_processes, hostfile)
        if not run(config, overrides or (), resume, overwrite, dry_run, count, launching):
            raise typer.Exit(WAITING)


def run(
    file: str | Path,
    overrides: Sequence[str] = (),
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    processes: int | None = None,
    launch_words: Sequence[str] = (),
) -> bool:
    """Run a pipeline and print a summary; see `How`.

    Args:
        file: The pipeline's YAML file.
        overrides: `name=...`, `export=...`, `rounds....`, or a stage's: `ppo.updates=3`.

    Returns:
        False where it stopped because a round waits for people's rankings; it has said how to go on.

    Raises:
        UserError: A fault in a config, found before the first stage starts, or a stage that failed.
    """
    config, steps = read_pipeline(file, overrides)
    how = How(resume, overwrite, dry_run, processes, launch_words)
    first = steps if config.rounds is None else before_rankings(steps)
    _check_all(first, how)
    if config.rounds is not None:
        check_rounds(config.rounds, steps)
    if config.export is not None:
        check_out(Path(config.export), Path(_policy_run(steps)), overwrite=True)
    if dry_run:
        if config.rounds is not None:
            table("Preflight: rounds", ("what", "how"), plan_of_rounds(config.rounds, steps))
        return True
    names = [step.stage for step in first]
    names += [f"{config.rounds.count} rounds"] if config.rounds is not None else []
    names += ["export"] if config.export is not None else []
    say(f"Pipeline {config.name}: {' -> '.join(names)}")
    rows = [_train(step, how) for step in first]
    waiting = None
    if config.rounds is not None:
        again = shlex.join(["rlhf", "pipeline", "--config", str(file), *overrides, *launch_words])
        waiting, steps = _run_rounds(config.rounds, steps, how, again, rows)
    if waiting is None and config.export is not None:
        begun, source = time.monotonic(), _policy_run(steps)
        _child("export", ["export", source, "--out", config.export, "--overwrite"])
        rows.append(("export", config.export, "done", f"from {source}", time.monotonic() - begun))
    shown = [(*row[:-1], "-" if row[-1] is None else _clock(row[-1])) for row in rows]
    table(f"Pipeline {config.name}", ("stage", "folder", "status", "result", "time"), shown)
    if waiting is not None:
        say(waiting)
    return waiting is None


def _train(step: Step, how: How) -> Row:
    """Run a stage, unless it is complete."""
    begun = time.monotonic()
    state = "overwritten" if how.overwrite else step.state()
    if state == "complete":
        return (step.stage, step.config.run, "complete already", headline(step), None)
    words = {"new": [], "interrupted": ["--resume"], "overwritten": ["--overwrite"]}[state]
    _child(step.stage, [step.stage, "--config", step.file, *step.overrides, *words, *how.launch_words])
    return (step.stage, step.config.run, "done", headline(step), time.monotonic() - begun)


def _check_all(steps: Sequence[Step], how: How) -> None:
    """Check every stage before the first one starts; parents that an earlier stage makes need not exist."""
    pending: dict[str, str] = {}
    for step in steps:
        state = "new" if how.overwrite or not how.resume else step.state()
        again = state == "interrupted"
        if how.dry_run:
            entry.prepare(step.stage, step.file, step.overrides, again, how.overwrite, True, how.processes, pending)
        elif state != "complete":
            check(step.stage, step.config, again, how.overwrite, how.processes, pending)
        if state != "complete":
            pending[step.config.run] = step.stage


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
    return ", ".join(f"{key} {format_number(value)}" for key, value in figures[:3])


def _policy_run(steps: Sequence[Step]) -> str:
    """The run whose policy is exported: the last stage that trains one."""
    return next(step.config.run for step in reversed(steps) if step.stage != "reward")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


# ---- rounds ------------------------------------------------------------------------------------------------------


def before_rankings(steps: Sequence[Step]) -> list[Step]:
    """The stages of the first training: without the reward model and PPO where there are no rankings to begin with."""
    reward = next(step for step in steps if step.stage == "reward")
    return list(steps) if reward.config.data.train else [step for step in steps if step.stage == "sft"]


def check_rounds(config: RoundsConfig, steps: Sequence[Step]) -> None:
    """Find what would be wrong with the rounds before the first stage starts.

    Raises:
        UserError: The prompts are no dataset or leak, or PPO would not see the new reward models.
    """
    of = {step.stage: step.config for step in steps}
    _check_splits(config, of["reward"].data)
    if "ppo" in of and _with_path(_reward(of["ppo"]), of["reward"].run, "another") == _reward(of["ppo"]):
        raise UserError(
            f"rounds: the reward of PPO does not name the run {of['reward'].run}",
            "What people say in the rounds would never reach the policy.",
            "Set reward.path in its config to that run.",
        )


def _check_splits(config: RoundsConfig, data: DataConfig) -> None:
    """Refuse prompts that the reward model would both train on and be measured on: best before people rank them."""
    (prompts,) = open_all([config.prompts], list(KINDS), "rounds.prompts")
    base, held_out = open_all(data.train, ["ranking"], "data.train"), open_all(data.eval, ["ranking"], "data.eval")
    trained = {r.prompt_id for r in train_records(base)} if not held_out else set()
    held = {r.prompt_id for r in eval_records(held_out or base, bool(held_out))}
    against = {None: held, "train": held, "eval": trained}
    leaks = {p.prompt_id for p in prompts.records() if p.prompt_id in against.get(p.split, ())}
    if leaks:
        raise UserError(
            f"rounds.prompts: {len(leaks):,} prompts of {config.prompts} are in another split of reward's data",
            "The model would train on them and be measured on them.",
            "Split both by prompt, with the same seed: rlhf data split DATASET --by prompt --out ...",
        )


def plan_of_rounds(config: RoundsConfig, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """What the rounds would do, for the dry run."""
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
    config: RoundsConfig, steps: list[Step], how: How, again: str, rows: list[Row]
) -> tuple[str | None, list[Step]]:
    """Rank and train round after round, adding to the rows of the summary.

    Returns:
        What it waits for, None where all rounds are done; and the steps of the last training.
    """
    now = before_rankings(steps)
    for turn in range(1, config.count + 1):
        rounds = [Round(n, Path(config.folder.replace("{round}", str(n)))) for n in range(1, turn + 1)]
        last, begun = rounds[-1], time.monotonic()
        if not is_dataset(last.candidates):
            _child("propose", _propose_words(config, rounds, policies(steps, now)))
        if not is_dataset(last.collected):
            come = len(untaken(rounds, sources(rounds)))
            wanted = config.min_rankings or int(open_dataset(last.candidates).manifest["count"])
            if come < wanted:
                rows.append((f"round {turn}", str(last.folder), "waiting", f"{come:,} of {wanted:,} rankings", None))
                return waiting_for(last, config.count, come, wanted, again), now
            collect(rounds)
        learned = int(open_dataset(last.collected).manifest["count"])
        rows.append((f"round {turn}", str(last.folder), "ranked", f"{learned:,} rankings", time.monotonic() - begun))
        now = [step if step.stage == "sft" else in_round(step, steps, rounds) for step in steps]
        _check_all(now, how)
        rows += [_train(step, how) for step in now if step.stage != "sft"]
    return None, now


def policies(steps: Sequence[Step], trained: Sequence[Step]) -> list[str]:
    """Whose answers are proposed: the newest PPO run's and the SFT run's; before either, the model PPO starts from."""
    runs = [step.config.run for step in reversed(trained) if step.stage != "reward"]
    return runs or [step.config.model.path for step in steps if step.stage == "ppo"]


def _propose_words(config: RoundsConfig, rounds: Sequence[Round], models: Sequence[str]) -> list[str]:
    words = ["data", "propose", *models, "--prompts", config.prompts, "--count", str(config.size)]
    words += ["--k", str(config.k), "--out", str(rounds[-1].candidates)]
    words += [word for earlier in rounds[:-1] for word in ("--skip", str(earlier.candidates))]
    words += ["--temperature", str(config.temperature)] if config.temperature is not None else []
    return [*words, *(["--max-new-tokens", str(config.max_new_tokens)] if config.max_new_tokens else [])]


def in_round(step: Step, steps: Sequence[Step], rounds: Sequence[Round]) -> Step:
    """The reward or PPO stage as it is trained in the last of the rounds: into a run of its own, from the same start.

    The reward model is trained on its own data and all rounds' rankings, PPO against that reward model.
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
    """PPO's reward as it stands in its config."""
    return config.model_dump(mode="json")["reward"]


def _with_path(value: Any, old: str, new: str) -> Any:
    """The value with another path in place of `old`, wherever it stands in it."""
    if isinstance(value, dict):
        return {key: _with_path(part, old, new) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_path(part, old, new) for part in value]
    return new if isinstance(value, str) and os.path.normpath(value) == os.path.normpath(old) else value


def waiting_for(last: Round, count: int, come: int, wanted: int, again: str) -> str:
    """What a round waits for, and the commands that bring it."""
    candidates, pulled = shlex.quote(str(last.candidates)), shlex.quote(str(last.folder / "rankings-label-studio"))
    so_far = f"{come:,} of {wanted:,} rankings have come to {last.pattern}"
    return (
        f"Round {last.number} of {count} waits for people: {so_far}\n"
        f"  at a terminal          rlhf data rank {candidates} --annotator NAME\n"
        f"  or in Label Studio     rlhf data label-studio push {candidates} --url URL\n"
        f"    and what was ranked  rlhf data label-studio pull {candidates} --url URL --out {pulled}\n"
        f"  then go on             {again}"
    )
