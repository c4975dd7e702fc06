"""What reaches the trackers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config.base import LogConfig
from rlhf.runs.run import Run
from rlhf.training.reporter import Reporter

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def opened(run: Path) -> object:
    found = events.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def report(run: Path, steps: range, done: int, offset: float) -> None:
    reporter = Reporter(Run(run, "sft"), LogConfig(report_to="tensorboard").report_to, total=6, done=done, watch=False)
    for step in steps:
        reporter.log(step, {"train/loss": step + offset, "eval/loss": 0.5})
    reporter.close()


def test_a_resumed_run_has_each_step_once_in_tensorboard_with_the_later_value(tmp_path):
    report(tmp_path, range(1, 6), done=0, offset=0.0)
    report(tmp_path, range(4, 7), done=3, offset=0.5)
    points = [(event.step, event.value) for event in opened(tmp_path).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]


def test_samples_are_texts_that_tensorboard_shows_verbatim(tmp_path):
    reporter = Reporter(Run(tmp_path, "ppo"), ["tensorboard"], total=3, watch=False)
    row = {"answer": "<script>alert(1)</script>\n# no heading", "score": 1.5}
    reporter.samples(2, iter([row]))
    reporter.close()
    found = opened(tmp_path)
    (name,) = found.Tags()["tensors"]
    (event,) = found.Tensors(name)
    (text,) = event.tensor_proto.string_val
    lines = text.decode().split("\n")
    assert event.step == 2 and all(line.startswith("    ") for line in lines)
    assert json.loads(text) == row
    (logged,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert json.loads(logged) == {"step": 2, **row}


def test_report_to_is_a_word_or_a_list():
    assert LogConfig(report_to="wandb").report_to == LogConfig(report_to=["wandb"]).report_to == ["wandb"]
    with pytest.raises(ValueError, match="tensorboard"):
        LogConfig(report_to="tensorbord")
