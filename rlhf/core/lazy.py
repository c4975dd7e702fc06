"""Imports that are delayed until first use, so that `rlhf --help` and config errors take under a second.

`from rlhf.core.lazy import torch` imports nothing yet, and the type checker sees the real module. Our own modules, and
libraries that one module alone uses, are written as below::

    if TYPE_CHECKING:
        import openai
    else:
        openai = lazy("openai")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # so the next access is a dictionary lookup
        return value


def lazy(name: str) -> Any:
    """A placeholder for module `name` that imports it at the first attribute access."""
    return _Lazy(name)


if TYPE_CHECKING:
    import numpy as np
    import peft
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    import torch.distributed as dist
    import transformers
    from torch import nn
else:
    torch, dist, nn = lazy("torch"), lazy("torch.distributed"), lazy("torch.nn")
    np, pa, pq = lazy("numpy"), lazy("pyarrow"), lazy("pyarrow.parquet")
    peft, transformers = lazy("peft"), lazy("transformers")


class BitsandbytesLater:
    """A finder in `sys.meta_path` that keeps `peft.helpers` from importing bitsandbytes where that is installed.

    The import brings torch's compiler with it, a second in each process, and the module needs it only for the condition
    numbers of quantized weights. Whatever else imports bitsandbytes, a quantized model or optimizer, gets it.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Leave all modules to the other finders.

        Raises:
            ModuleNotFoundError: The import is that of `peft.helpers`, which catches it.
        """
        helpers = sys.modules.get("peft.helpers") if name == "bitsandbytes" else None
        if helpers is not None and getattr(helpers.__spec__, "_initializing", False):
            raise ModuleNotFoundError("PEFT's helpers do without bitsandbytes here", name=name)
