"""The end of a run: killed after its last step it still reports the same, and a finished one can be made longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ppo_runs
import pytest
import sft_runs
import tiny
from logged import updates
from safetensors.torch import load_file

from rlhf.runs.run import RUN_FILES, read_run
from stages import ppo, sft

Start = Callable[..., Path]
"""(run folder, steps, resume) -> the run folder, after the stage has run."""


@pytest.fixture
def demos(tmp_path: Path) -> str:
    return tiny.write_demonstrations(tmp_path / "demos", 12, 4)


def sft_start(demos: str) -> Start:
    def start(run: Path, steps: int, resume: bool = False) -> Path:
        return sft_runs.run(
            sft_runs.settings(
                demos,
                run,
                batch={"batch_size": 4, "micro_batch_size": 4, "max_steps": steps},
                optimizer={"lr": 1e-3, "schedule": "constant", "warmup": 0.0},
                checkpoints={"every": 2},
                eval={"every": 2, "samples": 0},
            ),
            resume,
        )

    return start


def ppo_start(demos: str) -> Start:
    def start(run: Path, steps: int, resume: bool = False) -> Path:
        changes: dict[str, Any] = {"updates": steps, "optimizer__warmup": 0.0, "rollout__prompts_per_update": 4}
        ppo.run(ppo_runs.config(run, demos, **changes), resume=resume)
        return run

    return start


STAGES = {"sft": (sft, sft_start), "ppo": (ppo, ppo_start)}


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_before_its_result_is_recorded_reports_the_same(
    stage: str, demos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, make = STAGES[stage]
    start = make(demos)
    whole = start(tmp_path / "whole", 2)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "finish", killed)
        start(tmp_path / "cut", 2)
    cut = start(tmp_path / "cut", 2, resume=True)
    assert read_run(cut)["metrics"] == read_run(whole)["metrics"] != {}
    assert weights(cut) == weights(whole)
    assert {path.name for path in cut.iterdir()} <= RUN_FILES


@pytest.mark.parametrize(
    ("stage", "key"), [("sft", "batch.max_steps"), pytest.param("ppo", "updates", marks=pytest.mark.slow)]
)
def test_a_finished_run_made_longer_equals_one_that_was_as_long_from_the_start(
    stage: str, key: str, demos: str, tmp_path: Path
) -> None:
    start = STAGES[stage][1](demos)
    start(tmp_path / "run", 2)
    longer, whole = start(tmp_path / "run", 4, resume=True), start(tmp_path / "whole", 4)
    assert read_run(longer)["extended"] == [{key: {"from": 2, "to": 4}}]
    assert read_run(longer)["status"] == "complete" and read_run(longer)["metrics"] == read_run(whole)["metrics"]
    assert updates(longer) == updates(whole)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (longer, whole))
    assert all(bool((first[name] == second[name]).all()) for name in first)
