"""The config.yaml of a run folder, as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlhf.core.errors import blame

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster, where PyYAML was built with it


def read_run_config(run: str | Path) -> dict[str, Any]:
    """The values in config.yaml of a run folder, with the names that the config had when the run was started.

    Raises:
        UserError: It cannot be read, or is not a mapping.
    """
    file = Path(run) / "config.yaml"
    remedy = "Check that this is a run's folder; restore the file from a copy, or start a new run."
    with blame(f"{file}: cannot be read", "Every run writes it at its start.", remedy):
        try:
            values = yaml.load(file.read_text("utf-8"), _Loader)
        except yaml.YAMLError as error:
            raise ValueError(error) from None
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping of keys, got {type(values).__name__}")
    return values
