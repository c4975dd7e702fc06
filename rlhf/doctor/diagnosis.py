"""All checks on a run, finished, running or crashed, and while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from rlhf.doctor import (  # they fill the table of checks
    data_checks,
    learning_checks,
    ppo_checks,
    run_checks,
    supervised_checks,
)
from rlhf.doctor.evidence import Evidence, NothingLogged
from rlhf.doctor.findings import CHECKS, SEVERITIES, Finding

__all__ = [
    "Watch", "data_checks", "diagnose", "examine", "learning_checks", "ppo_checks", "run_checks", "supervised_checks",
]  # fmt: skip
EVERY = 10
"""Logged steps between two live diagnoses, after the first 20: they read all steps so far."""


def diagnose(evidence: Evidence, live: bool = False) -> list[Finding]:
    """What is wrong with a run, the worst first. With `live` only the checks that watch a training run."""
    return examine(evidence, live)[0]


def examine(evidence: Evidence, live: bool = False) -> tuple[list[Finding], dict[str, list[str]]]:
    """What `diagnose` gives; and the checks that could not be made, with the metrics that were never logged."""
    found, unmade = [], {}
    for row in CHECKS:
        if evidence.stage not in row.stages or (live and not row.live):
            continue
        evidence.absent.clear()
        what = None
        with suppress(NothingLogged):
            what = row.fn(evidence)
        if what is not None:
            found.append(Finding(row.name, row.severity, what, row.cause, row.remedy))
        elif evidence.absent:
            unmade[row.name] = sorted(evidence.absent)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)), unmade


def checks_made(stage: str, unmade: Mapping[str, object]) -> int:
    """How many checks of a stage were made, without those that `examine` says could not be."""
    return sum(stage in check.stages for check in CHECKS) - len(unmade)


class Watch:
    """Reads what a run logs, and says once what each check finds; notes are left to `rlhf doctor`.

    Args:
        evidence: The run so far. What is wrong with it already is not said again.
        say: Prints a line.
    """

    def __init__(self, evidence: Evidence, say: Callable[[str], None]) -> None:
        self.evidence, self.say, self.logged = evidence, say, 0
        self.known = {finding.name for finding in diagnose(evidence, live=True)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a step. May print."""
        self.evidence.add(step, metrics)
        self.logged += 1
        if self.logged > 20 and self.logged % EVERY:
            return
        for finding in diagnose(self.evidence, live=True):
            if finding.name not in self.known and finding.severity != "note":
                self.known.add(finding.name)
                self.say(f"{finding.severity}: {finding.name}: {finding.what}. {finding.remedy}")
