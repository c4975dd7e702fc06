"""RLHF from human rankings: the library under the three stages.

The names below are imported when they are first used, so `import rlhf` is fast::

    from rlhf import Candidate, Ranking, train_reward, open_reward_model
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from rlhf.core.lazy import BitsandbytesLater

__version__ = "0.1.0"

sys.meta_path.insert(0, BitsandbytesLater)
# It warns that it lacks a 4-bit kernel for CPUs in every process that imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PLACES = {
    "Message": "rlhf.data.schema:Message",
    "Prompt": "rlhf.data.schema:Prompt",
    "Demonstration": "rlhf.data.schema:Demonstration",
    "Candidate": "rlhf.data.schema:Candidate",
    "Proposal": "rlhf.data.schema:Proposal",
    "Ranking": "rlhf.data.schema:Ranking",
    "open_dataset": "rlhf.data.store:open_dataset",
    "DatasetWriter": "rlhf.data.writer:DatasetWriter",
    "train_sft": "stages.library:train_sft",
    "train_reward": "stages.library:train_reward",
    "train_dpo": "stages.library:train_dpo",
    "train_ppo": "stages.library:train_ppo",
    "open_policy": "rlhf.inference.policy:open_policy",
    "complete": "rlhf.inference.sampling:complete",
    "open_reward_model": "rlhf.inference.reward_model:open_reward_model",
    "read_metrics": "rlhf.runs.metrics:read_metrics",
    "UserError": "rlhf.core.errors:UserError",
}
"""Public name -> `module:name`."""

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
