"""A time limit on Python code that comes from outside: reward functions, chat templates."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeIsUp(BaseException):
    """Not an Exception, so that `except Exception` in the limited code does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block with `TimeIsUp` after this many seconds, and again each second if it goes on.

    The interruption is a signal (SIGALRM), which reaches Python code, sleeps, locks, sockets and regular expressions,
    in the same thread: nothing is left running. It does not reach compiled code that never returns to Python, and
    there is no limit outside of the main thread, where Python has no signals. In a block inside another one, the outer
    limit holds again when the inner block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    outer, started = (0.0, 0.0), time.monotonic()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            outer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also if the signal arrives in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer[0]:
            left = outer[0] - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), outer[1])
