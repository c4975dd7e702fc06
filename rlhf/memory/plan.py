"""Whether a config fits on GPUs, also with some keys changed, and the cheapest change that makes it fit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.config.base import StageConfig
from rlhf.config.load import check_config, override_values
from rlhf.config.optimizers import refuse_optimizer
from rlhf.core.errors import UserError
from rlhf.distributed.deepspeed_json import deepspeed_settings
from rlhf.ppo.config import PPOConfig

GIB = 2**30
MARGIN, CONTEXT = 0.08, 1.0 * GIB
"""Fraction that an allocator adds by rounding, and bytes that CUDA and NCCL use besides tensors."""
TRACED = 3
"""Micro-batches of 1 to 4 sequences are traced; memory is linear in their number, and larger ones take minutes."""
FILES = {
    "0": None,
    "1": "configs/deepspeed/zero1.json",
    "2": "configs/deepspeed/zero2.json",
    "2, offload": "configs/deepspeed/zero2-offload.json",
    "3": "configs/deepspeed/zero3.json",
    "3, offload": "configs/deepspeed/zero3-offload.json",
}
"""ZeRO stage -> the DeepSpeed JSON of the table. Stage 0 is what several processes without a file use."""


class MemoryPlan:
    """Predictions for a config on a machine, also with some keys changed.

    Args:
        kind: The stage's config class.
        values: The config's keys and values.
        where: The config's file, for messages.
        processes: Number of processes, one per GPU.
        size: Memory of a GPU in bytes.
        base: Folder with the config.json of models that are not trained yet.
        longest: Longest prompt or row in tokens, if known.
        candidates: Number of answers in a ranking.
    """

    def __init__(
        self, kind: type[StageConfig], values: dict[str, Any], where: str, processes: int, size: float,
        base: str | None = None, longest: int | None = None, candidates: int = 4,
    ) -> None:  # fmt: skip
        self.kind, self.values, self.where = kind, values, where
        self.processes, self.size, self.base, self.longest, self.candidates = processes, size, base, longest, candidates
        self.config: Any = self.changed()
        self.bfloat16 = self.config.precision != "float32"
        self._traced: dict[Any, tuple[Any, Any]] = {}

    @property
    def budget_key(self) -> str:
        return "batch.micro_batch_tokens" if issubclass(self.kind, PPOConfig) else "batch.micro_batch_size"

    def changed(self, *changes: str) -> Any:
        """The config with `key=value` changes."""
        return check_config(self.kind, self._values(changes), self.where)

    def _values(self, changes: Sequence[str]) -> dict[str, Any]:
        values = copy.deepcopy(self.values)
        override_values(values, changes)
        return values

    def predict(self, *changes: str) -> Any:
        """The prediction for one process, with `key=value` changes."""
        config = self.changed(*changes)
        settings = self._settings(config)
        from rlhf.memory.predict import ZeroLayout, predict  # imports torch

        traced, layout = self._trace(config, settings is not None), ZeroLayout.of(settings)
        return predict(traced, layout, self.processes, gpu=True, optimizer=config.optimizer.algorithm)

    def _trace(self, config: Any, deepspeed: bool) -> Any:
        """The config's traced model; traced for one and for several sequences, and linear in their number."""
        from rlhf.memory.traced_model import TracedModel  # imports torch

        key = (deepspeed, config.gradient_checkpointing, str(config.tuning), str(getattr(config, "critic", "")))
        if key not in self._traced:
            ends, budgets = [], self.budgets()[:TRACED]
            for budget, share in ((budgets[0], 8), (budgets[-1], 1)):
                values = config.model_copy(update=_nested(config, self.budget_key, budget))
                if isinstance(config, PPOConfig):
                    few = max(1, config.rollout.batch_size // share)
                    values = values.model_copy(update=_nested(config, "rollout.batch_size", few))
                shape = replace(self._batch_shape(values), micro_batches=2)  # for targets with one, and with several
                ends.append(TracedModel(values, shape, self.bfloat16, deepspeed, base=self.base))
            self._traced[key] = (ends[0], ends[1])
        few, many = self._traced[key]
        return few.extrapolate_to(many, self._batch_shape(config))

    def _batch_shape(self, config: Any) -> Any:
        from rlhf.memory.workload import batch_shape, limit_of  # imports torch

        return batch_shape(config, limit_of(config, self.base), self.processes, self.longest, self.candidates)

    def with_length(self, tokens: int) -> MemoryPlan:
        """The same for prompts (ppo) or rows of this many tokens, with `model.max_length` raised where it is less."""
        changes, most = [], tokens
        if isinstance(self.config, PPOConfig):
            changes, most = [f"data.max_prompt_tokens={tokens}"], tokens + self.config.rollout.max_new_tokens
        if most > (self.config.model.max_length or most):
            changes.append(f"model.max_length={most}")
        values, size = self._values(changes), self.size
        return MemoryPlan(self.kind, values, self.where, self.processes, size, self.base, tokens, self.candidates)

    def needs(self, *changes: str) -> float:
        """Peak bytes on a GPU, including margin and CUDA context."""
        return _with_margin(self.predict(*changes).peak)

    def works(self, *changes: str) -> bool:
        """Whether the optimizer works with the rest of the config."""
        try:
            self._settings(self.changed(*changes))
        except UserError:
            return False
        return True

    def _settings(self, config: Any) -> dict[str, Any] | None:
        """DeepSpeed's settings, which the optimizer must work with."""
        settings = deepspeed_settings(config.deepspeed, self.processes)
        refuse_optimizer(config.optimizer.algorithm, settings, self.bfloat16, installed=False)
        return settings

    def fits(self, *changes: str) -> bool:
        return self.needs(*changes) <= self.size

    def budgets(self) -> list[int]:
        """Values of the budget key for micro-batches of 1, 2, 4, ... sequences, ascending."""
        config = self.config
        if isinstance(config, PPOConfig):
            episodes = config.rollout.prompts_per_update * config.rollout.samples_per_prompt
            most = math.ceil(episodes / config.batch.minibatches / self.processes)
            unit = self._batch_shape(config).width
        else:
            most, unit = max(1, config.batch.batch_size // self.processes), 1
        return [unit * rows for rows in sorted({*(2**n for n in range(most.bit_length())), most})]

    def largest_budget(self, *changes: str) -> int | None:
        """The largest value of the budget key that fits; None if none does."""
        found = None
        for budget in self.budgets():
            if not self.fits(*changes, f"{self.budget_key}={budget}"):
                break
            found = budget
        return found

    def cheapest(self) -> list[str] | None:
        """The cheapest change of the config that makes it fit, as overrides; None if none is known.

        From cheap to expensive: smaller micro-batches and fewer sequences decoded together, then also recomputed
        activations, a higher ZeRO stage, offload, 8-bit optimizer state, and LoRA.
        """
        config, kept = self.config, list[str]()
        recompute = [kept] if config.gradient_checkpointing else [kept, ["gradient_checkpointing=true"]]
        files = [kept, *([f"deepspeed={file}"] for file in self._other_files())]
        lora = ["tuning=lora", *(["critic.tuning=lora"] if getattr(config, "needs_critic", False) else [])]
        adapters = [kept] if config.tuning.row.traits["adapter"] else [kept, lora]
        small = [kept, ["optimizer.algorithm=adamw-8bit"]]
        ways = list(itertools.product(*(enumerate(part) for part in (adapters, small, files, recompute))))
        ways.sort(key=lambda way: 40 * way[0][0] + 20 * way[1][0] + 2 * way[2][0] + way[3][0])
        for way in ways:
            changes = [change for _, part in way for change in part]
            if not self.works(*changes):
                continue
            for smaller in ([], self._smaller_rollout(changes)):
                if changes + smaller and self.fits(*changes, *smaller):
                    return changes + smaller
                budget = self.largest_budget(*changes, *smaller)
                if budget is not None:
                    return [*changes, *smaller, f"{self.budget_key}={budget}"]
        return None

    def _smaller_rollout(self, changes: list[str]) -> list[str]:
        """The most sequences decoded together that fit, as an override; nothing if the stage decodes none."""
        if not isinstance(self.config, PPOConfig):
            return []
        sizes = [[f"rollout.batch_size={max(1, self.config.rollout.batch_size // share)}"] for share in (2, 4, 8)]
        fitting = (way for way in sizes if self.rollout_fits([*changes, *way]))
        return next(fitting, sizes[-1])

    def rollout_fits(self, changes: list[str]) -> bool:
        """Whether the phase in which completions are sampled fits."""
        return _with_margin(self.predict(*changes).phases["rollout"].total) <= self.size

    def _other_files(self) -> list[str]:
        """DeepSpeed files that partition more than the config's own; on one GPU, those that offload."""
        names = [file for name, file in FILES.items() if file and (self.processes > 1 or "offload" in name)]
        own = self.config.deepspeed
        return names[names.index(own) + 1 :] if own in names else names


def _with_margin(size: float) -> float:
    return size * (1 + MARGIN) + CONTEXT


def _nested(config: Any, key: str, value: Any) -> dict[str, Any]:
    """A change of a dotted key in the form of pydantic's `model_copy(update=...)`."""
    group, _, name = key.partition(".")
    return {group: getattr(config, group).model_copy(update={name: value})}
