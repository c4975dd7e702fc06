"""The metrics of a run as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.core.errors import UserError
from rlhf.runs.run import read_run

if TYPE_CHECKING:
    import pandas as pd


def read_metrics(run: str | Path) -> pd.DataFrame:
    """The metrics of a run, finished or not: a row per logged step, a column per metric of docs/metrics.md.

    Training metrics and an evaluation at the same step share a row; what was not logged at a step is NaN.

    Raises:
        UserError: Not a run folder, or a damaged line.
    """
    import pandas as pd  # slow, and only this function needs it

    read_run(run)
    file, steps = Path(run) / "metrics.jsonl", dict[int, dict[str, float]]()
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            steps.setdefault(row["step"], {}).update(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break  # the run is writing this line
            raise UserError(f"{file}: line {number} is damaged: {error}") from None
    frame = pd.DataFrame(steps.values(), columns=list(dict.fromkeys(name for row in steps.values() for name in row)))
    return frame.set_index("step") if len(frame) else frame
