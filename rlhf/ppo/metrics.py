"""The metrics of a PPO run: timings by phase, running score statistics, and its reporter."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.core.console import format_number
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.guard.guard import Alarm
from rlhf.guard.observers import repetition
from rlhf.ppo import kl
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.masked import explained_variance, masked_mean, masked_sum, masked_var
from rlhf.ppo.types import Experience
from rlhf.runs.run import Run
from rlhf.training.reporter import Reporter

SHORT_NAMES = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "len": "rollout/response_length",
    "eos": "rollout/eos_rate",
    "ent": "objective/entropy",
    "clip": "policy/clipfrac",
    "ev": "val/explained_variance",
    "grad": "optimizer/grad_norm",
}
"""Console name -> metric, in the order of the console line."""


def peak_memory_gb() -> float:
    """Peak memory of this process so far in GB (10^9 bytes): of its GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class PPOReporter(Reporter):
    """The reporter of a PPO run: its console line, its evaluations, and what run.json keeps of them.

    Args:
        config: The stage's config.
        run: The run folder.
        done: Updates that a resumed run has done already.
        evaluations: `evaluations` of the reporter before the run was resumed.
    """

    def __init__(self, config: PPOConfig, run: Run, done: int, evaluations: Sequence[dict[str, float]] = ()) -> None:
        super().__init__(run, config.log.report_to, config.updates, done, config.log.watch)
        self.config = config
        self.evaluations = list(evaluations)
        """The metrics of the first and the last evaluation of the run so far."""

    def update(self, done: int, metrics: dict[str, float]) -> None:
        """Report the metrics of an update, the `done`-th counted from 1."""
        if done % self.config.log.every == 0 or done == self.config.updates:
            self.log(done, metrics)
        parts = [f"{short} {format_number(metrics[name], 3)}" for short, name in SHORT_NAMES.items() if name in metrics]
        seconds = sum(metrics[f"time/{phase}"] for phase in ("rollout", "score", "learn"))
        parts.append(f"{format_number(metrics['throughput/rollout'], 3)} tok/s")
        self.bar.step(done, "  ".join(parts), seconds)

    def alarms(self, alarms: Sequence[Alarm]) -> None:
        """Print the guard's alarms, and write them to events.jsonl."""
        self.run.log("events.jsonl", [alarm.as_event() for alarm in alarms])
        for alarm in alarms:
            self.bar.note(f"guard: {alarm.rule}: {alarm.what}, since update {alarm.since}. Action: {alarm.action}")

    def evaluation(
        self, done: int, experience: Experience, chat: ChatTokenizer, tokens: Sequence[Mapping[str, Any]]
    ) -> None:
        """Report an evaluation on held-out prompts, and write its completions to samples.jsonl.

        `tokens` are per-token values of the first completions.
        """
        rollout = experience.rollout
        divergence = masked_sum(kl.k1(experience.logprobs, experience.ref_logprobs), rollout.response_mask)
        metrics = {
            "eval/scores": float(experience.scores.mean()),
            "eval/kl": float(divergence) / len(rollout.completions),
            "eval/response_length": float(rollout.lengths.float().mean()),
            "eval/eos_rate": float(rollout.ended.float().mean()),
        }
        if experience.disagreement is not None:
            metrics["eval/disagreement"] = float(experience.disagreement.mean())
        if "gold" in experience.observed:
            metrics["eval/gold_reward"] = float(experience.observed["gold"].mean())
        self.evaluations = [*self.evaluations[:1], metrics]
        self.log(done, metrics)
        score, length = format_number(metrics["eval/scores"], 3), format_number(metrics["eval/response_length"], 3)
        self.bar.note(
            f"held out after update {done}: score {score}  kl {format_number(metrics['eval/kl'], 3)}  len {length}"
        )
        found = zip(rollout.prompts.messages, rollout.completions, experience.scores.tolist())
        rows: list[dict[str, Any]] = [
            {"messages": m, "answer": chat.decode(a.ids), "score": score, "ended": a.ended} for m, a, score in found
        ]
        if experience.disagreement is not None:
            rows = [row | {"disagreement": one} for row, one in zip(rows, experience.disagreement.tolist())]
        for row, numbers in zip(rows, tokens):
            row["tokens"] = numbers
        self.samples(done, rows)

    def headline(self) -> dict[str, float]:
        """What run.json keeps: the last evaluation, and the score before training."""
        if not self.evaluations:
            return {}
        return {**self.evaluations[-1], "eval/scores_at_start": self.evaluations[0]["eval/scores"]}


OBSERVED = {
    "gold": "objective/gold_reward", "watch": "guard/watch_score", "watch_disagreement": "guard/disagreement",
}  # fmt: skip
"""Observer -> the metric of its mean."""


def guard_metrics(experience: Experience) -> dict[str, float]:
    """What the guard's rules read: mean scores of the observers, and repeated phrases."""
    ids = [completion.ids for completion in experience.rollout.completions]
    seen = experience.observed
    found = {name: float(seen[key].mean()) for key, name in OBSERVED.items() if key in seen}
    return found | {"guard/repetition": repetition(ids)}


def experience_metrics(
    experience: Experience, scores: Tensor, rewards: Tensor, advantages: Advantages
) -> dict[str, float]:
    """Metrics of one update's experience: scores, KL per completion (nats), lengths, ends, explained variance."""
    mask, lengths = experience.rollout.response_mask, experience.rollout.lengths.float()
    observed = guard_metrics(experience)
    pair = (experience.logprobs, experience.ref_logprobs)
    k1, k3 = kl.k1(*pair), kl.k3(*pair)
    metrics = {
        "objective/scores": float(experience.scores.mean()),
        "objective/scores_std": float(experience.scores.std(correction=0)),
        "objective/shaped_scores": float(scores.mean()),
        "objective/rlhf_reward": float(masked_sum(rewards, mask)) / len(mask),
        "objective/kl": float(masked_sum(k1, mask)) / len(mask),
        "objective/kl_k3": float(masked_sum(k3, mask)) / len(mask),
        "objective/advantages_mean": float(masked_mean(advantages.advantages, mask)),
        "objective/advantages_std": float(masked_var(advantages.advantages, mask).sqrt()),
        "objective/entropy": experience.entropy,
        "rollout/response_length": float(lengths.mean()),
        "rollout/eos_rate": float(experience.rollout.ended.float().mean()),
    }
    if experience.disagreement is not None:
        metrics["objective/disagreement"] = float(experience.disagreement.mean())
    metrics |= observed
    if (importance := experience.importance) is not None:
        metrics |= {
            "rollout/sampler_gap_mean": float(importance.gap_mean),
            "rollout/sampler_gap_max": float(importance.gap_max),
            "rollout/importance_truncated": float(importance.truncated),
        }
    if experience.values is not None and advantages.returns is not None:
        explained = float(explained_variance(experience.values, advantages.returns, mask))
        metrics["val/explained_variance"] = explained if explained == explained else 0.0  # the returns do not vary
    return metrics
