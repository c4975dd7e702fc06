"""What a run reports while it trains: metrics.jsonl, samples.jsonl, trackers, one console line a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.core.console import StepBar, is_main
from rlhf.core.errors import UserError
from rlhf.runs.run import Run


class Reporter:
    """The reporter of all three stages. Rank 0 writes and prints; the other ranks may call everything.

    Args:
        run: The run folder.
        report_to: Trackers by name: `tensorboard`, `wandb`, `trackio`.
        total: Steps (updates in PPO) of the whole run.
        done: Steps that a resumed run has done already.

    Raises:
        UserError: A tracker's package is not installed.
    """

    def __init__(self, run: Run, report_to: Sequence[str], total: int, done: int = 0) -> None:
        self.run = run
        self.trackers = [_tracker(name, run) for name in report_to] if is_main() else []
        self.bar = StepBar(run.stage, total, done)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to metrics.jsonl and the trackers."""
        self.run.log("metrics.jsonl", [{"step": step, **metrics}])
        for tracker in self.trackers:
            tracker.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write completions to samples.jsonl."""
        self.run.log("samples.jsonl", [{"step": step, **row} for row in rows])

    def close(self) -> None:
        """Remove the progress bar and finish the trackers."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()


def _tracker(name: str, run: Run) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    options = {"logging_dir": str(run.path / "tensorboard")} if kind.requires_logging_directory else {}
    try:
        tracker = kind(run.path.name, **options)
        if hasattr(tracker, "start"):
            tracker.start()
    except ImportError as error:
        raise UserError(f"log.report_to: {name} is not installed ({error})", remedy=f"pip install {name}") from None
    return tracker
