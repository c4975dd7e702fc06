"""SIGTERM, which schedulers send before they kill a job: finish the step, write a checkpoint, end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf import distributed


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Within this context SIGTERM does not end the process.

    The function that it gives says whether SIGTERM has come to any rank; every rank calls it, after each step. More of
    them change nothing, since a launcher and a scheduler may both send one. Outside of the main thread, where Python
    cannot handle signals, SIGTERM ends the process as before.
    """
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)

    def any_rank() -> bool:
        return distributed.all_max(torch.tensor(float(bool(came)), device=distributed.device())).item() > 0

    if threading.current_thread() is not threading.main_thread():
        yield any_rank
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield any_rank
    finally:
        signal.signal(signal.SIGTERM, before)
