"""The command that started this process, for provenance records."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """The command line in shell syntax, such as `rlhf data split stories --out split --seed 3`.

    `python -m stages.cli`, which starts the steps of a pipeline, is written `rlhf`. In a program that calls this
    library, the command line is that program's own.
    """
    program = Path(sys.argv[0])
    name = "rlhf" if program.parts[-2:] == ("stages", "cli.py") else program.name
    return shlex.join([name, *sys.argv[1:]])
