"""What the Trainer logs, as our metrics.jsonl and one readable line a step."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from rlhf.core.console import StepBar, format_number
from rlhf.runs.run import Run

RENAMED = {"loss": "train/loss", "grad_norm": "optimizer/grad_norm", "learning_rate": "optimizer/lr"}
RENAMED |= {"epoch": "train/epoch", "tokens": "train/tokens", "mean_token_accuracy": "train/token_accuracy"}
RENAMED |= {"entropy": "train/entropy"}
"""The Trainer's and TRL's names of metrics -> ours."""


class ReporterCallback(TrainerCallback):
    """Writes every logged step to metrics.jsonl and says it in a line. Logs at every checkpoint and evaluation too.

    A log closes the window over which the loss is averaged; were a checkpoint to fall into a window, the resumed run
    would average over a part of it only.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.bar: StepBar | None = None
        self.since, self.logged = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = StepBar(self.run.stage, state.max_steps, state.global_step)
        self._restart(state)

    def _restart(self, state: TrainerState) -> None:
        self.since, self.logged = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        state.log_history.clear()  # metrics.jsonl is the history; this one would grow in every checkpoint
        row = {_renamed(key): value for key, value in (logs or {}).items() if key != "num_tokens"}
        if "train/loss" in row:
            seconds = time.perf_counter() - self.since
            steps = max(state.global_step - self.logged, 1)
            row |= {"throughput/train": row["train/tokens"] / seconds, "time/step": seconds / steps}
            self.run.log("metrics.jsonl", [{"step": state.global_step, **row}])
            if self.bar is not None:
                self.bar.step(state.global_step, _line(row), seconds / steps)
            self._restart(state)
        elif any(key.startswith("eval/") for key in row):
            self.run.log("metrics.jsonl", [{"step": state.global_step, **row}])
            if self.bar is not None:
                told = {key[5:]: value for key, value in row.items() if key.startswith("eval/")}
                self.bar.note("  held out: " + "  ".join(f"{k} {format_number(v)}" for k, v in told.items()))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart(state)

    def close(self) -> None:
        """Take the progress bar away."""
        if self.bar is not None:
            self.bar.close()


def _line(row: dict[str, Any]) -> str:
    names = {"train/loss": "loss", "optimizer/lr": "lr", "optimizer/grad_norm": "grad", "throughput/train": "tokens/s"}
    return "  ".join(f"{short} {format_number(float(row[key]))}" for key, short in names.items() if key in row)


def _renamed(key: str) -> str:
    return "eval/" + key.removeprefix("eval_") if key.startswith("eval_") else RENAMED.get(key, key)
