"""What only `--dry-run` looks at: every record of the stage, against the chat template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.cli.preflight import PendingRuns, Rows
from rlhf.data.row_check import row_check
from rlhf.data.store import open_dataset
from rlhf.ppo.config import PPOConfig
from rlhf.reward.sources import model_terms
from rlhf.runs.run import resolve_model_path


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
        paths = dict.fromkeys(term["path"] for term in model_terms(config.reward) if term.get("retokenize"))
        checks += [(f"chat template of {path}", path, own, ("prompts", "eval")) for path in paths]
    rows = []
    for what, place, settings, keys in checks:
        if os.path.normpath(place) in pending or not any(Path(resolve_model_path(place)).glob("tokenizer*")):
            continue
        check = row_check(place, **settings)
        for path in _datasets(config.data, keys):
            check.add(open_dataset(path).records(), path)
        rows.append((what, check.describe()))
    return rows


DATA_KEYS: tuple[str, ...] = ("train", "prompts", "eval", "demonstrations", "ptx")


def _datasets(data: Any, keys: Sequence[str]) -> Sequence[str]:
    return list(dict.fromkeys(path for key in keys for path in getattr(data, key, [])))
