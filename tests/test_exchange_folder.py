"""Folders that two processes exchange files in: what a killed process leaves behind is removed by the next one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import tiny

from rlhf.distributed import exchange_folder
from rlhf.distributed.exchange_folder import ExchangeFolder

OWNER = """
import sys
import time
from pathlib import Path
from rlhf.distributed import exchange_folder
exchange_folder.MEMORY = Path(sys.argv[1])
folder = exchange_folder.ExchangeFolder()
(folder.path / "weights").write_text("x")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange_folder, "MEMORY", tmp_path)
    return tmp_path


def test_a_folder_is_private_and_goes_with_its_object(memory):
    folder = ExchangeFolder()
    path = folder.path
    assert path.parent == memory and path.stat().st_mode & 0o777 == 0o700
    del folder
    assert not list(memory.iterdir())


def test_the_next_start_removes_folders_of_killed_processes_and_no_others(memory):
    (memory / "rlhf-exchange-of-another-kind").mkdir()  # has no lock, so it may be anyone's
    elsewhere = memory / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / exchange_folder.LOCK).touch()
    (memory / "rlhf-exchange-link").symlink_to(elsewhere)
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(memory)], cwd=tiny.REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        killed, running = (memory / owner.stdout.readline().strip() for owner in owners)
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait()
        assert killed.is_dir() and running.is_dir()
        mine = ExchangeFolder()
        assert not killed.exists()
        assert (running / "weights").read_text() == "x" and mine.path.is_dir()
        assert (elsewhere / exchange_folder.LOCK).is_file() and (memory / "rlhf-exchange-of-another-kind").is_dir()
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
