"""What can be wrong with any run: how it ended, its gradients, its memory, what it read, what it wrote."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from rlhf.core.errors import UserError
from rlhf.doctor.evidence import WINDOW, Evidence
from rlhf.doctor.findings import ALL, check, number
from rlhf.judging.texts import grams
from rlhf.runs.run import read_run


def planned_steps(run: Evidence) -> int | None:
    """Steps of the whole run, where its config says so."""
    found = run.option("updates") or run.option("batch.max_steps")
    return int(found) if found else None


@check(
    "stopped", "error", ALL,
    "The process was killed or an error ended it; its own last message says which. Signal 9 is usually memory.",
    "Start the same command with --resume: it continues from the last checkpoint.",
    live=False,
)  # fmt: skip
def stopped(run: Evidence) -> str | None:
    """A run is complete, or a process is working on it."""
    if run.state != "stopped":
        return None
    planned = planned_steps(run)
    saved = sorted((run.path / "checkpoints").glob("step-*")) if run.path else []
    kept = f"the last checkpoint is {saved[-1].name}" if saved else "there is no checkpoint"
    return f"it is not complete, and no process runs it: step {run.steps:,} of {planned or '?'}, {kept}"


@check(
    "not-finite", "error", ALL,
    "A number overflowed: a rate that is too high, a reward that is not finite, float16 weights, or a damaged row.",
    "Take the last checkpoint; lower the learning rate; check the rewards or the data near that step.",
)  # fmt: skip
def not_finite(run: Evidence) -> str | None:
    """Every metric is a finite number."""
    for name, series in sorted(run.columns.items()):
        for step, value in zip(series.steps, series.values):
            if not math.isfinite(value):
                return f"{name} is {value} at step {step:,}"
    return None


@check(
    "damaged-log", "warning", ALL,
    "The file was edited, or a full disk, a copy or another program damaged it.",
    "Put the file back from a copy. Without one, do not trust curves, results and other findings where lines are gone.",
    live=False,
)  # fmt: skip
def damaged_log(run: Evidence) -> str | None:
    """Every line that was logged can be read whole, and a complete run has logged something."""
    if run.damage:
        more = f"; and {len(run.damage) - 3:,} more" if len(run.damage) > 3 else ""
        return f"{'; '.join(run.damage[:3])}{more}"
    last = planned_steps(run) if run.stage == "ppo" else run.info.get("step")  # PPO logs each update
    if run.state == "complete" and "ended_by" not in run.info and isinstance(last, int) and 0 < run.steps < last:
        return f"the run is complete, but metrics.jsonl ends at step {run.steps:,} of {last:,}"
    if run.state == "complete" and not run.columns:
        return "the run is complete, but metrics.jsonl holds no metrics, so hardly anything can be checked"
    return None


@check(
    "gradient-spikes", "note", ALL,
    "Single batches pull much harder than the others: an outlier in the data or in the rewards.",
    "Look at the records of that step; lower optimizer.max_grad_norm, or clip the scores.",
)  # fmt: skip
def gradient_spikes(run: Evidence) -> str | None:
    """No step's gradient is far larger than the others'."""
    later = run["optimizer/grad_norm"].after(0.2).at_least(2 * WINDOW)
    worst = max(later.values)
    if worst < 20 * max(later.median, 1e-9):
        return None
    step = later.steps[later.values.index(worst)]
    return f"the gradient norm was {number(worst)} at step {step:,}; its median is {number(later.median)}"


@check(
    "gradient-always-clipped", "note", ALL,
    "The clip decides the size of every step, so the learning rate means little.",
    "Raise optimizer.max_grad_norm to about the median norm, or lower the learning rate.",
)  # fmt: skip
def always_clipped(run: Evidence) -> str | None:
    """Clipping is for the exceptions."""
    norm, most = run["optimizer/grad_norm"].at_least(2 * WINDOW), run.option("optimizer.max_grad_norm")
    if not most or norm.median < 50 * most:
        return None
    return f"the median gradient norm is {number(norm.median)}, and the clip is at {number(most)}"


@check(
    "memory-grows", "note", ("ppo",),
    "Longer completions or batches than before, or a leak in a reward function.",
    "Compare with rollout/response_length; if lengths are steady, look for lists that your reward function keeps.",
)  # fmt: skip
def memory_grows(run: Evidence) -> str | None:
    """Peak memory is reached early."""
    memory = run["memory/peak_gb"].after(0.5).at_least(2 * WINDOW)
    if memory.values[-1] < 1.3 * memory.values[0]:
        return None
    return f"peak memory rose from {number(memory.values[0])} to {number(memory.values[-1])} GB in the second half"


@check(
    "slows-down", "note", ALL,
    "Longer completions, a machine that others use too, or a reward that answers more and more slowly.",
    "Compare time/rollout, time/score and time/learn: the one that grew names the cause.",
)  # fmt: skip
def slows_down(run: Evidence) -> str | None:
    """Steps take about the same time."""
    for name in ("time/rollout", "time/score", "time/learn") if run.stage == "ppo" else ("time/step",):
        series = run[name]
        if len(series) >= 2 * WINDOW and series.last > 5 * series.after(0.1).first > 0:
            return f"{name} rose from {number(series.after(0.1).first)} to {number(series.last)} s"
    return None


@check(
    "other-template", "error", ALL,
    "The models of this run were trained with different chat templates, so one of them reads text that it never saw.",
    "Train the parent again with the template of this run, or set model.chat_template to the parent's.",
    live=False,
)  # fmt: skip
def other_template(run: Evidence) -> str | None:
    """Parents have the run's tokenizer and chat template."""
    for parent in run.info.get("parents", []):
        info = parent_info(parent.get("path"))
        for key, name in (("tokenizer", "tokenizer"), ("chat_template", "chat template")):
            mine, theirs = run.info.get(key), info.get(key)
            if mine and theirs and mine != theirs and not run.option("reward.retokenize"):
                return f"its {name} is not that of {parent['path']}"
    return None


