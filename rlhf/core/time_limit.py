"""A time limit on Python code that comes from outside: reward functions, chat templates."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlhf.core.console import warn


class TimeIsUp(BaseException):
    """Not an Exception, so that `except Exception` in the limited code does not swallow it."""


NOT_HERE = "outside of the main thread Python cannot interrupt it"


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], Any]]:
    """Interrupt the block with `TimeIsUp` after this many seconds, and again each second if it goes on.

    Yields a function that starts the time again, for a block that makes several calls, each with this limit.

    The interruption is a signal (SIGALRM), which reaches Python code, sleeps, locks, sockets and regular expressions,
    in the same thread: nothing is left running. It does not reach compiled code that never returns to Python. Only the
    main thread has signals: in others, such as those of a notebook server, a block that takes too long is only warned
    of, since an exception that is raised in another thread may hit code after the block. In a block inside another one,
    the outer limit holds again when the inner block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        with _warned(seconds) as restart:
            yield restart
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    def start() -> tuple[float, float]:
        signal.signal(signal.SIGALRM, interrupt)  # a call before may have set a handler of its own
        return signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)

    outer, started = (0.0, 0.0), time.monotonic()
    before = signal.getsignal(signal.SIGALRM)
    try:
        try:
            outer = start()
            yield start
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also if the signal arrives in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer[0]:
            left = outer[0] - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), outer[1])


@contextmanager
def _warned(seconds: float) -> Iterator[Callable[[], Any]]:
    timers: list[threading.Timer] = []

    def start() -> None:
        stop()
        message = f"a call with a time limit of {seconds:g} s goes on: {NOT_HERE}"
        timers.append(threading.Timer(seconds, warn, [message]))
        timers[0].daemon = True
        timers[0].start()

    def stop() -> None:
        while timers:
            timers.pop().cancel()

    start()
    try:
        yield start
    finally:
        stop()
