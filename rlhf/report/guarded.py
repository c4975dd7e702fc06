"""What the guard of a PPO run said, and its gold reward against the distance from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.plot import COLOURS
from rlhf.doctor.evidence import guard_alarms
from rlhf.guard.curve import curve_of, describe, smooth
from rlhf.report.charts import Chart, ChartLine, draw, thinned
from rlhf.report.gather import Subject

MOST_ALARMS = 20


@dataclass(frozen=True)
class ShownGuard:
    """The guard's part of the page."""

    name: str
    """Of the subject."""
    alarms: Sequence[Mapping[str, Any]]
    """Lines of events.jsonl: step, rule, what, since, action."""
    more: int
    """Alarms that are not shown."""
    lines: list[str]
    """What the gold reward says, as `rlhf guard` prints it."""
    chart: Chart | None


def guarded(subject: Subject, number: int) -> ShownGuard | None:
    """The guard's alarms in a subject's PPO run; None without alarms and gold reward.

    `number` is the subject's place on the page.
    """
    run = subject.of("ppo")
    if run is None:
        return None
    alarms = [alarm for alarm in guard_alarms(run.path) if {"step", "rule", "what", "action"} <= alarm.keys()]
    shown, more = alarms[:MOST_ALARMS], max(0, len(alarms) - MOST_ALARMS)
    try:
        curve = curve_of(run.evidence)
    except UserError:  # no gold reward
        return ShownGuard(subject.name, shown, more, [], None) if alarms else None
    distances = curve.distance.tolist()
    lines = []
    for word, values, colour in (("score", curve.proxy, COLOURS[1]), ("gold reward", curve.gold, COLOURS[0])):
        for title, found, joined in ((word, values, False), (f"{word}, smooth", smooth(values), True)):
            xs, ys = thinned(sorted(zip(distances, found.tolist())))
            lines.append(ChartLine(title, xs, ys, colour, dots=not joined, joined=joined))
    about = "Gold rises and then falls where the policy games its reward; the score keeps rising."
    across = "sqrt(KL), the distance from the start"
    chart = draw(f"guard{number}", "Gold reward and score", about, lines, across, width=6)
    return ShownGuard(subject.name, shown, more, describe(curve), chart)
