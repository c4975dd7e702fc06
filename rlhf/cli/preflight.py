"""Preflight checks: every fault of a run that can be found without weights or torch.

`check` runs before anything is loaded, at each start of a stage and for `--dry-run`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.cli.preflight_sampler import check_sampler, refuse_compiled
from rlhf.config.base import BatchConfig, ModelConfig, StageConfig
from rlhf.config.optimizers import refuse_optimizer
from rlhf.core.console import format_number, is_main
from rlhf.core.errors import UserError, blame, need_package
from rlhf.core.limits import read_json_object
from rlhf.core.table import Pick
from rlhf.data.chat_templates import freeze_clock, read_template, reads_clock
from rlhf.data.chat_tokenizer import short_hash
from rlhf.data.schema import KINDS
from rlhf.data.selection import open_datasets
from rlhf.data.store import Dataset
from rlhf.distributed.deepspeed_json import deepspeed_settings, zero_stage
from rlhf.dpo.config import DPOConfig
from rlhf.judging.source import refuse_unmeasured
from rlhf.models.adapters import VIRTUAL
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.shared_roles import recognise
from rlhf.reward.combining import COMBINATIONS
from rlhf.reward.config import RewardConfig
from rlhf.reward.sources import model_terms, weighted_terms
from rlhf.runs.model_folder import tensor_sizes
from rlhf.runs.parents import check_same_text, resolve_model_path
from rlhf.runs.run import Run, check_run_folder, is_complete, is_run, read_run, stage_of
from rlhf.sft.config import SFTConfig
from rlhf.specialist.config import SpecialistConfig

Rows = list[tuple[str, str]]
PendingRuns = Mapping[str, str]
"""Folders of runs that do not exist yet -> the earlier stage of the pipeline that makes them."""
POLICIES = ("sft", "dpo", "ppo")
"""The stages whose result is a policy."""


def check(
    stage: str,
    config: Any,
    resume: bool,
    overwrite: bool,
    processes: int | None = None,
    pending_runs: PendingRuns | None = None,
) -> Rows:
    """Check everything that needs neither weights nor torch.

    Args:
        stage: sft, reward, ppo or specialist.
        config: Its config.
        resume: Continue the run in the folder.
        overwrite: Delete the run in the folder first.
        processes: Number of processes of the run; the launcher's world size by default.
        pending_runs: Parents that need not exist yet.

    Returns:
        Rows of the preflight table: (what, how).

    Raises:
        UserError: The first fault found.
    """
    world = processes or distributed.world_size()
    pending_runs = {os.path.normpath(path): by for path, by in (pending_runs or {}).items()}
    rows = [("run", _run(stage, config, resume, overwrite))]
    rows += STAGE_CHECKS[stage](config, world, pending_runs)
    pick = config.optimizer.algorithm  # with `precision: auto` the engine checks again once it knows the device
    refuse_optimizer(pick, deepspeed_settings(config.deepspeed, world), config.precision == "bfloat16")
    rows.append(("optimizer", pick.name))
    rows.append(("processes", f"{world}, {_zero(config, world)}"))
    for package in config.log.report_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"log.report_to: {package} is not installed", remedy=f"pip install {package}, or leave it out."
            )
    return rows


# ---- run folder and processes ------------------------------------------------------------------------------------


def _run(stage: str, config: StageConfig, resume: bool, overwrite: bool) -> str:
    check_run_folder(config, stage, resume, overwrite)
    if not is_run(config.run):
        return f"{config.run} (new)"
    if overwrite:
        return f"{config.run} (the existing run is deleted first)"
    if is_complete(config):
        return f"{config.run} (already complete)"
    newest = Run(Path(config.run), stage).checkpoints(config.checkpoints.keep).newest(verify=False)
    if newest is None:
        return f"{config.run} (no complete checkpoint yet: starts from the beginning)"
    return f"{config.run} (continues after step {newest[0]:,})"


def _zero(config: StageConfig, world: int) -> str:
    if config.deepspeed is not None:
        return f"ZeRO stage {zero_stage(config.deepspeed)} ({config.deepspeed})"
    return "ZeRO stage 0" if world > 1 else "plain torch"


def _batch(batch: BatchConfig, world: int) -> str:
    """Records per step, process and forward pass."""
    micro, passes = batch.micro_batches(world)
    return f"{batch.batch_size} records a step = {world} x {passes} x {micro} (processes x passes x records)"


# ---- models ------------------------------------------------------------------------------------------------------


def _model(config: ModelConfig, stages: Sequence[str], pending_runs: PendingRuns) -> str:
    """Where the weights come from. Only runs of `stages` are accepted."""
    if config.chat_template != "auto":
        read_template(config.chat_template)
    described = _parent("model.path", config.path, stages, pending_runs)
    limit = _positions(config, pending_runs)
    if limit is not None and config.max_length is not None and config.max_length > limit:
        raise UserError(
            f"model.max_length: {config.max_length} is more than the {limit} positions of {config.path}",
            remedy=f"Set model.max_length to {limit} or less.",
        )
    return described


def _trained(name: str, config: Any, stages: Sequence[str], pending_runs: PendingRuns) -> Rows:
    """The model that is trained, and how."""
    return [(name, _model(config.model, stages, pending_runs)), ("tuning", _tuning("tuning", config.tuning))]


def _tuning(key: str, pick: Pick) -> str:
    """The tuning method's name."""
    if pick.row.traits["quantized"]:
        remedy = "pip install 'rlhf-rankings[gpu]', on a machine with a GPU; or use lora."
        need_package("bitsandbytes", f"{key}: {pick.name}", remedy)
    return pick.name


