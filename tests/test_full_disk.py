"""A full disk gives the one error in every command that writes, and what was complete stays. A limit of file sizes
stands for the full disk: writing fails in the same calls."""

from __future__ import annotations

import errno
from pathlib import Path

import finished
import pytest
import sft_runs
import tiny
import yaml
from rows import jsonl

from rlhf.cli.errors import full_disk
from rlhf.runs.run import read_run

COMMAND = """
import os, resource, sys
from stages import cli
limit = int(sys.argv.pop(1))
sys.dont_write_bytecode = True  # Python would keep the part of it that the limit leaves
to_read, to_write = os.pipe()  # the output goes to a file, which the limit would cut too
output = os.dup(1)
os.dup2(to_write, 1)
os.dup2(to_write, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    cli.main()
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.flush()
    os.write(1, b".")
    os.write(output, os.read(to_read, 1 << 16))
"""
SAID = "cannot be written: the disk is full, or a quota or limit of file sizes is reached"


def rlhf(limit: int, *words: object) -> tuple[int, str]:
    done = tiny.launch(1, COMMAND, str(limit), *map(str, words))
    return done.returncode, done.stdout


def test_other_exceptions_are_not_taken_for_a_full_disk() -> None:
    assert full_disk(ValueError("x")) is None and full_disk(OSError(errno.ENOENT, "x")) is None


def test_an_exception_that_a_full_disk_led_to_counts() -> None:
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/weights")
    found = full_disk(error)
    assert found is not None and "/data/weights: cannot be written" in str(found)


@pytest.mark.slow
def test_an_import_onto_a_full_disk(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} {tiny.question(i)}", "chosen": tiny.answer(i, 5), "rejected": "No."} for i in range(200)]
    jsonl(tmp_path / "rows.jsonl", rows)
    words = ("data", "import", "auto", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    status, text = rlhf(2000, *words)
    assert status == 2 and "cannot be written" in text and "Traceback" not in text, text
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 600, 30_000])
def test_training_on_a_full_disk_goes_on_once_there_is_room(limit: int, tmp_path: Path) -> None:
    values = sft_runs.settings(tiny.write_demonstrations(tmp_path / "demos", 8, 2), tmp_path / "run")
    values |= {"batch": {"batch_size": 4, "max_steps": 2}, "checkpoints": {"every": 1}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    words = ("sft", "--config", tmp_path / "sft.yaml")
    status, text = rlhf(limit, *words)
    assert status == 2 and SAID in text and "Traceback" not in text, text
    begun = (tmp_path / "run" / "run.json").is_file()
    status, text = rlhf(10**9, *words, *(["--resume"] if begun else []))
    assert status == 0 and read_run(tmp_path / "run")["status"] == "complete", text


@pytest.mark.slow
def test_an_export_onto_a_full_disk(tmp_path: Path) -> None:
    run = finished.sft(tmp_path / "run")
    status, text = rlhf(30_000, "export", run, "--out", tmp_path / "out")
    assert status == 2 and "cannot be written" in text and "Traceback" not in text, text
    assert not (tmp_path / "out").exists()
