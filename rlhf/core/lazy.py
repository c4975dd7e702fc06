"""Imports that are delayed until first use, so that `rlhf --help` and config errors take under a second.

Use it as below; the type checker sees the real module::

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # so the next access is a dictionary lookup
        return value


def lazy(name: str) -> Any:
    """A placeholder for module `name` that imports it at the first attribute access."""
    return _Lazy(name)
