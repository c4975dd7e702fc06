"""When a request may be sent: the limit of requests per minute, pauses that the server asks for, and back-off."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 600.0
"""Seconds. A server that asks for a longer pause ends the command, which can be started again later."""
FIRST_WAIT, LONGEST_BACKOFF = 1.0, 60.0


class Pace:
    """Gives out the times at which requests may be sent. Threads share it.

    Args:
        per_minute: The most requests in a minute; None for no limit.
        clock: The time in seconds.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = 60.0 / per_minute if per_minute else 0.0, clock
        self._lock, self._next = threading.Lock(), 0.0

    def take(self) -> float:
        """Seconds to wait until the caller may send one request, which this call reserves."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._interval
        return start - now

    def hold(self, seconds: float) -> None:
        """Let no request start for this long, because the server asks for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


def backoff(attempt: int, chance: random.Random) -> float:
    """Seconds before the retry after failed attempt `attempt` (from 0): 1, 2, 4, ... up to 60, less up to a quarter.

    The random part keeps requests that failed together from coming back together.
    """
    return min(LONGEST_BACKOFF, FIRST_WAIT * 2.0 ** min(attempt, 30)) * (1 - 0.25 * chance.random())


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait that a response asks for by `retry-after-ms` or `Retry-After` (seconds or a date), or None.

    A date is compared with the server's own clock, the `Date` header.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if seconds >= 0:  # also false for NaN
            return seconds
    try:
        until, now = (parsedate_to_datetime(headers.get(name, "")) for name in ("retry-after", "date"))
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError):
        return None
