"""Read configs: from YAML and dotted overrides to a checked config. One error lists all problems of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rlhf.core.errors import UserError, blame, nearest
from rlhf.core.limits import parse_yaml, read_yaml

C = TypeVar("C", bound=BaseModel)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is ten times faster, where PyYAML was built with it

RENAMED = {
    "eval_every": "eval.every",
    "batch.gradient_checkpointing": "gradient_checkpointing",
    "packing": "batch.packing",
    "samples": "eval.samples",
    "sample_tokens": "eval.sample_tokens",
    "centering": "center_rewards_coefficient",
    "reference": "data.demonstrations",
    "update.epochs": "batch.epochs",
    "update.minibatches": "batch.minibatches",
    "update.micro_batch_tokens": "batch.micro_batch_tokens",
    "update.packing": "batch.packing",
    "update.target_kl": "loss.target_kl",
    "update.compile": "compile",
    "update.critic_warmup": "critic.warmup_updates",
    "update.gradient_checkpointing": "gradient_checkpointing",
}
"""Old key -> new key, for the error that refuses the old one."""


def load_stage_config(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML config and apply `dotted.key=value` overrides (values are YAML).

    Raises:
        UserError: No such file, not YAML, or invalid keys or values; all problems are listed at once.
    """
    values = read_values(path)
    override_values(values, overrides)
    return check_config(kind, values, str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        UserError: No such file, not YAML, a duplicate key, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file", remedy="Examples to copy are in configs/.")
    with blame(f"{path}"):
        values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def inline_values(spec: str, option: str) -> dict[str, Any] | None:
    """The keys and values of a mapping on the command line, such as ``{name: few-shot, shots: 4}``; None if it is none.

    Raises:
        UserError: It is not YAML; the message begins with `option`.
    """
    if not spec.lstrip().startswith("{"):
        return None
    with blame(f"{option} {spec}"):
        return dict(parse_yaml(spec))


def check_config(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Validate parsed values. `where` is their origin, for the error.

    Raises:
        UserError: Invalid keys or values; all problems are listed at once.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [_fault(kind, e) for e in error.errors()]
        count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
        raise UserError(f"{where}: {count} in the config\n" + "\n".join(f"  - {f}" for f in faults)) from None


def fits(kind: type[BaseModel], values: dict[str, Any]) -> bool:
    """True if parsed values are a valid config of this kind."""
    try:
        kind.model_validate(values)
    except (ValidationError, UserError):
        return False
    return True


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `dotted.key=value` overrides to a config's values, in place.

    Raises:
        UserError: An override is not of that form.
    """
    for override in overrides:
        _override(values, override)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"override {override!r}: expected dotted.key=value, such as optimizer.lr=1e-5")
    for name in parents:
        child = values.get(name)
        if child is None:
            child = values[name] = {}
        if isinstance(child, str):  # `tuning: lora` plus the override tuning.rank=8
            child = values[name] = {"name": child}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {name} is not a group of keys")
        values = child
    try:
        values[last] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {override!r}: the value is {error}") from None


def _fault(kind: type[BaseModel], error: Any) -> str:
    """One validation error in words: key, what is wrong, nearest valid key."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parent = _model_at(kind, error["loc"][:-1])
        valid = parent.model_fields if parent else []
        if moved := _moved(where, error["input"]):
            return f"{where}: this key was renamed; write {', '.join(f'`{new}` for `{old}`' for old, new in moved)}"
        return f"{where}: unknown key; {nearest(str(error['loc'][-1]), valid)}"
    if error["type"] == "missing":
        return f"{where}: missing; this key is required"
    text = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{where + ': ' if where else ''}{text}{got}"


def _moved(where: str, value: Any) -> list[tuple[str, str]]:
    """Old and new names of an unknown key, or of the keys in a group that is gone; the whole group if it is empty."""
    inside = [f"{where}.{name}" for name in value] if isinstance(value, dict) else []
    return [(old, new) for old, new in RENAMED.items() if old in (where, *inside)]


def _model_at(kind: type[BaseModel] | None, location: tuple[Any, ...]) -> type[BaseModel] | None:
    for part in location:
        if kind is None or part not in kind.model_fields:
            return None
        annotation = kind.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        kind = next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return kind


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
