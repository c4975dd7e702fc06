"""How a policy is sampled outside training. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError
from rlhf.rollout.types import SamplingParams
from rlhf.runs.run import is_run, read_run
from rlhf.runs.run_config import read_run_config

BATCH_SIZE = 32


def sampling_params(path: str | Path, **given: Any) -> SamplingParams:
    """The given options; for the others, how a PPO run sampled in training, or the plain distribution.

    Args:
        path: A run, model folder or hub name.
        given: Fields of `SamplingParams`; None and an empty `stop` mean "not given".

    Raises:
        UserError: A value is out of its range.
    """
    chosen: dict[str, Any] = {"max_new_tokens": 128}
    if is_run(path) and read_run(path)["stage"] == "ppo":
        rollout = read_run_config(path)["rollout"]
        names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "stop")
        chosen |= {name: rollout[name] for name in names}
    chosen |= {name: value for name, value in given.items() if value not in (None, [], ())}
    params = SamplingParams(**chosen | {"stop": tuple(chosen.get("stop", ())), "batch_size": BATCH_SIZE})
    if not 0 <= params.temperature < math.inf:
        raise UserError(f"--temperature {params.temperature} is not a number from 0 (greedy) up")
    if not 0 < params.top_p <= 1:
        raise UserError(f"--top-p {params.top_p} is not above 0 and at most 1")
    if params.min_new_tokens > params.max_new_tokens:
        raise UserError(f"--min-new-tokens {params.min_new_tokens} is above --max-new-tokens {params.max_new_tokens}")
    return params
