"""The stages of a pipeline file, and their variants in rounds of rankings."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.annotate.rounds import Round
from rlhf.cli import entry
from rlhf.cli.pipeline_config import PipelineConfig, RoundsConfig
from rlhf.cli.stage_configs import STAGES
from rlhf.config.base import DataConfig, StageConfig
from rlhf.config.load import load_stage_config
from rlhf.core.console import format_number
from rlhf.core.errors import UserError
from rlhf.data.schema import KINDS
from rlhf.data.selection import eval_records, open_datasets, train_records
from rlhf.data.store import open_dataset
from rlhf.runs.changes import check_inputs
from rlhf.runs.run import check_run_folder, data_facts, is_complete, is_run, read_run


@dataclass(frozen=True)
class PipelineStep:
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
        # a dataset that was deleted since has nothing to compare
        paths = [str(one["path"]) for one in info.get("data", []) if "path" in one and Path(one["path"]).exists()]
        check_inputs(Path(self.config.run), info, {"data": data_facts(map(open_dataset, paths))})
        return "complete" if is_complete(self.config) else "interrupted"


def read_pipeline(file: str | Path, overrides: Sequence[str]) -> tuple[PipelineConfig, list[PipelineStep]]:
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
            steps.append(PipelineStep(stage, path, by_stage[stage], load_stage_config(kind, path, by_stage[stage])))
        elif by_stage[stage]:
            raise UserError(f"override {stage}.{by_stage[stage][0]}: {file} has no {stage} stage")
    return config, steps


def headline(step: PipelineStep) -> str:
    """The first three metrics of a finished run."""
    metrics: dict[str, Any] = read_run(step.config.run).get("metrics") or {}
    numbers = [(key, value) for key, value in metrics.items() if isinstance(value, (int, float))]
    return ", ".join(f"{key} {format_number(value)}" for key, value in numbers[:3])


# ---- rounds ------------------------------------------------------------------------------------------------------


def before_rankings(steps: Sequence[PipelineStep]) -> list[PipelineStep]:
    """The stages of the first training: only SFT if the reward model has no rankings yet."""
    reward = next(step for step in steps if step.stage == "reward")
    return list(steps) if reward.config.data.train else [step for step in steps if step.stage == "sft"]


def check_rounds(config: RoundsConfig, steps: Sequence[PipelineStep]) -> None:
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
    base, held_out = (open_datasets(getattr(data, key), ["ranking"], f"data.{key}") for key in ("train", "eval"))
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


def rounds_table(config: RoundsConfig, steps: Sequence[PipelineStep]) -> list[tuple[str, str]]:
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


def policies(steps: Sequence[PipelineStep], trained: Sequence[PipelineStep]) -> list[str]:
    """The models whose answers are proposed: the newest PPO run and the SFT run, or the model that PPO starts from."""
    runs = [step.config.run for step in reversed(trained) if step.stage != "reward"]
    return runs or [step.config.model.path for step in steps if step.stage == "ppo"]


def propose_words(config: RoundsConfig, rounds: Sequence[Round], models: Sequence[str]) -> list[str]:
    options = [("prompts", config.prompts), ("count", config.size), ("k", config.k), ("out", rounds[-1].candidates)]
    options += [("skip", earlier.candidates) for earlier in rounds[:-1]]
    options += [("temperature", config.temperature), ("max-new-tokens", config.max_new_tokens)]
    given = [(f"--{name}", str(value)) for name, value in options if value is not None]
    return ["data", "propose", *models, *(word for option in given for word in option)]


def in_round(step: PipelineStep, steps: Sequence[PipelineStep], rounds: Sequence[Round]) -> PipelineStep:
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
    return PipelineStep(step.stage, step.file, overrides, load_stage_config(STAGES[step.stage], step.file, overrides))


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
        f"  in a browser           rlhf data rank {candidates} --web\n"
        f"  or in Label Studio     rlhf data label-studio push {candidates} --url URL\n"
        f"    and what was ranked  rlhf data label-studio pull {candidates} --url URL --out {pulled}"
    )
