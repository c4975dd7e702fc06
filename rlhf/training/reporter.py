"""What a run reports while it trains: metrics.jsonl, samples.jsonl, trackers, one console line a step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.core.console import StepBar, is_main
from rlhf.core.errors import UserError
from rlhf.doctor.diagnosis import Watch
from rlhf.doctor.evidence import read_evidence
from rlhf.runs.run import Run


class Reporter:
    """The reporter of all stages. Rank 0 writes and prints; the other ranks may call everything.

    Args:
        run: The run folder.
        report_to: Trackers by name: `tensorboard`, `wandb`, `trackio`.
        total: Steps (updates in PPO) of the whole run.
        done: Steps that a resumed run has done already.
        watch: Whether the checks of `rlhf doctor` print warnings while the run trains.

    Raises:
        UserError: A tracker's package is not installed.
    """

    def __init__(self, run: Run, report_to: Sequence[str], total: int, done: int = 0, watch: bool = True) -> None:
        self.run = run
        self.trackers = [_tracker(name, run, done) for name in report_to] if is_main() else []
        self.bar = StepBar(run.stage, total, done)
        self.watch = Watch(read_evidence(run.path), self.bar.note) if is_main() and watch else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to metrics.jsonl and the trackers."""
        self.run.log("metrics.jsonl", [{"step": step, **metrics}])
        for tracker in self.trackers:
            tracker.log(dict(metrics), step=step)
        if self.watch is not None:
            self.watch.log(step, metrics)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write completions to samples.jsonl, and to TensorBoard as text."""
        rows = list(rows)
        self.run.log("samples.jsonl", [{"step": step, **row} for row in rows])
        for tracker in self.trackers:
            if isinstance(tracker, TensorBoard):
                tracker.samples(rows, step)

    def close(self) -> None:
        """Remove the progress bar and finish the trackers."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()


class TensorBoard:
    """Event files in the run's `tensorboard/`: a chart per metric, grouped by the word before the slash, and texts.

    Args:
        run: The run folder.
        done: The last step of a resumed run. What an earlier process logged after it is hidden, because the run logs
            these steps again.
    """

    def __init__(self, run: Run, done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One point in the chart of each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """The rows of samples.jsonl as indented JSON, which the page shows verbatim: no Markdown, no HTML.

        Per-token values are left out: they would be thousands of lines.
        """
        for index, row in enumerate(rows):
            words = {key: value for key, value in row.items() if key != "tokens"}
            text = json.dumps(words, ensure_ascii=False, indent=2)
            self._writer.add_text(f"samples/{index}", "    " + text.replace("\n", "\n    "), step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


def _tracker(name: str, run: Run, done: int) -> Any:
    try:
        if name == "tensorboard":
            return TensorBoard(run, done)
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[name](run.path.name)
        if hasattr(tracker, "start"):
            tracker.start()
    except ImportError as error:
        raise UserError(f"log.report_to: {name} is not installed ({error})", remedy=f"pip install {name}") from None
    return tracker
