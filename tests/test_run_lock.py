"""One process at a time in a run folder: the second is refused and names the first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sft_runs
import tiny
import yaml
from run_folders import finished, opened

from rlhf.cli.errors import exit_on_error
from rlhf.core.errors import UserError
from rlhf.runs.lock import LOCK, check_free, lock, unlock

HOLD = """
import sys
from pathlib import Path
from rlhf.runs.lock import lock
lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as one:
        try:
            assert one.stdout is not None and one.stdout.readline() == "locked\n"
            yield one
        finally:
            one.kill()


@pytest.mark.parametrize("how", ["fresh", "resume", "overwrite"])
def test_the_second_process_is_refused_and_names_the_first(how: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if how != "fresh":
        finished(tmp_path / "run")
    before = {path for path in (tmp_path / "run").rglob("*") if path.name != LOCK}
    with another(tmp_path / "run") as first, pytest.raises(UserError) as error:
        opened(tmp_path / "run", **({} if how == "fresh" else {how: True}))
    assert f"in use by process {first.pid} on {socket.gethostname()}" in str(error.value)
    assert {path for path in (tmp_path / "run").rglob("*") if path.name != LOCK} == before


def test_a_lock_ends_with_its_process_even_when_that_is_killed(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        with pytest.raises(UserError, match="in use"):
            check_free(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
        check_free(tmp_path)
        lock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    unlock(tmp_path)


def test_the_lock_holds_through_a_link_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with another(tmp_path / "disk"), pytest.raises(UserError, match="in use"):
        lock(tmp_path / "run")


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    with another(tmp_path):
        (tmp_path / LOCK).write_text("[3]")
        with pytest.raises(UserError, match="in use by another process"):
            lock(tmp_path)
    lock(tmp_path)
    unlock(tmp_path)


def test_a_finished_run_is_not_locked_and_the_same_process_may_go_on(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True)  # after an error in a notebook
    finished(tmp_path / "done")
    with another(tmp_path / "done"):
        pass


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_run_whose_folder_is_taken_away_ends_with_one_error_and_writes_nothing_more(how: str, tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.log("metrics.jsonl", [{"step": 1}])
    (tmp_path / "run").rename(tmp_path / "moved")
    if how == "removed":
        shutil.rmtree(tmp_path / "moved")
    if how == "replaced":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOCK).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"while its run trained(.|\n)*move it back"):
        run.log("metrics.jsonl", [{"step": 2}])
    with pytest.raises(UserError, match="was removed, moved or replaced"), run.checkpoints(1).write(1):
        pass
    with pytest.raises(SystemExit) as ended, exit_on_error():
        (tmp_path / "run" / "cache" / "rows").read_bytes()
    assert ended.value.code == 2 and sorted(tmp_path.rglob("*")) == before
    again = opened(tmp_path / "run", overwrite=True)  # in the same process, as in a notebook
    again.log("metrics.jsonl", [{"step": 1}])
    unlock(again.path)


def test_a_run_goes_on_where_only_its_lock_file_was_deleted(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    (run.path / LOCK).unlink()
    run.log("metrics.jsonl", [{"step": 1}])
    unlock(run.path)


@pytest.mark.slow
def test_a_run_that_is_training_is_neither_resumed_nor_overwritten(tmp_path: Path) -> None:
    values = sft_runs.settings(tiny.write_demonstrations(tmp_path / "demos", 40), tmp_path / "run")
    values |= {"batch": {"batch_size": 4, "max_steps": 100_000}, "optimizer": {"lr": 1e-6}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "stages.cli", "sft", "--config", str(tmp_path / "sft.yaml")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            while not (tmp_path / "run" / "checkpoints").exists():
                assert first.poll() is None
                time.sleep(0.05)
            for words in (["--resume"], ["--overwrite"], []):
                second = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
                assert second.returncode == 2 and f"in use by process {first.pid} on" in second.stderr, second.stderr
            assert first.poll() is None
        finally:
            first.kill()
