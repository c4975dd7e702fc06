"""One measured run of `benchmarks/memory.py`, started as a separate process: `python memory_side.py SPEC.json`.

Memory is resident memory minus that after the imports, by phase. At the start of a phase the kernel's peak counter is
reset (`/proc/self/clear_refs`), at its end it is read (`VmHWM`).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "transformers", "datasets", "peft", "bitsandbytes", "deepspeed", "pandas", "torch._dynamo",
    "transformers.models.llama.modeling_llama", "stages.sft", "stages.reward", "stages.ppo",
)  # fmt: skip


def reward(messages: list[dict[str, str]], answer: str) -> float:
    """A score that costs nothing."""
    return float(len(answer) % 7)


def resident(field: str) -> int:
    """`VmRSS` (current) or `VmHWM` (peak) of this process, bytes."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Phases:
    """Peaks by phase. Work outside a nested phase counts for the phase around it."""

    def __init__(self) -> None:
        for library in LIBRARIES:
            importlib.import_module(library)
        self.base, self.now = resident("VmRSS"), "load"
        self.peaks: dict[str, int] = {}
        self._set_back()

    def _set_back(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def switch(self, name: str) -> str:
        """Record the peak of the phase that ends now."""
        before, peak = self.now, resident("VmHWM") - self.base
        self.peaks[before] = max(peak, self.peaks.get(before, 0))
        self.now = name
        self._set_back()
        return before

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        yield
        self.switch("between" if before == "load" else before)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Wrap a method or a module's function as a phase."""
        inner: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)


def main() -> None:
    """Run the stage of the spec and write its peaks, one file per rank."""
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    phases = Phases()
    import rlhf.ppo.learner
    import rlhf.ppo.scoring
    import rlhf.training.loop
    import stages.ppo
    from rlhf.cli.stage_configs import STAGES
    from rlhf.config.load import check_config

    phases.wrap(stages.ppo.PPO, "rollout", "rollout")
    phases.wrap(rlhf.ppo.scoring.Scorer, "score", "scoring")
    phases.wrap(rlhf.ppo.learner.Learner, "learn", "update")
    phases.wrap(stages.ppo.PPO, "save", "checkpoint")
    phases.wrap(rlhf.training.loop.Loop, "_train_step", "update")
    phases.wrap(rlhf.training.loop.Loop, "_evaluate", "scoring")
    phases.wrap(rlhf.training.loop.Loop, "_save", "checkpoint")
    for module in ("rlhf.ppo.models", "stages.sft", "stages.reward"):
        phases.wrap(importlib.import_module(module), "save_result", "checkpoint")
    config = check_config(STAGES[spec["stage"]], spec["config"], "benchmark")
    importlib.import_module(f"stages.{spec['stage']}").run(config)
    phases.switch("end")
    rank = int(os.environ.get("RANK", "0"))
    Path(f"{spec['result']}-{rank}.json").write_text(json.dumps({"base": phases.base, "peaks": phases.peaks}), "utf-8")


if __name__ == "__main__":
    main()
