"""Imports that wait until the module is used, so that `rlhf --help` and config errors stay under a second.

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
        setattr(self, name, value)  # the next access costs a dictionary look-up
        return value


def lazy(name: str) -> Any:
    """A stand-in for module `name` that imports it at the first attribute access."""
    return _Lazy(name)
