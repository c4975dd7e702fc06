"""What was trained and whether it worked: three plain sentences with numbers and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.core.console import format_number
from rlhf.core.intervals import percentile_interval, resampled_sums, wilson
from rlhf.doctor.evidence import headline as results
from rlhf.evaluation.tables import percent
from rlhf.report.gather import Answer, RunRecord, Subject, pairs_of


@dataclass(frozen=True)
class Gain:
    """Scores of answers to the same prompts before and after training."""

    prompts: int
    before: float
    after: float
    interval: tuple[float, float]
    """95% interval of the mean difference, by the bootstrap over prompts."""
    win_rate: float
    win_interval: tuple[float, float]
    """95% Wilson interval of wins among the decided prompts."""

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no measurable change`: whether the interval excludes 0."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no measurable change"


@dataclass(frozen=True)
class Headline:
    """The top of the page."""

    verdict: str
    """A few words: how it went."""
    tone: str
    """`good`, `look` or `bad`: the colour of the verdict."""
    sentences: list[str]


def gain_of(first: Sequence[Answer], last: Sequence[Answer]) -> Gain | None:
    """How scores changed between two evaluations on the same prompts; None for fewer than two scored prompts."""
    scored = [(a.score, b.score) for a, b in pairs_of(first, last) if a.score is not None and b.score is not None]
    if len(scored) < 2:
        return None
    before, after = np.array(scored).T
    differences = after - before
    means = resampled_sums(differences[:, None])[:, 0] / len(differences)
    wins, decided = int((differences > 0).sum()), int((differences != 0).sum())
    return Gain(
        len(scored), float(before.mean()), float(after.mean()), percentile_interval(means),
        wins / decided if decided else 0.5, wilson(wins / decided, decided) if decided else (0.0, 1.0),
    )  # fmt: skip


def gain(run: RunRecord) -> Gain | None:
    """The change between a run's first and last evaluation."""
    steps = sorted(run.evaluations)
    return gain_of(run.evaluations[steps[0]], run.evaluations[steps[-1]]) if len(steps) > 1 else None


def headline(subject: Subject) -> Headline:
    """The verdict and three sentences: what was trained, how good the judge is, what came of it."""
    sentences = [_what(subject), _judge(subject), _outcome(subject)]
    verdict, tone = _verdict(subject)
    return Headline(verdict, tone, [sentence for sentence in sentences if sentence])


def interval(bounds: Sequence[float], as_percent: bool = False) -> str:
    """`95% interval 0.7 to 0.8`."""
    show = percent if as_percent else (lambda value: f"{value:.2f}")
    return f"95% interval {show(bounds[0])} to {show(bounds[1])}"


def _what(subject: Subject) -> str:
    model = next((run.parameters for run in reversed(subject.runs) if run.stage != "reward" and run.parameters), None)
    size = f"A model of {model:,} weights" if model else "The model"
    parts = [_step(run) for run in subject.runs if run.stage != "reward"]
    if not parts:
        return f"A reward model learned from rankings in {subject.last.evidence.steps:,} steps."
    return f"{size} was {', then '.join(parts)}."


def _step(run: RunRecord) -> str:
    steps = f"{run.evidence.steps:,}"
    if run.stage == "sft":
        return f"tuned on demonstrations ({steps} steps)"
    if run.stage == "dpo":
        return f"trained on rankings by DPO ({steps} steps)"
    if run.stage == "ppo":
        per_update = int(run.evidence.option("rollout.prompts_per_update", 0) or 0)
        per_update *= int(run.evidence.option("rollout.samples_per_prompt", 1) or 1)
        return f"trained by PPO ({steps} updates of {per_update:,} answers each)"
    return f"trained as a specialist ({steps} steps)"


def _judge(subject: Subject) -> str:
    run = subject.of("reward", "dpo")
    if run is None:
        return ""
    found = run.held_out if run.stage == "reward" else {}
    accuracy, bounds = found.get("accuracy"), found.get("accuracy_interval")
    name = "The reward model" if run.stage == "reward" else "The policy trained by DPO"
    if not isinstance(accuracy, (int, float)) or not bounds:
        right = results(run.evidence).get("eval/accuracy")
        return "" if right is None else f"{name} orders {percent(right)} of held-out pairs as people did."
    text = f"{name} orders {percent(accuracy)} of {found.get('pairs', 0):,} held-out pairs as people did"
    text += f" ({interval(bounds, as_percent=True)})"
    longer = found.get("longer_accuracy")
    return text + (f"; always choosing the longer answer gets {percent(longer)}." if longer is not None else ".")


def _outcome(subject: Subject) -> str:
    run = subject.of("ppo")
    if run is None:
        loss = results(subject.last.evidence).get("eval/loss")
        return "" if loss is None else f"Its held-out loss is {format_number(loss, 3)}."
    found = gain(run)
    if found is None:
        return "PPO has not been evaluated on held-out prompts twice yet, so nothing can be said about its effect."
    text = (
        f"On {found.prompts:,} held-out prompts the mean score went from {found.before:.2f} to"
        f" {found.after:.2f} ({found.difference:+.2f}, {interval(found.interval)}), and"
        f" {percent(found.win_rate)} of the changed answers score higher than before"
        f" ({interval(found.win_interval, as_percent=True)})"
    )
    kl = results(run.evidence).get("eval/kl")
    return text + ("." if kl is None else f", at a KL of {format_number(kl, 3)} nats per answer.")


def _verdict(subject: Subject) -> tuple[str, str]:
    errors = sum(finding.severity == "error" for run in subject.runs for finding in run.findings)
    unfinished = next((run for run in subject.runs if run.evidence.state != "complete"), None)
    if unfinished is not None:
        state, where = unfinished.evidence.state, f"{unfinished.title} is at step {unfinished.evidence.steps:,}"
        return (f"Running: {where}", "look") if state == "running" else (f"Stopped: {where}", "bad")
    if errors:
        return f"Not to be trusted yet: the doctor found {errors} error{'s' * (errors > 1)}", "bad"
    run = subject.of("ppo")
    found = gain(run) if run is not None else None
    words = {
        "better": ("It worked, by its own reward", "good"),
        "worse": ("It got worse, by its own reward", "bad"),
        "no measurable change": ("No measurable change", "look"),
    }
    text, tone = ("Complete", "good") if found is None else words[found.verdict]
    warnings = dict.fromkeys(
        finding.name for run in subject.runs for finding in run.findings if finding.severity == "warning"
    )
    if not warnings:
        return text, tone
    return f"{text}; the doctor warns: {', '.join(warnings)}", "look" if tone == "good" else tone
