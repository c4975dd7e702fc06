"""The metrics of a run as a table."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.runs.logged import CUT_OFF, logged_lines, logged_numbers
from rlhf.runs.run import read_run

if TYPE_CHECKING:
    import pandas as pd


def read_metrics(run: str | Path) -> pd.DataFrame:
    """The metrics of a run, finished or not: a row per logged step, a column per metric of docs/metrics.md.

    Training metrics and an evaluation at the same step share a row; what was not logged at a step is NaN. A last line
    that was cut off is left out, with a warning if the run is complete.

    Raises:
        UserError: Not a run folder, a damaged line, or a value that is not a number.
    """
    import pandas as pd  # slow, and only this function needs it

    complete, faults = read_run(run)["status"] == "complete", list[str]()
    file, steps = Path(run) / "metrics.jsonl", dict[int, dict[str, float]]()
    for place, row in logged_lines(file, faults, complete):
        steps.setdefault(int(row["step"]), {}).update(logged_numbers(place, row, faults))
    if faults and faults[-1].endswith(CUT_OFF):
        warn(f"{file.parent}: {faults.pop()}")
    if faults:
        more = f"What else may be wrong: rlhf doctor {quote(str(run))}"
        remedy = f"Put the file back from a copy, or repair the line. {more}"
        raise UserError(f"{file.parent}: {faults[0]}", "It was edited or damaged.", remedy)
    frame = pd.DataFrame.from_dict(steps, orient="index")
    return frame.rename_axis("step") if len(frame) else pd.DataFrame()
