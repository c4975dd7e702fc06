"""What only `--dry-run` looks at: every record of the stage, against the chat template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.cli.preflight import PendingRuns, Rows
from rlhf.data.row_check import row_check
from rlhf.data.store import open_dataset
from rlhf.runs.run import resolve_model_path


def template_row(config: Any, pending_runs: PendingRuns | None = None) -> Rows:
    """A row of the preflight table: how many of a stage's records the model's chat template accepts.

    There is none where the tokenizer is not on this disk: for a model on the Hub or of a run to come.

    Args:
        config: A stage's config.
        pending_runs: Parents that need not exist yet.
    """
    model = config.model
    if os.path.normpath(model.path) in {os.path.normpath(path) for path in pending_runs or {}}:
        return []
    if not any(Path(resolve_model_path(model.path)).glob("tokenizer*")):
        return []
    options = ("chat_template", "control_tokens_in_text", "trust_remote_code")
    check = row_check(model.path, **{name: getattr(model, name) for name in options})
    for path in _datasets(config.data):
        check.add(open_dataset(path).records(), path)
    return [("chat template", check.describe())]


def _datasets(data: Any) -> Sequence[str]:
    keys = ("train", "prompts", "eval", "demonstrations", "ptx")
    return list(dict.fromkeys(path for key in keys for path in getattr(data, key, [])))
