"""What a run read, and what its guard said."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf.core.limits import read_json_object
from rlhf.doctor.evidence import Evidence, guard_alarms
from rlhf.doctor.findings import ALL, check, number
from rlhf.doctor.run_checks import parent_info

PPO = ("ppo",)
MOST_PASSES = 20


def _counts(run: Evidence) -> dict[str, Any]:
    """What became of the training records: `kept`, `truncated_prompts`; empty where it is not known."""
    for name in ("prompts", "data"):
        with suppress(OSError, ValueError):
            if run.path is not None:
                return read_json_object(run.path / "cache" / f"{name}-train.json")
    return {}


@check(
    "prompts-cut", "warning", ALL,
    "Prompts are longer than data.max_prompt_tokens or the model's limit, so they lose their beginning: instructions, "
    "the first turns.",
    "Raise data.max_prompt_tokens (PPO) or model.max_length, or filter long prompts: "
    "rlhf data filter DATASET --tokenizer MODEL --max-tokens N.",
    live=False,
)  # fmt: skip
def prompts_cut(run: Evidence) -> str | None:
    """Few prompts are cut."""
    counts = _counts(run)
    kept, cut = counts.get("kept", 0), counts.get("truncated_prompts", 0)
    if not kept or cut < 0.1 * kept:
        return None
    return f"{cut:,} of {kept:,} prompts lost their beginning ({cut / kept:.0%})"


@check(
    "data-exhausted", "note", ALL,
    "The run goes over the same few records again and again, and memorises them.",
    "Add records (rlhf data grow makes prompts), or train for fewer updates or epochs.",
    live=False,
)  # fmt: skip
def data_exhausted(run: Evidence) -> str | None:
    """No record is used more than twenty times."""
    kept = _counts(run).get("kept", 0)
    if run.stage == "ppo":
        passes = run.steps * run.option("rollout.prompts_per_update", 0) / kept if kept else 0.0
    else:
        epochs = run["train/epoch"]
        passes = epochs.values[-1] if len(epochs) else 0.0
    if passes <= MOST_PASSES:
        return None
    return f"each of {kept:,} records was used {number(passes)} times" if kept else f"{number(passes)} passes were made"


@check(
    "clock-drift", "warning", ALL,
    "The chat template writes the date into every prompt, and the models of this run were trained on different days: "
    "one reads a date that it never saw.",
    "Use a template without strftime_now (model.chat_template), or train the stages from one parent, whose time they "
    "inherit.",
    live=False,
)  # fmt: skip
def clock_drift(run: Evidence) -> str | None:
    """Models whose template reads the clock were trained with the same date."""
    mine = _day(run.info.get("template_time"))
    for parent in run.info.get("parents", []):
        theirs = _day(parent_info(parent.get("path")).get("template_time"))
        if mine and theirs and mine != theirs:
            return f"its prompts say {mine}, those of {parent['path']} {theirs}"
    return None


def _day(time: Any) -> str | None:
    try:
        return datetime.fromisoformat(time).date().isoformat()
    except (TypeError, ValueError):
        return None


@check(
    "guard-fired", "warning", PPO,
    "The policy probably games its reward: see docs/guard.md for what each rule means.",
    "Read samples.jsonl; look at `rlhf guard RUN`; raise kl.controller.coef, stop earlier, or train the reward model "
    "on rankings of this policy's answers.",
    live=False,
)  # fmt: skip
def guard_fired(run: Evidence) -> str | None:
    """No rule of the guard against over-optimisation fires."""
    rules = Counter(str(alarm.get("rule")) for alarm in guard_alarms(run.path or Path()))
    times = sum(rules.values())
    return f"its rules {', '.join(rules)} fired ({times} time{'s' * (times > 1)})" if rules else None
