"""A time limit on Python code that comes from outside: reward functions, chat templates."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf.core.console import warn


class TimeIsUp(BaseException):
    """Not an Exception, so that `except Exception` in the limited code does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block with `TimeIsUp` after this many seconds, and again each second if it goes on.

    In the main thread the interruption is a signal (SIGALRM), which reaches Python code, sleeps, locks, sockets and
    regular expressions, in the same thread: nothing is left running. It does not reach compiled code that never returns
    to Python. In other threads, such as those of a notebook server, Python has no signals: there the exception comes
    with the thread's next line of Python, so a sleep or a wait ends first. A warning says so if it lasts. In a block
    inside another one, the outer limit holds again when the inner block ends.
    """
    if threading.current_thread() is not threading.main_thread():
        with _limit_in_thread(seconds):
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


LASTS = 5
"""Interruptions without effect until a warning is printed, one a second."""


@contextmanager
def _limit_in_thread(seconds: float) -> Iterator[None]:
    """`time_limit` for a thread that gets no signals: another thread raises `TimeIsUp` in it."""
    here, ended, change = ctypes.c_ulong(threading.get_ident()), threading.Event(), threading.Lock()

    def watch() -> None:
        wait, count = seconds, 0
        while not ended.wait(wait):
            with change:
                if ended.is_set():
                    return
                ctypes.pythonapi.PyThreadState_SetAsyncExc(here, ctypes.py_object(TimeIsUp))
            wait, count = 1.0, count + 1
            if count == LASTS:
                warn(
                    f"a call with a time limit of {seconds:g} s goes on: outside of the main thread Python cannot"
                    " interrupt a sleep or a wait"
                )

    threading.Thread(target=watch, daemon=True, name="time limit").start()
    try:
        try:
            yield
        finally:
            ended.set()
    finally:  # also if the exception arrives in the line above
        ended.set()
        with change:  # one that has not arrived yet is not for the code after the block
            ctypes.pythonapi.PyThreadState_SetAsyncExc(here, None)
