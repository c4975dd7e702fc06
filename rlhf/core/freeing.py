"""Memory that goes back to the system when it is freed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of glibc's `mallopt` (malloc.h). Left to itself it raises them as tensors are freed, to 64 and 32 MiB."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within this context the memory of a freed tensor goes back to the system at once, where the C library is glibc.

    It else keeps pieces below 32 MiB that lie between others. DeepSpeed makes and frees thousands of them: weights,
    partitions before they become one buffer. That is a second share of the model, or more. In training it should keep
    them, because taking memory from the system costs time.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.malloc_trim(0)  # what was kept so far
    libc.mallopt(MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        for option, name, usual in ((MMAP_THRESHOLD, "MMAP", 2**25), (TRIM_THRESHOLD, "TRIM", 2**26)):
            libc.mallopt(option, int(os.environ.get(f"MALLOC_{name}_THRESHOLD_", usual)))


def give_back() -> None:
    """Give the pages of freed memory back to the system, where the C library is glibc.

    Needed from time to time within `freed_at_once` after passes of a model: the places in the heap that these left are
    used before new memory is taken from the system, and stay resident when they are freed again.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
