"""`rlhf report`: one self-contained HTML page about runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options
from rlhf.core.console import format_number, say, warn
from rlhf.core.errors import UserError
from rlhf.core.files import check_writable
from rlhf.data.store import Dataset, open_dataset
from rlhf.report.facts import DataFacts
from rlhf.report.gather import Subject, gather, located
from rlhf.report.headline import percent
from rlhf.report.page import render
from rlhf.report.pipelines import is_pipeline, planned_runs
from rlhf.runs.run import is_run

MOST_ANNOTATORS = 12
MEASURES = {
    "agreement": "Annotators agree", "ceiling": "Most that a reward model can reach", "ties": "Ties",
    "longer-wins": "The longer answer wins", "first-wins": "The answer shown first wins",
    "bag-of-words": "A bag of words is right", "duplicate-records": "Duplicate records",
    "contradictions": "Pairs with contradictions", "prompts-across-splits": "Prompts in several splits",
}  # fmt: skip
"""Metrics of `rlhf data check` on the page -> their names there."""


def command(
    runs: list[Path],
    *,
    output: Path | None = None,
    data: bool = True,
    live: Annotated[bool, typer.Option("--watch")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 0,
) -> None:
    """Write a report about runs as one self-contained HTML page; several runs are compared.

    Args:
        runs (RUN|PIPELINE...): Run folders, folders with a pipeline's runs, or a pipeline's YAML files.
        output: The page to write; by default report.html in the first folder, or above a pipeline's runs.
        data: Measure the rankings: agreement, biases. May take minutes.
        live: Serve the page to this machine's browser and update it while the runs train; Ctrl-C ends.
        port: With --watch: the port; 0 takes a free one.
    """
    if port and not live:
        raise UserError("--port is for --watch", remedy="Give --watch too.")
    for path in runs:
        if not path.is_dir() and not is_pipeline(path) and not live:
            what = f"{path}: no such folder or pipeline file"
            raise UserError(what, remedy="Name run folders, folders with a pipeline's runs, or its YAML file.")
    for path in runs:
        if live and not path.exists():
            warn(f"{path}: no such folder or file yet; the page shows it once it exists")
    for one in (one for path in runs if is_pipeline(path) for one in planned_runs(path)):
        if not is_run(one.path):
            warn(f"{one.stage}: {one.path} has not begun")

    def draw(*refresh: int) -> str:
        subjects = gather(runs)
        return render(subjects, list(_data(subjects, data)), *refresh)

    if not live:
        path = output or _place(runs[0])
        check_writable(path, "--output")
        options.write_whole(path, draw())
        say(f"Report: {path}")
        return
    if output is not None:
        raise UserError("--output is not for --watch", remedy="When the runs are complete, call it without --watch.")
    from rlhf.report.watch import REFRESH, LivePage, watch

    watch(LivePage(runs, lambda: draw(REFRESH)), port, say)


def _place(path: Path) -> Path:
    """The folder of a path's report: the path, or the folder of a pipeline's runs."""
    if not is_pipeline(path):
        return path / "report.html"
    return Path(os.path.commonpath([one.path.parent for one in planned_runs(path)])) / "report.html"


def _data(subjects: Sequence[Subject], measured: bool) -> Iterator[DataFacts]:
    """Facts of each dataset that the runs read, each once."""
    seen = set()
    for run in (run for subject in subjects for run in subject.runs):
        for entry in run.evidence.info.get("data", []):
            path, mark = str(entry.get("path", "")), str(entry.get("fingerprint", ""))
            if (path, mark) in seen:
                continue
            seen.add((path, mark))
            yield _facts(path, str(entry.get("kind", "record")), mark, located(path, run.path), measured)


def _facts(path: str, kind: str, mark: str, place: Path | None, measured: bool) -> DataFacts:
    if place is None or is_run(place):
        return DataFacts(path, kind, fingerprint=mark, note="no longer there")
    try:
        dataset = open_dataset(place)
    except UserError as error:
        return DataFacts(path, kind, fingerprint=mark, note=f"cannot be read: {str(error).splitlines()[0]}")
    if mark and dataset.fingerprint != mark:
        return DataFacts(path, kind, fingerprint=mark, note="has changed since the run read it, so it is not measured")
    splits = dataset.manifest.get("splits")
    known = {str(k): int(v) for k, v in splits.items()} if isinstance(splits, dict) else {}
    count = dataset.manifest.get("count")
    records = int(count) if isinstance(count, int) else None
    measures, annotators = _measures(dataset) if kind == "ranking" and measured else ([], [])
    return DataFacts(path, kind, records, known, mark, measures, annotators)


@functools.cache
def _checked(path: Path, fingerprint: str) -> Any:
    """The check of a dataset, computed once per --watch."""
    from data_tools.check.report import check  # imports numpy, scipy and scikit-learn

    say(f"Measuring {path}")
    return check(path, near=False)


def _measures(dataset: Dataset) -> tuple[list[Any], list[Any]]:
    """Rows of the page from `rlhf data check`, without its slow search for near duplicates."""
    report = _checked(dataset.path, dataset.fingerprint)
    rows = []
    for name, title in MEASURES.items():
        found = report[name].found
        if found is not None:
            value = percent(found.value) if 0 <= found.value <= 1 else format_number(found.value, 3)
            if found.low is not None and found.high is not None:
                value += f" ({percent(found.low)} to {percent(found.high)})"
            rows.append((title, value, f"of {found.n:,}"))
    annotators = [
        (one.name, one.rankings, one.agreement.value, float(one.agreement.low), float(one.agreement.high), one.verdict)
        for one in report.annotators[:MOST_ANNOTATORS] if one.agreement is not None
    ]  # fmt: skip
    return rows, annotators
