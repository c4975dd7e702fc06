"""What of a model is trained: full, part of it, or an adapter over PEFT. One table, TUNING."""

from __future__ import annotations

from rlhf.table import Table

TUNING = Table("tuning method")


@TUNING.row("full", adapter=False, merges=True)
def full(model: object) -> object:
    """Train every weight."""
    return model
