"""What can be wrong with SFT, reward models, DPO and specialists, by their metrics."""

from __future__ import annotations

import math

from rlhf.doctor.evidence import WINDOW, Evidence
from rlhf.doctor.findings import SUPERVISED, check, number

RANKING = ("reward", "dpo")
GUESSING = math.log(2)
"""Log loss of a pair whose order is guessed."""


@check(
    "loss-does-not-fall", "warning", SUPERVISED,
    "The learning rate is far too small or too large, or labels and inputs do not belong together.",
    "Train on 16 records for 100 steps: the loss must reach almost 0. Then vary optimizer.lr tenfold.",
)  # fmt: skip
def loss_does_not_fall(run: Evidence) -> str | None:
    """The training loss ends below its start."""
    loss = run["train/loss"].at_least(2 * WINDOW)
    if loss.first < 0.05 or loss.last < 0.995 * loss.first:
        return None
    return f"the training loss went from {number(loss.first)} to {number(loss.last)}"


@check(
    "loss-diverges", "error", SUPERVISED,
    "The learning rate is too high.",
    "Lower optimizer.lr tenfold, raise optimizer.warmup, and take an earlier checkpoint.",
)  # fmt: skip
def loss_diverges(run: Evidence) -> str | None:
    """The training loss does not rise far above its lowest value."""
    loss = run["train/loss"].at_least(2 * WINDOW)
    if loss.last < 1.5 * loss.first or loss.last < 0.1:
        return None
    return f"the training loss rose from {number(loss.first)} to {number(loss.last)}"


@check(
    "overfits", "warning", SUPERVISED,
    "The model memorises the training records.",
    "Train for fewer epochs, lower optimizer.lr, use LoRA, or bring more data; the best checkpoint is where eval/loss "
    "was lowest.",
)  # fmt: skip
def overfits(run: Evidence) -> str | None:
    """The held-out loss does not rise while the training loss falls."""
    held_out, loss = run["eval/loss"], run["train/loss"]
    if len(held_out) < 3 or len(loss) < WINDOW:
        return None
    lowest = min(held_out.values)
    if held_out.values[-1] < 1.1 * lowest + 0.01 or loss.last >= loss.first:
        return None
    step = held_out.steps[held_out.values.index(lowest)]
    return f"the held-out loss was {number(lowest)} at step {step:,} and is {number(held_out.values[-1])} now"


@check(
    "too-good-at-the-start", "warning", ("sft",),
    "The model has seen these answers, or the prompt contains them.",
    "Read a few records of the training data, and run `rlhf data check` for duplicates of prompts.",
)  # fmt: skip
def too_good(run: Evidence) -> str | None:
    """The model has not seen the demonstrations."""
    loss = run["train/loss"].at_least(3)
    if loss.values[0] > 0.02:
        return None
    return f"the loss of the first steps is {number(loss.values[0])} nats per token: nothing is left to learn"


@check(
    "no-better-than-guessing", "error", RANKING,
    "The rankings are noise, their order is reversed, or the model learned nothing.",
    "Run `rlhf data check` for agreement between annotators; train longer or at another rate.",
)  # fmt: skip
def guessing(run: Evidence) -> str | None:
    """Held-out pairs are ordered better than by a coin."""
    accuracy = run["eval/accuracy"].at_least(2)
    if max(accuracy.values) > 0.53:
        return None
    return f"held-out accuracy is {accuracy.values[-1]:.3f}; a coin gives 0.5"


@check(
    "overconfident", "warning", RANKING,
    "The model is overconfident: too many epochs, too high a rate, or noisy labels.",
    "Train for one epoch, lower optimizer.lr, or use label smoothing in the ranking loss.",
)  # fmt: skip
def overconfident(run: Evidence) -> str | None:
    """The log loss of held-out pairs is below that of guessing."""
    accuracy, log_loss = run["eval/accuracy"], run["eval/log_loss"].at_least(2)
    if log_loss.values[-1] <= GUESSING + 0.02 or accuracy.logged[-1] <= 0.53:
        return None
    return (
        f"held-out log loss is {number(log_loss.values[-1])} nats at an accuracy of {accuracy.values[-1]:.3f};"
        f" guessing gives {GUESSING:.3f}"
    )


@check(
    "better-than-the-annotators", "warning", ("reward",),
    "The held-out rankings are also in the training data, or something such as length gives their order away.",
    "Run `rlhf data check` for prompts in both splits; compare with 'the longer answer wins' in reward_metrics.json.",
)  # fmt: skip
def above_ceiling(run: Evidence) -> str | None:
    """Accuracy stays below what human agreement allows."""
    accuracy, ceiling = run["eval/accuracy"], run["eval/ceiling"]
    if not len(accuracy) or not len(ceiling) or accuracy.values[-1] <= ceiling.values[-1] + 0.03:
        return None
    return f"held-out accuracy is {accuracy.values[-1]:.3f}; the annotators' agreement allows {ceiling.values[-1]:.3f}"
