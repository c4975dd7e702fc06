"""`rlhf runs`: the runs below a folder, with stage, state and result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf.cli import options
from rlhf.core.console import format_number, print_json, say, table, warn
from rlhf.core.errors import UserError
from rlhf.doctor.diagnosis import diagnose
from rlhf.doctor.evidence import headline, read_evidence
from rlhf.doctor.run_checks import planned_steps
from rlhf.runs.find import run_folders


def command(
    folder: Path = Path("runs"),
    *,
    as_json: options.JsonLines = False,
) -> None:
    """List the runs below a folder, the latest last: stage, state, steps, result, what `rlhf doctor` finds.

    Args:
        folder: Where to look for run folders.
        as_json: Print only JSON lines, one per run.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}", remedy="Name the folder that holds your runs.")
    rows = sorted(_rows(folder), key=lambda row: row["changed"])
    if as_json:
        for row in rows:
            print_json(row)
    elif not rows:
        say(f"There is no run below {folder}")
    else:
        columns = ("run", "stage", "state", "steps", "result", "doctor", "changed")
        shown = [row | {"run": os.path.relpath(row["run"], folder)} for row in rows]
        table(f"Runs below {folder}", columns, [[_cell(row, column) for column in columns] for row in shown])


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in run_folders(folder):
        try:
            run = read_evidence(path)
        except UserError as error:
            warn(str(error).splitlines()[0])
            continue
        yield {
            "run": str(path),
            "stage": run.stage,
            "state": run.state,
            "steps": run.steps,
            "planned": planned_steps(run),
            "result": headline(run),
            "doctor": [finding.name for finding in diagnose(run) if finding.severity != "note"],
            "changed": datetime.fromtimestamp(_changed(path)).isoformat(sep=" ", timespec="minutes"),
        }


def _changed(path: Path) -> float:
    return max(file.stat().st_mtime for file in (path / "run.json", path / "metrics.jsonl") if file.exists())


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column == "steps":
        return f"{row['steps']:,}" + (f" of {row['planned']:,}" if row["planned"] else "")
    if column == "doctor":
        return ", ".join(row["doctor"]) or "-"
    if column == "result":
        result = dict(row["result"])
        start = result.pop("eval/scores_at_start", None)
        words = {name.removeprefix("eval/"): format_number(value, 3) for name, value in result.items()}
        if start is not None:
            words["scores"] = f"{format_number(start, 3)} -> {words['scores']}"
        return ", ".join(f"{name} {value}" for name, value in words.items()) or "-"
    return row[column]
