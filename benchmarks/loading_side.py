"""One measured run of `benchmarks/loading.py`, a rank of its own: `python loading_side.py SPEC.json`.

The stage runs as a user's would up to its built engine, writes (or, with `resume`, reads) a checkpoint, and saves its
result. No step is trained. What is measured is memory that this process alone holds (`RssAnon`), above that after the
imports; pages of mapped files are shared by the processes of a host and do not count.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "transformers", "datasets", "peft", "bitsandbytes", "deepspeed", "pandas", "torch._dynamo",
    "transformers.models.llama.modeling_llama", "stages.sft", "stages.reward", "stages.dpo", "stages.ppo",
)  # fmt: skip


def reward(messages: list[dict[str, str]], answer: str) -> float:
    """A score that costs nothing."""
    return float(len(answer) % 7)


def private() -> int:
    """Bytes that only this process holds."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peaks:
    """The highest private memory by phase, above that at the start; looked at every two milliseconds."""

    def __init__(self) -> None:
        self.base = private()
        self.highest: dict[str, int] = {}
        self.built = 0
        self._now, self._stopped = "", threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.002):
            self._note()

    def _note(self) -> None:
        phase = self._now
        if phase:
            self.highest[phase] = max(self.highest.get(phase, 0), private() - self.base)

    def phase(self, name: str) -> None:
        """What is held from now on counts for this phase; none for an empty name."""
        self._note()
        self._now = name

    def during(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured as a phase."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.phase(name)
            try:
                return call(*args, **kwargs)
            finally:
                self.phase("")

        return measured


def main() -> None:
    """Run the stage of the spec and write its figures, one file for each rank."""
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for library in LIBRARIES:
        importlib.import_module(library)
    import deepspeed

    import rlhf.ppo.models
    import rlhf.tuning.shards
    import stages.ppo
    from rlhf.cli.stage_configs import STAGES
    from rlhf.config.load import check_config
    from rlhf.core.freeing import give_back
    from rlhf.memory.peak import PeakMemory
    from rlhf.training.loop import Loop

    rlhf.tuning.shards.SHARD_BYTES = spec["shard_bytes"]
    rank, resume = int(os.environ.get("RANK", "0")), spec.get("resume", False)
    stage: Any = importlib.import_module(f"stages.{spec['stage']}")
    peaks: list[Peaks] = []

    def begin(self: PeakMemory) -> None:  # every stage makes one right before it loads its models
        peaks.append(Peaks())
        peaks[0].phase("weights")

    def initialize(*args: Any, **kwargs: Any) -> Any:
        made = peaks[0].during("engine", initialise)(*args, **kwargs)
        peaks[0].phase("weights")
        return made

    def built(engine: Any = None) -> Any:
        peaks[0].phase("")
        peaks[0].built = private() - peaks[0].base
        return engine

    def fit(self: Any, *_: Any) -> None:
        peaks[0].during("resume", self._resume)() if resume else peaks[0].during("checkpoint", self._save)()

    def train(self: Any) -> None:
        peaks[0].during("checkpoint", self.save)()
        self.models.save(self.run.path, self.chat, self.config)

    def save(*args: Any) -> None:
        give_back()  # what glibc keeps from earlier passes would count else
        peaks[0].during("save", save_result)(*args)
        result = peaks[0].highest | {"built": peaks[0].built}
        Path(f"{spec['result']}-{rank}.json").write_text(json.dumps(result), "utf-8")
        if rank == 0:
            print(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)

    initialise = deepspeed.initialize
    deepspeed.initialize = initialize
    PeakMemory.__init__ = begin  # type: ignore[method-assign]
    Loop.fit = fit  # type: ignore[method-assign]
    save_result = rlhf.ppo.models.save_result
    rlhf.ppo.models.save_result = save
    if spec["stage"] == "ppo":
        packs, resumed = stages.ppo.can_pack, stages.ppo.PPO._resume

        def can_pack(*args: Any) -> bool:
            built()
            return packs(*args)

        stages.ppo.can_pack = can_pack
        stages.ppo.PPO._resume = lambda self: peaks[0].during("resume", resumed)(self)  # type: ignore[method-assign]
        stages.ppo.PPO.train = train  # type: ignore[method-assign]
    else:
        engine = stage.supervised_engine
        stage.supervised_engine = lambda *args: built(engine(*args))
        stage.save_result = save
    stage.run(check_config(STAGES[spec["stage"]], spec["config"], "benchmark"), resume, overwrite=not resume)


if __name__ == "__main__":
    main()
