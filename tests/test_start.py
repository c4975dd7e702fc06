"""The commands that start stages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny

CODE = """
import gc
from stages import start

def collections():
    return sum(generation["collections"] for generation in gc.get_stats())

before = collections()
assert start._imported("sft").run
assert collections() == before and gc.isenabled()
"""


@pytest.mark.slow
def test_garbage_collection_is_off_while_a_stage_is_imported_and_on_afterwards():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
