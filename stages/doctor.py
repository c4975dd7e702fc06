"""`rlhf doctor`: what is wrong with a run, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from rlhf.cli import options
from rlhf.cli.errors import print_error
from rlhf.core.console import print_json, say, warn
from rlhf.core.errors import UserError
from rlhf.doctor.diagnosis import checks_made, examine
from rlhf.doctor.evidence import Evidence, read_evidence
from rlhf.doctor.findings import Finding
from rlhf.doctor.run_checks import planned_steps
from rlhf.report.pipelines import folders_of, is_pipeline, planned_runs

MOST_UNMADE = 5
"""Most skipped checks that are listed with the metrics that they need."""
STYLES = {"error": "bold red", "warning": "yellow", "note": None}


def command(
    runs: list[Path],
    *,
    as_json: options.JsonLines = False,
) -> None:
    """Say what is wrong with runs, the worst first, each with its usual causes and a remedy.

    A run that cannot be read is named; the others are examined, and the exit status is 2.

    Args:
        runs (RUN|PIPELINE...): Run folders, finished, running or crashed; folders with a pipeline's runs, or its YAML
            file.
        as_json: Print only JSON lines: one per finding, and one for skipped checks.
    """
    unread = False
    for run in _run_folders(runs):
        try:
            if isinstance(run, UserError):
                raise run
            evidence = read_evidence(run)
        except UserError as error:
            print_error(error)
            unread = True
            continue
        findings, unmade = examine(evidence)
        if as_json:
            for finding in findings:
                print_json({"run": str(evidence.path), **asdict(finding)})
            if unmade:
                print_json({"run": str(evidence.path), "not_checked": unmade})
        else:
            _show(evidence, findings, unmade)
    if unread:
        raise typer.Exit(2)


def _run_folders(paths: Sequence[Path]) -> Iterator[Path | UserError]:
    """The run folders of the paths, each once, or the error of a path without any."""
    seen = set()
    for path in paths:
        try:
            folders = folders_of(path)
            for one in planned_runs(path) if is_pipeline(path) else []:
                if one.path not in folders:
                    warn(f"{one.stage}: {one.path} has not begun")
        except UserError as error:
            yield error
            continue
        for folder in folders:
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder


def _show(run: Evidence, findings: list[Finding], unmade: dict[str, list[str]]) -> None:
    steps = f"step {run.steps:,}" + (f" of {planned:,}" if (planned := planned_steps(run)) else "")
    checks = checks_made(run.stage, unmade)
    result = f"{len(findings)} of {checks} checks found something" if findings else f"{checks} checks, nothing wrong"
    say(f"{run.path}: {run.stage}, {run.state}, {steps}: {result}", style="bold")
    for finding in findings:
        say(f"  {finding.severity}: {finding.name}: {finding.what}", style=STYLES[finding.severity])
        say(f"    Why: {finding.cause}")
        say(f"    Do:  {finding.remedy}")
    if len(unmade) > MOST_UNMADE:
        say(f"  Not checked, because metrics are not logged: {len(unmade)} checks, which --json lists", style="dim")
    elif unmade:
        names = ", ".join(f"{name} ({', '.join(metrics)})" for name, metrics in unmade.items())
        say(f"  Not checked, because these metrics are not logged: {names}", style="dim")
