"""What only `--dry-run` looks at: every record of the stage, against the chat template; the share of each process."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from rlhf.cli.preflight import PendingRuns, Rows
from rlhf.data.row_check import row_check
from rlhf.data.store import open_dataset
from rlhf.distributed.deepspeed_json import zero_stage
from rlhf.ppo.config import PPOConfig
from rlhf.reward.sources import model_terms
from rlhf.runs.model_folder import tensor_sizes
from rlhf.runs.parents import resolve_model_path


def template_rows(config: Any, pending_runs: PendingRuns | None = None) -> Rows:
    """Rows of the preflight table: how many of a stage's records the model's chat template accepts, and of PPO's
    prompts that of each reward model that reads text in its own tokens.

    There is none where the tokenizer is not on this disk: for a model on the Hub or of a run to come.

    Args:
        config: A stage's config.
        pending_runs: Parents that need not exist yet.
    """
    model, pending = config.model, {os.path.normpath(path) for path in pending_runs or {}}
    options = ("chat_template", "control_tokens_in_text", "trust_remote_code")
    checks = [("chat template", model.path, {name: getattr(model, name) for name in options}, DATA_KEYS)]
    if isinstance(config, PPOConfig):
        own = {"trust_remote_code": model.trust_remote_code}
        terms = [term for pick in (config.reward, *config.onlookers.values()) for term in model_terms(pick)]
        paths = dict.fromkeys(term["path"] for term in terms if term.get("retokenize"))
        checks += [(f"chat template of {path}", path, own, ("prompts", "eval")) for path in paths]
    rows = []
    for what, place, settings, keys in checks:
        if os.path.normpath(place) in pending or not any(Path(resolve_model_path(place)).glob("tokenizer*")):
            continue
        check = row_check(place, **settings)
        for path in dict.fromkeys(path for key in keys for path in getattr(config.data, key, [])):
            check.add(open_dataset(path).records(), path)
        rows.append((what, check.describe()))
    return rows


DATA_KEYS: tuple[str, ...] = ("train", "prompts", "eval", "demonstrations", "ptx")


# ---- shares --------------------------------------------------------------------------------------------------------


def share_rows(config: Any, processes: int, pending_runs: PendingRuns | None = None) -> Rows:
    """Rows of the preflight table: what each of several processes is to hold and to do, computed without starting any.

    The shares of PPO are those of the code that divides an update, for sequences of the largest length.

    Args:
        config: A stage's config.
        processes: How many are to run.
        pending_runs: Parents that need not exist yet.
    """
    if processes == 1:
        return []
    rows = []
    if os.path.normpath(config.model.path) not in {os.path.normpath(path) for path in pending_runs or {}}:
        rows += _weight_shares(config, processes)
    return rows + (_update_shares(config, processes) if isinstance(config, PPOConfig) else [])


def _weight_shares(config: Any, processes: int) -> Rows:
    sizes = tensor_sizes(Path(resolve_model_path(config.model.path)))
    if not sizes:  # on the Hub
        return []
    stage = zero_stage(config.deepspeed)
    # Stage 3 divides every parameter by itself and pads it; below, all of them are divided as one.
    divided = sum(math.ceil(size / processes) for size in sizes) if stage == 3 else math.ceil(sum(sizes) / processes)
    whole = sum(sizes)
    rows = [("share of weights", f"{divided if stage == 3 else whole:,} of {whole:,} on each process (stage {stage})")]
    if config.tuning.name == "full":
        rows += [("share of optimizer", f"the state of {divided if stage else whole:,} weights on each process")]
    return rows


def _update_shares(config: PPOConfig, processes: int) -> Rows:
    from rlhf.ppo.batching import divide

    rollout, batch = config.rollout, config.batch
    count = rollout.prompts_per_update * rollout.samples_per_prompt
    fewest, more = divmod(count, processes)
    each = _range(fewest, fewest + bool(more))
    rows = [("share of a rollout", f"{each} completions a process{_idle(count, processes)}")]
    totals = [config.data.max_prompt_tokens + rollout.max_new_tokens] * count
    divisions = divide(totals, range(count), batch.minibatches, batch.micro_batch_tokens, processes=processes)
    dealt = [[sum(map(len, rank)) for rank in ranks] for ranks in divisions]
    passes = [len(ranks[0]) for ranks in divisions]
    episodes = [held for ranks in dealt for held in ranks]
    share = f"{_range(min(episodes), max(episodes))} episodes a process, in {_range(min(passes), max(passes))} passes"
    return [*rows, ("share of a minibatch", share + _idle(min(map(sum, dealt)), processes))]


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _idle(items: int, processes: int) -> str:
    return f"; {processes - items:,} of {processes:,} processes have none and wait" if items < processes else ""
