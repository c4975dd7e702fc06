"""The runs and models that a run came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.runs.run import is_run, read_run


@dataclass(frozen=True)
class Ancestor:
    """One stage of a run's lineage, or the model at its beginning."""

    name: str
    """The path of the run or model without the folders above it, or a hub name."""
    stage: str | None = None
    """None for a model that is not a run of this project."""
    info: dict[str, Any] = field(default_factory=dict)
    """Its run.json; empty if the run is not available."""
    fingerprint: str | None = None
    """SHA-256 of its result, as recorded by the child."""
    folder: Path | None = None
    note: str = ""
    """Why the run is not available."""


def lineage(run: Path) -> list[Ancestor]:
    """A run and all its ancestors, parents before children, each once.

    A parent is looked for at the path in the child's run.json, then in the child's folder. A parent whose result has
    another fingerprint than the child recorded is not followed: it was trained again.
    """
    info = read_run(run)
    found: dict[str, Ancestor] = {}
    _walk(Ancestor(public_path(str(run)), info["stage"], info, info.get("model_fingerprint"), run), found)
    return list(found.values())


def _walk(child: Ancestor, found: dict[str, Ancestor]) -> None:
    for recorded in child.info.get("parents", []):
        parent = _parent(recorded, child.folder)
        if parent.name not in found:
            _walk(parent, found)
    found[child.name] = child


def _parent(recorded: dict[str, Any], child: Path | None) -> Ancestor:
    path, stage, fingerprint = recorded["path"], recorded.get("stage"), recorded.get("fingerprint")
    name = public_path(path)
    if stage is None:
        return Ancestor(name)
    places = [Path(path), *([child.resolve().parent / Path(path).name] if child else [])]
    runs = [place for place in places if is_run(place)]
    for place in runs:
        info = read_run(place)
        if info.get("model_fingerprint") == fingerprint:
            return Ancestor(name, stage, info, fingerprint, place)
    note = "was trained again since" if runs else "no longer exists"
    return Ancestor(name, stage, fingerprint=fingerprint, note=note)


def public_path(path: str) -> str:
    """The last part of a path outside the working folder, to keep private folder names out of a card."""
    return Path(path).name if path.startswith(("/", "~", "..")) else path


def base_model(ancestors: Sequence[Ancestor]) -> str | None:
    """The hub name of the model that the first stage started from; None if it is a local folder."""
    name = next((a.name for a in ancestors if a.stage is None), "")
    return name if name.count("/") == 1 and not name.startswith(".") and not Path(name).exists() else None
