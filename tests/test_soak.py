"""The small form of tests/faults/soak.py: what a PPO process holds does not grow with its updates."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from faults import soak
from ppo_runs import config

from stages.ppo import PPO


def held() -> tuple[int, int, int]:
    """Objects that Python's collector knows, open files and threads of this process."""
    gc.collect()
    return len(gc.get_objects()), psutil.Process().num_fds(), threading.active_count()


@pytest.mark.slow
def test_thirty_updates_hold_no_more_than_ten(tmp_path: Path, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "rollout__prompts_per_update": 4,
        "rollout__max_new_tokens": 6,
        "batch__epochs": 1,
        "batch__minibatches": 1,
    }
    small |= {"checkpoints__every": 5, "checkpoints__keep": 2, "eval__every": 5, "log__record_every": 5}
    stage = PPO(config(tmp_path / "run", prompts, updates=31, **small), False, False)
    seen, update = {}, PPO.update

    def noted(self: PPO, index: int) -> dict[str, float]:
        seen[index] = held()
        return update(self, index)

    monkeypatch.setattr(PPO, "update", noted)
    stage.train()
    objects, files, threads = (now - then for then, now in zip(seen[10], seen[30]))
    assert objects < 20 * 10, f"{objects} objects more after 20 updates"  # a tensor kept per token would be thousands
    assert files == threads == 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_what_grows_is_reported_and_what_grows_at_the_start_alone_is_not() -> None:
    flat = [soak.State(100 * i, 500.0, 12, 4, 900.0, 10.0 * i, 0.1) for i in range(1, 11)]
    assert soak.grown([replace(flat[0], seconds=9.0, memory=480.0), *flat[1:]]) == {}
    found = soak.grown([*flat[:-1], replace(flat[-1], files=13, memory=600.0)])
    assert found == {"files": (12, 13), "memory": (500.0, 600.0)}
