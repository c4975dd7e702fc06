"""What may differ when a run is continued: where it runs, and a finished run may be made longer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config
from rlhf.core.errors import UserError, blame
from rlhf.core.limits import read_yaml
from rlhf.distributed.deepspeed_json import zero_stage

LENGTHS = ("updates", "batch.epochs", "batch.max_steps")
"""The keys that say how long a run trains."""
PLACE = ("deepspeed", "batch.micro_batch_size", "batch.micro_batch_tokens", "gradient_checkpointing", "timeout_seconds")
"""The keys that fit a run to its machine; they change what is trained only by rounding."""
MISSING = "(not set)"


def extension(path: Path, info: Mapping[str, Any], config: StageConfig) -> dict[str, Any] | None:
    """Compare the config of a run with the one that is to continue it.

    Args:
        path: The run folder.
        info: Its run.json.
        config: The config that is to continue it.

    Returns:
        None if the two are equal, except in PLACE. If the run is complete and `config` only makes it longer, the note
        for run.json: `{"updates": {"from": 40, "to": 60}}`.

    Raises:
        UserError: They differ in anything else, or config.yaml cannot be read.
    """
    changed = {key: pair for key, pair in _changes(path, config).items() if key not in PLACE}
    if not changed:
        return None
    note = {key: {"from": old, "to": new} for key, (old, new) in changed.items()}
    numbers = all(key in LENGTHS and isinstance(one, int | float) for key, pair in changed.items() for one in pair)
    longer = numbers and all(new > old for old, new in changed.values())
    # A process that was killed between writing run.json and config.yaml has noted the extension in the first only.
    if longer and (info.get("status") == "complete" or note in info.get("extended", [])):
        return note
    remedy = f"Resume with --config {path}/config.yaml, or start a new run under another name."
    if longer:
        remedy = f"Finish it first with --config {path}/config.yaml --resume; a complete run can be made longer."
    raise UserError(
        f"run: {path} was started with a different config, so --resume would not continue the same run",
        "Keys that differ: " + "; ".join(f"{key}: was {old}, now {new}" for key, (old, new) in changed.items()),
        remedy,
    )


def _changes(path: Path, config: StageConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in config.yaml, value in `config`) of all keys that differ."""
    file = path / "config.yaml"
    why = "So it is not known whether this config is the one that the run was started with."
    with blame(f"{file}: cannot be read", why, "Put the file back, or start again with --overwrite."):
        if file.read_text("utf-8") == dump_config(config):
            return {}
        before = read_yaml(file)
        if not isinstance(before, dict):
            raise ValueError(f"expected a mapping of keys, got {type(before).__name__}")
    old, new = flat(before), flat(config.model_dump(mode="json"))
    pairs = {key: (old.get(key, MISSING), new.get(key, MISSING)) for key in [*new, *old]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf of a config."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= flat(part, f"{name}.{key}" if name else str(key))
    return found


def moved(path: Path, info: Mapping[str, Any], config: StageConfig, processes: int) -> dict[str, Any]:
    """Differences in where a run continues, as a note for run.json; empty if there are none.

    Args:
        path: The run folder.
        info: Its run.json.
        config: The config that is to continue it.
        processes: How many are to continue it.

    Returns:
        `{"processes": {"from": 1, "to": 2}, "deepspeed": {"from": None, "to": "zero2.json"}}`.
    """
    found = {key: pair for key, pair in _changes(path, config).items() if key in PLACE}
    for key, now in (("processes", processes), ("zero_stage", zero_stage(config.deepspeed))):
        before = info.get(key, now)
        if before != now:
            found[key] = (before, now)
    return {key: {"from": old, "to": new} for key, (old, new) in found.items()}


def check_inputs(path: Path, info: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to continue a run whose datasets, parents, tokenizer or chat template have changed.

    Args:
        path: The run folder.
        info: Its run.json.
        facts: What run.json would record now: `data`, `parents`, `onlookers`, `tokenizer`, `chat_template`.

    Raises:
        UserError: A fingerprint differs; names what it is of.
    """
    changed = []
    for key, what in (("data", "dataset"), ("parents", "model"), ("onlookers", "model")):
        before = {one.get("path"): one.get("fingerprint") for one in info.get(key, [])}
        for one in facts.get(key, []):
            old, new = before.get(one["path"]), one.get("fingerprint")
            if old is not None and new is not None and old != new:
                changed.append(f"the {what} {one['path']}")
    for key, what in (("tokenizer", "the tokenizer"), ("chat_template", "the chat template")):
        if key in info and key in facts and info[key] != facts[key]:
            changed.append(what)
    if changed:
        raise UserError(
            f"run: {path} was started with other inputs (fingerprint mismatch): {', '.join(changed)} changed since",
            "Continuing would mix the two.",
            "Put back what was there, start again with --overwrite, or name another folder: run=...",
        )
