"""Lineage: where a dataset came from, read from its manifest and those of its parents and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.io.derive import total
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.data.manifest import file_hash
from rlhf.data.store import Dataset, open_dataset

SHORT = 12
STATES = {
    "ok": "", "missing": "MISSING", "changed": "CHANGED since", "unreadable": "UNREADABLE", "again": "as above",
}  # fmt: skip
COUNTS = ("read", "written", "filtered", "dropped", "left", "rejected")


def lineage(path: str | Path) -> dict[str, Any]:
    """The chain of datasets and files that a dataset was made from.

    Paths are as they were given to the commands, so relative ones are looked for from the current folder.

    Returns:
        path, state, fingerprint, kind, count (records), command, counts (read, written, ...), `parents` (the same
        of each) and `files` (path, state and sha256 of the files that it was imported from). `state` is `ok`;
        `missing`; `changed`: the content there now is not what the dataset was made from (`fingerprint` is the
        earlier one); `unreadable` (`fault` says why); or `again`: it is listed earlier in this chain. A model
        among the parents has `model` (such as "sft run") in place of kind and count, and of a run of ours the parents
        are the models and datasets that it was trained from.

    Raises:
        UserError: There is no dataset.
    """
    return _node(open_dataset(path, damaged_ok=True), (), set())


def _node(dataset: Dataset, below: tuple[tuple[Path, str], ...], runs: set[tuple[str, str]]) -> dict[str, Any]:
    """What `lineage` returns; `below` are the datasets that lead here, `runs` those that were listed already."""
    origin = dataset.manifest.get("origin") or {}
    place = (dataset.path.resolve(), dataset.fingerprint)
    parents = origin.get("parents") or []
    return {
        "path": str(dataset.path),
        "state": "ok",
        "fingerprint": dataset.fingerprint,
        "kind": dataset.kind,
        "count": dataset.manifest.get("count"),
        "command": origin.get("command"),
        "counts": {name: origin[name] for name in COUNTS if name in origin},
        "parents": [_parent(parent, (*below, place), runs) for parent in parents],
        "files": [_file(file) for file in origin.get("files") or []],
    }


def _parent(
    entry: Mapping[str, Any], below: tuple[tuple[Path, str], ...], runs: set[tuple[str, str]]
) -> dict[str, Any]:
    if entry.get("kind") == "model":
        return _model(entry, below, runs)
    path, fingerprint = Path(entry["path"]), entry.get("fingerprint")
    then = {"path": str(path), "fingerprint": fingerprint}
    if not path.exists():
        return {**then, "state": "missing"}
    try:
        dataset = open_dataset(path, damaged_ok=True)
    except UserError as error:
        return {**then, "state": "unreadable", "fault": error.what}
    if dataset.fingerprint != fingerprint:
        return {**then, "state": "changed", "now": dataset.fingerprint}
    if (path.resolve(), fingerprint) in below:  # a dataset that was written over one of those it was made from
        return {**then, "state": "again"}
    return _node(dataset, below, runs)


def _model(entry: Mapping[str, Any], below: tuple[tuple[Path, str], ...], runs: set[tuple[str, str]]) -> dict[str, Any]:
    """A model whose answers are in a dataset. Of a run of ours, its run.json says what it was trained from: once.

    Rounds of training lead to the same runs again and again.
    """
    path, fingerprint = Path(entry["path"]), entry.get("fingerprint")
    what = f"{entry['stage']} run" if "stage" in entry else "model"
    node = {"path": str(path), "fingerprint": fingerprint, "model": what}
    if "stage" not in entry or not path.exists():
        return {**node, "state": "missing" if fingerprint and not path.exists() else "ok"}
    try:
        run = json.loads((path / "run.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        return {**node, "state": "unreadable", "fault": str(error)}
    if run.get("model_fingerprint") != fingerprint:
        return {**node, "state": "changed", "now": run.get("model_fingerprint") or "unfinished"}
    if (str(path), fingerprint) in runs:
        return {**node, "state": "again"}
    runs.add((str(path), fingerprint))
    models = [_model(parent, below, runs) for parent in run.get("parents") or []]
    return {**node, "state": "ok", "parents": models + [_parent(data, below, runs) for data in run.get("data") or []]}


def _file(entry: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(entry["path"])
    state = "missing"
    if path.is_file():
        state = "ok" if file_hash(path) == entry.get("sha256") else "changed"
    return {"path": str(path), "state": state, "sha256": entry.get("sha256")}


def faults(node: Mapping[str, Any]) -> int:
    """How many datasets and files of the chain are missing, changed or unreadable."""
    own = node["state"] not in ("ok", "again")
    return own + sum(map(faults, (*node.get("parents", ()), *node.get("files", ()))))


def show(node: Mapping[str, Any]) -> None:
    """Print what `lineage` returns, as a tree from the dataset to what it was made from."""
    for line in _lines(node):
        console.say(line)
    if wrong := faults(node):
        hint = "paths are as they were typed; is this the folder in which the commands were run?"
        console.warn(f"{wrong} of the inputs are missing or have changed; {hint}")


def _lines(node: Mapping[str, Any]) -> list[str]:
    short = (node.get("fingerprint") or node.get("sha256") or "")[:SHORT]
    count = "" if node.get("count") is None else f"{node['count']:,} "
    kind = f"{count}{node['kind']}s" if "kind" in node else node.get("model", "")
    state = STATES[node["state"]] + (f": now {node['now'][:SHORT]}" if "now" in node else "")
    state += f": {node['fault']}" if "fault" in node else ""
    lines = ["  ".join(part for part in (node["path"], short, kind, state) if part)]
    below = [*node.get("parents", ()), *node.get("files", ())]
    bar = "│ " if below else "  "
    if node.get("command"):
        lines.append(f"{bar}{node['command']}")
    counts = {name: total(value) for name, value in node.get("counts", {}).items()}
    if listed := ", ".join(f"{name} {count:,}" for name, count in counts.items() if count):
        lines.append(bar + listed)
    for index, child in enumerate(below):
        last = index == len(below) - 1
        first, *rest = _lines(child)
        lines += [("└─ " if last else "├─ ") + first, *(("   " if last else "│  ") + line for line in rest)]
    return lines