@check(
    "parent-changed", "note", ALL,
    "The parent was trained again after this run read it, so this run does not continue from what is there now.",
    "Run this stage again if you want the new parent; else keep a copy of both.",
    live=False,
)  # fmt: skip
def parent_changed(run: Evidence) -> str | None:
    """Parents are still those that the run read."""
    for parent in run.info.get("parents", []):
        now = parent_info(parent.get("path")).get("model_fingerprint")
        if now and parent.get("fingerprint") and now != parent["fingerprint"]:
            return f"{parent['path']} has other weights than when this run started"
    return None


def parent_info(path: Any) -> dict[str, Any]:
    """The run.json of a parent; empty if it is no run, or gone."""
    try:
        return read_run(str(path))
    except UserError:
        return {}


@check(
    "identical-completions", "warning", ("ppo",),
    "The policy gives one answer to every prompt, which the reward accepts.",
    "Read samples.jsonl; raise kl.controller.coef; make the reward read the prompt.",
    live=False,
)  # fmt: skip
def identical_completions(run: Evidence) -> str | None:
    """Different prompts get different answers."""
    answers = [str(row.get("answer", "")).strip() for row in run.samples]
    prompts = {json.dumps(row.get("messages")) for row in run.samples}
    if len(prompts) < 8:
        return None
    answer, times = Counter(answers).most_common(1)[0]
    if times < 0.5 * len(answers):
        return None
    return f"{times} of {len(answers)} held-out prompts got the answer {answer[:60]!r}"


@check(
    "repeats-itself", "warning", ("ppo",),
    "The policy loops: it repeats phrases that the reward likes, or lost the ability to end.",
    "Raise kl.controller.coef, lower rollout.max_new_tokens, set shaping.missing_eos={name: score, value: -1}.",
    live=False,
)  # fmt: skip
def repeats_itself(run: Evidence) -> str | None:
    """Few phrases come twice in an answer: four words, or twelve characters where there are no words."""
    shares = []
    for row in run.samples:
        text = str(row.get("answer", ""))
        units, size = (text.split(), 4) if len(text.split()) >= 12 else (list(text), 12)
        phrases = grams(units, size)
        if len(phrases) >= 8:
            shares.append(1 - len(set(phrases)) / len(phrases))
    if len(shares) < 4 or sum(shares) / len(shares) < 0.4:
        return None
    return f"{sum(shares) / len(shares):.0%} of the phrases in its last {len(shares)} answers are repetitions"
