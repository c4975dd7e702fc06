"""Reward sources as command-line arguments: a run, a function, a YAML file, or a mapping."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config.load import read_values
from rlhf.core.limits import parse_yaml
from rlhf.core.table import Pick
from rlhf.reward.sources import REWARDS, weighted_terms


def read_reward(spec: str) -> Pick:
    """A reward source.

    Args:
        spec: A run or model folder, `module:function`, a mapping such as ``{name: ensemble, models: [...]}``, or a YAML
            file of one.

    Raises:
        ValueError: There is no such source, or an option is wrong.
        UserError: The file cannot be read.
    """
    return REWARDS.pick(_values(spec))


def _values(spec: str) -> Any:
    if spec.lstrip().startswith("{"):
        return parse_yaml(spec)
    if spec.endswith((".yaml", ".yml")) and Path(spec).is_file():
        return read_values(spec)
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", spec):
        return {"name": "function", "function": spec}
    return {"name": "model", "path": spec}


def retokenizing(reward: Pick, paths: Sequence[str]) -> Pick:
    """The source with `retokenize` on for the reward models of these paths, which read text in their own tokens."""
    if reward.name == "sum":
        terms = [(retokenizing(one, paths), weight) for one, weight in weighted_terms(reward)]
        return REWARDS.pick(
            {"name": "sum", "terms": [{"name": one.name, "weight": weight, **one.options} for one, weight in terms]}
        )
    mine = reward.options.get("models", [reward.options.get("path")])
    return Pick(reward.row, reward.options | ({"retokenize": True} if set(mine) & set(paths) else {}))
