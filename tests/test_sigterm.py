"""SIGTERM: the step is finished, a checkpoint is written, and the run continues as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import yaml
from logged import lines
from ppo_processes import environment
from sft_runs import run, same_weights, settings

from rlhf.core.errors import Terminated
from rlhf.runs.sigterm import sigterm_noted
from rlhf.training.loop import Loop


def test_a_signal_is_noted_and_the_handler_of_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_noted() as ended:
        assert not ended()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, after the scheduler's
        assert ended() and ended()
    assert signal.getsignal(signal.SIGTERM) == before


def test_sft_ends_with_a_checkpoint_between_two_lines_of_its_log_and_goes_on(demos, tmp_path, monkeypatch):
    changes = {"log": {"every": 4}, "checkpoints": {"every": 100}, "eval": {"every": 8, "samples": 0}}
    whole = run(settings(demos, tmp_path / "whole", **changes))
    usual = Loop._train_step

    def signalled(self):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self)

    monkeypatch.setattr(Loop, "_train_step", signalled)
    with pytest.raises(Terminated, match=r"Step 6 is in a checkpoint\."):
        run(settings(demos, tmp_path / "cut", **changes))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000006"]
    cut = run(settings(demos, tmp_path / "cut", **changes), resume=True)
    assert lines(cut) == lines(whole) and same_weights(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_command_ends_with_the_line_that_continues(stage, demos, prompts, tmp_path):
    """With two processes, of which the launcher alone gets the signal, as a job script's only child does."""
    values = {"run": str(tmp_path / "run"), "model": {"path": tiny.llama()}, "timeout_seconds": 240}
    if stage == "sft":
        values |= {"data": {"train": [demos]}, "checkpoints": {"every": 10000}, "eval": {"every": 10000}}
        values |= {"batch": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 10000}}
    else:
        values |= {
            "data": {"prompts": prompts, "max_prompt_tokens": 48},
            "updates": 10000,
            "critic": {"init": "policy"},
        }
        values |= {"reward": {"name": "function", "function": "ppo_rewards:letters"}, "checkpoints": {"every": 10000}}
        values |= {"rollout": {"prompts_per_update": 4, "max_new_tokens": 6}, "eval": {"every": 10000}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    words = [stage, "--config", str(file), "--num-processes", "2"]
    command = [sys.executable, "-m", "stages.cli", *words]
    output = tmp_path / "output"
    with output.open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=300) == 143, output.read_text()
    assert f"Continue with: rlhf {' '.join(words)} --resume" in output.read_text()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name[5:]) == lines(tmp_path / "run")[-1]["step"]