def _parent(key: str, path: str, stages: Sequence[str], pending_runs: PendingRuns) -> str:
    pending = pending_runs.get(os.path.normpath(path))
    with blame(key):
        folder = Path(path if pending else resolve_model_path(path))
    by = pending or stage_of(path)
    if by not in (None, *stages):
        remedy = f"Name a run of: {', '.join(stages)}; or a model."
        raise UserError(f"{key}: {path} is a run of the {by} stage", remedy=remedy)
    if pending:  # what is in the folder now, half a run or one that is replaced, says nothing about its result
        return f"{path} (to come: {by} run)"
    described = f"{path} (finished {by} run)" if by else f"{path} (not checked: hub)"
    if not folder.is_dir():
        return described
    if not (folder / "config.json").is_file():
        settings = folder / "adapter_config.json"
        if settings.is_file() and read_json_object(settings).get("peft_type") in ("BOTTLENECK", *VIRTUAL):
            return described
        if settings.is_file():
            raise UserError(
                f"{key}: {path} holds only an adapter, not a model",
                "A stage can train bottleneck adapters and virtual tokens further; others are merged into the weights.",
                "Merge it into its base, and name the merged model.",
            )
        raise UserError(f"{key}: {path}: no model there (no run.json and no config.json)", remedy="Check the path.")
    if by is not None:
        return described
    sizes = tensor_sizes(folder)
    return f"{path} (local model, {format_number(sum(sizes) if sizes else None)} parameters)"


def _positions(config: ModelConfig, pending_runs: PendingRuns) -> int | None:
    """The longest sequence that a model on this disk supports; None if it is not known yet."""
    if os.path.normpath(config.path) in pending_runs:
        return None
    file = Path(resolve_model_path(config.path)) / "config.json"
    if not file.is_file():
        return None
    found = read_json_object(file)  # `resolve_model_path` has checked it
    limit = found.get("max_position_embeddings") or found.get("n_positions")
    return limit if isinstance(limit, int) and limit > 0 else None


def _same_text(config: PPOConfig, reward_path: str, pending_runs: PendingRuns) -> None:
    """Compare the policy's tokenizer and chat template with a reward run's, if both have a run.json."""
    to_come = any(os.path.normpath(path) in pending_runs for path in (config.model.path, reward_path))
    if to_come or not is_run(config.model.path):
        return
    mine = dict(read_run(config.model.path))
    template = config.model.chat_template
    if template != "auto":
        text = read_template(template)
        if reads_clock(text):
            frozen_at = mine.get("template_time")
            if frozen_at is None:
                return  # it is compared when the run starts, which freezes the template
            text = freeze_clock(text, datetime.fromisoformat(frozen_at))
        mine["chat_template"] = short_hash(text)
    check_same_text(mine, reward_path)


