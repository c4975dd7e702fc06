"""What a PPO run says while it runs: metrics.jsonl, samples.jsonl, one console line an update, trackers, timings."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.core.console import StepBar, is_main, number
from rlhf.core.errors import UserError
from rlhf.data.chat import ChatTokenizer
from rlhf.ppo import kl
from rlhf.ppo.config import PPOConfig, PPOOptimizerConfig
from rlhf.ppo.masked import masked_sum
from rlhf.ppo.types import Experience, Rollout
from rlhf.runs.run import Run

TIMINGS = ("time/", "throughput/", "memory/")
"""Beginnings of the figures that differ between two runs of the same thing."""


@dataclass(frozen=True)
class RunningMeanStd:
    """Count, mean and standard deviation of all scores so far (Chan et al. 1979, pairwise update)."""

    count: int = 0
    mean: float = 0.0
    std: float = 1.0

    def add(self, values: Tensor) -> RunningMeanStd:
        """With more values; the standard deviation is the population's, 1 while there is no spread."""
        new, mean, variance = len(values), float(values.mean()), float(values.var(correction=0))
        total, gap = self.count + new, mean - self.mean
        spread = (self.std**2 * self.count if self.count else 0.0) + variance * new + gap**2 * self.count * new / total
        return RunningMeanStd(total, self.mean + gap * new / total, math.sqrt(spread / total) or 1.0)


def rate_scale(config: PPOOptimizerConfig, number: int, updates: int) -> float:
    """Learning rates as a share of their peak in update `number` (from 0) of `updates`."""
    warm = math.ceil(config.warmup * updates)
    if number < warm:
        return (number + 1) / warm
    done = (number - warm) / max(1, updates - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]


class Clock:
    """Seconds by phase: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[phase] = self._now() - start

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def figures(self, rollout: Rollout) -> dict[str, float]:
        """Seconds and tokens/s of each phase (answer tokens in the rollout, else all), peak memory in GB."""
        tokens = {phase: sum(rollout.totals) for phase in self.seconds} | {"rollout": int(rollout.lengths.sum())}
        figures = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        figures |= {f"throughput/{p}": tokens[p] / max(s, 1e-9) for p, s in self.seconds.items()}
        return figures | {"memory/peak_gb": peak_memory_gb()}


def peak_memory_gb() -> float:
    """Peak memory of this process so far in GB (10^9 bytes): of its GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Reporter:
    """Writes and prints the figures of a PPO run. Rank 0 speaks; the others may call everything."""

    def __init__(self, config: PPOConfig, run: Run, done: int) -> None:
        self.config, self.run = config, run
        self.trackers = _trackers(config, run) if is_main() else []
        self.bar = StepBar("ppo", config.updates, done)
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def update(self, done: int, figures: dict[str, float]) -> None:
        """Note the figures of an update; `done` counts it in."""
        if done % self.config.log.every == 0 or done == self.config.updates:
            self._log(done, figures)
        shown = {
            "score": "objective/scores",
            "kl": "objective/kl",
            "len": "rollout/response_length",
            "eos": "rollout/eos_rate",
            "ent": "objective/entropy",
            "clip": "policy/clipfrac",
            "ev": "val/explained_variance",
            "grad": "optimizer/grad_norm",
        }
        parts = [f"{short} {number(figures[name], 3)}" for short, name in shown.items() if name in figures]
        seconds = sum(figures[f"time/{phase}"] for phase in ("rollout", "score", "learn"))
        parts.append(f"{number(figures['throughput/rollout'], 3)} tok/s")
        self.bar.step(done, "  ".join(parts), seconds)

    def evaluation(self, done: int, experience: Experience, chat: ChatTokenizer) -> None:
        """Note an evaluation on held-out prompts, and write its answers to samples.jsonl."""
        rollout = experience.rollout
        divergence = masked_sum(kl.k1(experience.logprobs, experience.ref_logprobs), rollout.response_mask)
        figures = {
            "eval/scores": float(experience.scores.mean()),
            "eval/kl": float(divergence) / len(rollout.answers),
            "eval/response_length": float(rollout.lengths.float().mean()),
            "eval/eos_rate": float(rollout.ended.float().mean()),
        }
        self._first = self._first or figures
        self._last = figures
        self._log(done, figures)
        score, length = number(figures["eval/scores"], 3), number(figures["eval/response_length"], 3)
        self.bar.note(f"held out after update {done}: score {score}  kl {number(figures['eval/kl'], 3)}  len {length}")
        facts = zip(rollout.prompts.messages, rollout.answers, experience.scores.tolist())
        rows = [
            {"step": done, "messages": m, "answer": chat.decode(a.ids), "score": s, "ended": a.ended}
            for m, a, s in facts
        ]
        self.run.log("samples.jsonl", rows)

    def _log(self, done: int, figures: dict[str, float]) -> None:
        self.run.log("metrics.jsonl", [{"step": done, **figures}])
        for tracker in self.trackers:
            tracker.log(figures, step=done)

    def headline(self) -> dict[str, float]:
        """What run.json keeps: the last evaluation, and the score before training where this process saw it."""
        start = {"eval/scores_at_start": self._first["eval/scores"]} if self._first else {}
        return {**self._last, **start}

    def close(self) -> None:
        """Finish the bar and the trackers."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()


def _trackers(config: PPOConfig, run: Run) -> list[Any]:
    if not config.log.report_to:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    trackers = []
    for name in config.log.report_to:
        try:
            kind = LOGGER_TYPE_TO_CLASS[name]
            options = {"logging_dir": str(run.path / "tensorboard")} if kind.requires_logging_directory else {}
            trackers.append(kind(run.path.name, **options))
        except ImportError as error:
            raise UserError(f"log.report_to: {name} is not installed ({error})", remedy=f"pip install {name}") from None
    for tracker in trackers:
        if hasattr(tracker, "start"):
            tracker.start()
    return trackers
