"""`rlhf` commands, each in a process forked from one that has imported the command line: quicker than a new Python."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "trl", "peft", "datasets", "accelerate")


def rlhf(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; `HEAVY` and the heavy modules that it imported end its standard error."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps([str(folder), words, environment, scratch]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, err = (Path(scratch, name).read_text("utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(words, status, out, err)


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    from stages.cli import main

    for line in sys.stdin:
        folder, words, environment, scratch = json.loads(line)
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        os.chdir(folder)
        os.environ |= environment
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(scratch, name), os.O_CREAT | os.O_WRONLY), descriptor)
        sys.argv = ["rlhf", *words]
        try:
            main()
        finally:
            sys.stderr.write("HEAVY " + " ".join(name for name in HEAVY if name in sys.modules))
        return


if __name__ == "__main__":
    _serve()