# ---- data --------------------------------------------------------------------------------------------------------


def _open(paths: Sequence[str], kinds: Sequence[str], key: str) -> list[Dataset]:
    """Open datasets, and compare them with their hashes, so that a damaged one is found before weights are loaded."""
    return open_datasets(paths, kinds, key, verify=is_main())


def _data(key: str, datasets: Sequence[Dataset], held_out: Sequence[str], kinds: Sequence[str]) -> Rows:
    """Count the records of a stage's datasets, and of those that it evaluates on, from the manifests."""
    rows = [(key, _described(dataset)) for dataset in datasets]
    if all(d.manifest for d in datasets) and not _train_count(datasets):
        raise UserError(
            f"{key}: no record to train on in {', '.join(str(d.path) for d in datasets)}",
            "All of them are in the splits `eval` and `test`.",
            "See `rlhf data stats`.",
        )
    named = _open(held_out, kinds, "data.eval")
    rows += [("data.eval", _described(dataset)) for dataset in named]
    if not named and all(d.manifest for d in datasets):
        rows.append(("held out", f"{sum(d.splits().get('eval', 0) for d in datasets):,} records of the split eval"))
    return rows


def _described(dataset: Dataset) -> str:
    if not dataset.manifest:
        return f"{dataset.path}: {dataset.kind}s in a JSONL file, counted when it is read"
    splits = ", ".join(f"{count:,} {name or 'without a split'}" for name, count in dataset.splits().items() if count)
    return f"{dataset.path}: {dataset.kind}s: {splits}"


def _train_count(datasets: Sequence[Dataset]) -> int:
    """Records of no split or of `train`."""
    return sum(count for d in datasets for split, count in d.splits().items() if split in (None, "train"))


def _supervised(config: Any, kinds: Sequence[str], world: int, more: Sequence[tuple[str, str]] = ()) -> Rows:
    """The datasets of a stage that learns from records, after which `more` is shown, its steps and its batch."""
    datasets = _open(config.data.train, kinds, "data.train")
    rows = [*_data("data.train", datasets, config.data.eval, kinds), *more]
    return [*rows, ("steps", _steps(config.batch, datasets)), ("batch", _batch(config.batch, world))]


def _steps(batch: BatchConfig, datasets: Sequence[Dataset] | None) -> str:
    """How long is trained; the number of steps if the datasets, whose records are counted, are known."""
    if batch.max_steps is not None:
        return f"{batch.max_steps:,} (batch.max_steps)"
    if datasets is None or not all(d.manifest for d in datasets):
        return f"{batch.epochs:g} epochs"
    steps = math.ceil(batch.epochs * math.ceil(_train_count(datasets) / batch.batch_size))
    return f"about {steps:,} ({batch.epochs:g} epochs; records that do not fit are skipped)"


# ---- the checks of each stage ------------------------------------------------------------------------------------


def _sft(config: SFTConfig, world: int, pending_runs: PendingRuns) -> Rows:
    rows = _trained("model", config, POLICIES, pending_runs)
    if config.distillation and config.distillation.logits:
        key, path = "distillation.logits.teacher", config.distillation.logits.teacher
        rows += [("teacher", _parent(key, path, POLICIES, pending_runs))]
    return rows + _supervised(config, ("demonstration", "ranking"), world)


def _reward(config: RewardConfig, world: int, pending_runs: PendingRuns) -> Rows:
    rows = [*_trained("model", config, (*POLICIES, "reward"), pending_runs), ("loss", config.loss.name)]
    datasets = _open(config.data.demonstrations, ("demonstration",), "data.demonstrations")
    return rows + _supervised(config, ("ranking",), world, [("reference", _described(d)) for d in datasets])


def _dpo(config: DPOConfig, world: int, pending_runs: PendingRuns) -> Rows:
    rows = _trained("policy", config, POLICIES, pending_runs)
    rows.append(("loss", f"{config.loss.name}, beta {config.beta:g}"))
    return rows + _supervised(config, ("ranking",), world)


