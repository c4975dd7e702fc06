"""A command of `rlhf` in a process of its own, so that its memory is freed at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rlhf.core.errors import SIGTERM_STATUS, Terminated, UserError
from rlhf.distributed.launch import PARENT, PARENT_PID, how_it_ended, run_child


def run_command(words: Sequence[str], what: str, remedy: str) -> None:
    """Run `rlhf WORDS` on our terminal and wait for it.

    Args:
        words: The command and its arguments.
        what: What ends if it fails, such as "the pipeline stopped: sft".
        remedy: What to do then.

    Raises:
        UserError: It failed or was killed.
        KeyboardInterrupt: Ctrl-C was pressed.
        Terminated: SIGTERM was received, and the command ended, during training with a checkpoint.
    """
    environment = {**os.environ, PARENT: "pipeline", PARENT_PID: str(os.getpid())}
    status = run_child([sys.executable, "-m", "stages.cli", *words], environment)
    if status == 130:
        raise KeyboardInterrupt
    if status == SIGTERM_STATUS:
        raise Terminated
    if status:
        raise UserError(f"{what} {how_it_ended(status)}", "Its own message is above.", remedy)
