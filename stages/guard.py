"""`rlhf guard`: whether a PPO run improves or games its reward, by its gold reward."""

from __future__ import annotations

from pathlib import Path

from rlhf.cli import options
from rlhf.core.console import print_json, say
from rlhf.doctor.evidence import guard_alarms, read_evidence


def command(
    runs: list[Path],
    *,
    plot: Path | None = None,
    as_json: options.JsonLines = False,
) -> None:
    """Say where the gold reward of PPO runs peaks, with Gao's form fitted to it, and list the guard's alarms.

    Args:
        runs: PPO runs with a gold reward, finished, running or crashed.
        plot: Draw gold and proxy against sqrt(KL) into this SVG, PNG or PDF file.
        as_json: Print only JSON lines, one per run.
    """
    from rlhf.guard.curve import curve_of, describe  # imports numpy
    from rlhf.guard.curve import plot as draw

    for run in runs:
        curve, alarms = curve_of(read_evidence(run)), guard_alarms(run)
        if as_json:
            print_json({"run": str(run), **curve.as_dict(), "alarms": alarms})
            continue
        say(f"{run}: {len(curve.steps):,} updates with a gold reward", style="bold")
        for line in describe(curve):
            say(f"  {line}")
        for alarm in alarms:
            say(f"  update {alarm['step']}: {alarm['rule']}: {alarm['what']} ({alarm['action']})", style="yellow")
    if plot is not None:
        draw(runs, plot)
        if not as_json:
            say(f"Drawn: {plot}")