def _ppo(config: PPOConfig, world: int, pending_runs: PendingRuns) -> Rows:
    rollout, batch = config.rollout, config.batch
    rows = _trained("policy", config, POLICIES, pending_runs)
    limit = config.model.max_length or _positions(config.model, pending_runs)
    if limit is not None and rollout.max_new_tokens >= limit:
        raise UserError(
            f"rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt in {limit} tokens"
        )
    rows += [("sampler", check_sampler(rollout.sampler))]
    if config.deepspeed and zero_stage(config.deepspeed) == 3:
        refuse_compiled(config.compile, rollout.sampler)
    rows += _reward_sources(config, pending_runs)
    critic = f"from the {config.critic.init} model, {_tuning('critic.tuning', config.critic.tuning)}"
    rows += [("critic", critic if config.needs_critic else "none"), *_sharing(config, pending_runs)]
    rows += [("advantage", config.advantage.name)]
    prompts = _open(config.data.prompts, tuple(KINDS), "data.prompts")
    rows += _data("data.prompts", prompts, config.data.eval, tuple(KINDS))
    rows += [("ptx", _described(d)) for d in _open(config.data.ptx, ("demonstration", "ranking"), "data.ptx")]
    episodes = rollout.prompts_per_update * rollout.samples_per_prompt
    rows.append(("updates", f"{config.updates:,}"))
    answers = f"{rollout.prompts_per_update:,} prompts x {rollout.samples_per_prompt} answers"
    rows.append(("episodes per update", f"{episodes:,} = {answers}"))
    steps = batch.epochs * batch.minibatches
    rows.append(("optimizer steps", f"{steps * config.updates:,} ({steps} an update, {batch.epochs} epochs)"))
    return rows


def _specialist(config: SpecialistConfig, world: int, pending_runs: PendingRuns) -> Rows:
    if config.task.name == "tags":
        need_package("seqeval", "task: tags", "pip install 'rlhf-rankings[tasks]'")
    rows = [*_trained("model", config, ("specialist",), pending_runs), ("task", config.task.name)]
    return [*rows, ("steps", _steps(config.batch, None)), ("batch", _batch(config.batch, world))]


def _sharing(config: PPOConfig, pending_runs: PendingRuns) -> Rows:
    """The base that the roles share, with model.sharing `shared`."""
    if config.model.sharing == "separate":
        return []
    if any(os.path.normpath(path) in pending_runs for path in (config.model.path, config.reward_model) if path):
        return [("sharing", "one base, known once the earlier runs are finished")]
    return [("sharing", recognise(config).describe())]


def _reward_sources(config: PPOConfig, pending_runs: PendingRuns) -> Rows:
    """A row for each source; reward models must be finished and, unless they retokenize, read the policy's tokens."""
    rows = []
    for pick, weight in weighted_terms(config.reward):
        shown = f" x {weight:g}" if weight != 1 else ""
        if pick.name == "judge":
            refuse_unmeasured(**{name: pick.options[name] for name in ("url", "agreement", "unmeasured")})
        if pick.name == "ensemble":
            rows.append(("reward", f"ensemble, {COMBINATIONS.pick(pick.options['combine']).name} of:{shown}"))
            shown = ""
        key = "reward.models" if pick.name == "ensemble" else "reward.path"
        rows += [("reward", line + shown) for line in _source(config, key, pick, pending_runs)]
    if config.needs_critic and config.critic.init == "reward":
        _same_text(config, str(config.reward_model), pending_runs)
    for key, pick in config.onlookers.items():  # `gold.reward` and `guard.watch`
        rows += [(key, line) for line in _source(config, key, pick, pending_runs)]
    return rows


def _source(config: PPOConfig, key: str, pick: Pick, pending_runs: PendingRuns) -> list[str]:
    """A line for each reward model of a source, or for the source itself where it has none."""
    terms = model_terms(pick)
    lines = [_parent(key, term["path"], ("reward",), pending_runs) for term in terms]
    for term in terms:
        if not term.get("retokenize", False):
            _same_text(config, term["path"], pending_runs)
    what = pick.options.get("function") or pick.options.get("url", "")
    return lines or [f"{pick.name} {what}".strip()]


STAGE_CHECKS: dict[str, Callable[..., Rows]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "ppo": _ppo,
    "specialist": _specialist,
}
