"""Samplers: one table, SAMPLERS."""

from __future__ import annotations
from rlhf.table import Table

SAMPLERS = Table("sampler")


@SAMPLERS.row("hf")
def hf() -> None:
    """Ours, in process."""
