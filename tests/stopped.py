"""Runs that are stopped as by Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf.training.loop import Loop


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Within this context, a run of any stage but PPO is stopped after that step."""
    usual = Loop._train_step

    def train_step(self: Any) -> Any:
        if self.step == step:
            raise KeyboardInterrupt
        return usual(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_train_step", train_step)
        yield
