"""The config of a comparison: tasks, ways, and the budget that each way has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.cli.teacher_options import distill_words
from rlhf.config.base import ModelConfig, Paths, Strict
from rlhf.core.table import Pick
from rlhf.prompting.ways import PROMPTING, WayOption
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.metrics import METRICS, needs

NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,39}")
TRAINED = ("sft", "dpo", "reward", "ppo")
"""Stages that a way may run, in the order in which they run."""


class ComparedTask(TaskConfig):
    split: str | None = None
    """The records that are measured. By default `test` if the dataset has that split, else `eval`. Ways learn from the
    split `train` (and records without a split), and select checkpoints by `eval` if another split is measured."""
    limit: PositiveInt | None = 200
    """Most records that are measured, from the first on."""
    rankings: Paths = []
    """Datasets of rankings for the ways that train with `dpo` or `reward`."""
    reward: str | None = None
    """What scores answers for the metrics `score` and `win_rate`: a reward run or model, or `module:function`."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""

    @property
    def metric(self) -> Pick:
        """The metric that ways are compared by: the first of `metrics`."""
        if self.metrics:
            return self.metrics[0]
        return METRICS.pick("accuracy" if self.labels else "exact_match")

    def faults(self) -> Iterator[str]:
        scored = needs(self.metric) in ("scores", "rival_scores")
        if scored != (self.reward is not None):
            yield "reward: name it exactly if the first metric is `score` or `win_rate`"


class WayConfig(Strict):
    prompting: WayOption = PROMPTING.pick("zero-shot")
    """How the model is asked: a row of the table of ways of prompting with its options, or a YAML file of one."""
    distill: dict[str, Any] | None = None
    """Let a teacher answer the training prompts, and learn from its answers in `sft`: options of `rlhf data distill`,
    such as `{teacher: runs/7b/ppo, max_new_tokens: 256}` or `{teacher: http://localhost:8000/v1, rationales: true}`.
    Each prompt is asked once for all seeds and sizes. (A teacher's distributions: `sft: {distillation: ...}`.)"""
    sft: dict[str, Any] | None = None
    """Train with `rlhf sft`: config keys of that stage, such as `{tuning: {name: lora, rank: 8}}`; `{}` takes the
    defaults. Data, model, run folder and number of steps come from the comparison."""
    dpo: dict[str, Any] | None = None
    """Train with `rlhf dpo` on the task's rankings, from the SFT result or the base."""
    reward: dict[str, Any] | None = None
    """Train a reward model on the task's rankings, for `ppo`; from the SFT result or the base."""
    ppo: dict[str, Any] | None = None
    """Train with `rlhf ppo` against that reward model, or against the `reward` that these keys name."""

    @property
    def stages(self) -> list[str]:
        """The stages that this way runs, in order; none for prompting alone."""
        return [stage for stage in TRAINED if getattr(self, stage) is not None]

    @property
    def is_random(self) -> bool:
        """Whether its answers depend on the seed: by training, by the choice of examples, or by votes on samples."""
        prompting = self.prompting()
        return bool(self.stages or prompting.count or prompting.samples > 1)

    @property
    def about(self) -> str:
        """The way in a few words."""
        words = ["a teacher's answers"] if self.distill else []
        for stage in self.stages:
            tuning = getattr(self, stage).get("tuning")
            name = tuning.get("name") if isinstance(tuning, dict) else tuning
            taught = next(iter(getattr(self, stage).get("distillation") or {}), "").replace("_", " ")
            details = [name, f"a teacher's {taught}" if taught == "logits" else taught]
            about = ", ".join(word for word in details if word)
            words.append(f"{stage} ({about})" if about else stage)
        shots = self.prompting.options.get("shots")
        asked = f"{self.prompting.name}, {shots} examples" if shots else self.prompting.name
        return ", then ".join([*words, asked] if not words or shots or self.prompting.name != "zero-shot" else words)

    def faults(self) -> Iterator[str]:
        if self.distill is not None:
            if self.sft is None:
                yield "distill: nothing learns from the teacher's answers; add `sft: {}`"
            try:
                distill_words(self.distill)
            except ValueError as error:
                yield f"distill.{error}"
        if self.reward is not None and self.ppo is None:
            yield "reward: trains a reward model that nothing uses; add `ppo`"
        if self.ppo is not None and self.reward is None and "reward" not in self.ppo:
            yield "ppo: has nothing to learn from; add `reward: {}`, or name a reward in its keys"
        if self.reward is not None and self.ppo is not None and "reward" in self.ppo:
            yield "ppo.reward: the way trains its reward model itself; leave one of the two out"


class BudgetConfig(Strict):
    updates: PositiveInt | None = None
    """Optimizer steps (PPO: updates)."""
    examples: PositiveInt | None = None
    """Training examples that are seen, with repetitions (PPO: completions)."""
    seconds: PositiveFloat | None = None
    """Seconds of training on this machine. Each stage is timed for a few steps first, and its number of steps follows
    from that. The number is stored, so a comparison that was killed continues with it."""

    def faults(self) -> Iterator[str]:
        if sum(value is not None for value in (self.updates, self.examples, self.seconds)) != 1:
            yield "name exactly one of updates, examples, seconds"


class CompareConfig(Strict):
    run: Annotated[str, Field(min_length=1)]
    """The folder to create: runs of the trained ways, results, table and page."""
    model: ModelConfig
    """The base that every way starts from."""
    tasks: Annotated[dict[str, ComparedTask], Field(min_length=1)]
    """Name -> task."""
    ways: Annotated[dict[str, WayConfig], Field(min_length=1)]
    """Name -> way. The first is the baseline that the others are compared with."""
    budget: BudgetConfig
    """What each trained way may use; a way with several stages divides it evenly among them."""
    examples: list[PositiveInt] = []
    """Also measure ways with only this many training prompts, to train on or to choose few-shot examples from: one
    curve per way. All of the data is always measured too."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    """Repeat with each seed (training, choice of examples); values are means over them, and intervals include their
    variation. A way without either is measured once."""

    def faults(self) -> Iterator[str]:
        for name in [*self.tasks, *self.ways]:
            if not NAME.fullmatch(name):
                yield f"{name!r}: names of tasks and ways are letters, digits, _ . + -, at most 40"
        for name, task in self.tasks.items():
            for way, settings in self.ways.items():
                if (settings.dpo is not None or settings.reward is not None) and not task.rankings:
                    yield (f"tasks.{name}.rankings: the way {way} learns from rankings; name datasets of them")
