"""What a run's adapter was trained on: the method, the base model, and whether that base is still the same."""

from __future__ import annotations

from pathlib import Path

from rlhf.core.table import Pick
from rlhf.models.adapters import is_adapter
from rlhf.runs.model_folder import fingerprint
from rlhf.runs.run import is_run, read_run
from rlhf.runs.run_config import read_run_config
from rlhf.tuning.methods import TUNING


def weights_of(path: str) -> str:
    """The current fingerprint of a path's weights; for a hub model, `hub:` and its name."""
    if is_run(path):
        return str(read_run(path).get("model_fingerprint"))
    return fingerprint(Path(path)) if Path(path).is_dir() else f"hub:{path}"


def base_of(run: str) -> dict[str, str]:
    """Path and weights of the model that a run was trained from, as its run.json records them."""
    parent = read_run(run)["parents"][0]
    if is_unmerged(parent["path"]):  # it trained its parent's adapter further
        return base_of(parent["path"])
    return {"path": parent["path"], "weights": parent.get("fingerprint") or f"hub:{parent['path']}"}


def is_unmerged(path: str) -> bool:
    """Whether a path is a run whose result is an adapter, because it cannot be merged."""
    return is_run(path) and is_adapter(Path(path) / "model")


def tuning_of(run: str) -> Pick | None:
    """The tuning of a run, without dropout; None for a model without a run folder."""
    if not is_run(run):
        return None
    found = TUNING.pick(read_run_config(run).get("tuning", "full"))
    return Pick(found.row, found.options | {"dropout": 0.0}) if "dropout" in found.options else found


def adapter_folder(run: str) -> Path:
    """The folder of a run's adapter: `adapter/`, or `model/` for an adapter that cannot be merged."""
    places = [Path(run) / part for part in ("adapter", "model")]
    return next((place for place in places if (place / "adapter_model.safetensors").is_file()), places[0])
