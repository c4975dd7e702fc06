"""`rlhf data annotators`."""

from __future__ import annotations

from data_tools.check import leave_out as leaving
from data_tools.commands.common import DatasetPath, Json, Positive, report


def annotators_command(path: DatasetPath, *, most: Positive = 20, as_json: Json = False) -> None:
    """Measure what leaving each annotator out does to a small reward model, with intervals.

    Args:
        most: Leave out this many at most, those with the most rankings.
    """
    report(leaving.leave_out(path, most), leaving.show, as_json)
