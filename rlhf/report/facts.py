"""Tables of the page: the reward model's card, lineage, cost, versions, config, and how runs differ."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.core.command_line import without_credentials
from rlhf.core.console import format_number
from rlhf.doctor.evidence import headline
from rlhf.evaluation.tables import percent
from rlhf.report.gather import RunRecord, Subject, located
from rlhf.runs.changes import flat
from rlhf.runs.run import is_run, read_run

SLICES = {"by_distance": "difference of ranks", "by_source": "source", "by_annotator": "annotator",
          "by_group": "group"}  # fmt: skip
"""Slices of reward_metrics.json -> what they are by."""
MOST_SLICES = 12


@dataclass(frozen=True)
class DataFacts:
    """A dataset that a run read, as far as it is known."""

    path: str
    kind: str
    records: int | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    measures: Sequence[tuple[str, str, str]] = ()
    """What was measured, its value with interval, and what it means."""
    annotators: Sequence[tuple[str, int, float, float, float, str]] = ()
    """Name, rankings, agreement with the others with its interval, verdict."""
    note: str = ""
    """Why there are no measures, or what is missing."""


# ---- the reward model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A fraction with its interval, as a row of a drawing made of text and boxes."""

    name: str
    value: float
    low: float
    high: float
    note: str


def accuracy_bars(found: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """What the slices are by -> the accuracy in each, from reward_metrics.json."""
    groups = {}
    for key, title in SLICES.items():
        slices = found.get(key)
        bars = [_bar(str(name), one) for name, one in slices.items()] if isinstance(slices, dict) else []
        kept = [bar for bar in bars if bar is not None]
        if len(kept) > 1 or (kept and key == "by_distance"):
            groups[title] = sorted(kept, key=lambda bar: bar.name)[:MOST_SLICES]
    return groups


def _bar(name: str, one: Any) -> Bar | None:
    try:
        low, high = one["accuracy_interval"]
        return Bar(name, float(one["accuracy"]), float(low), float(high), f"{int(one['pairs']):,} pairs")
    except (KeyError, TypeError, ValueError):
        return None


def reward_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Measure, value and meaning of a reward model on held-out rankings."""
    rows = [
        ("Pairs ordered as people did", _with_interval(found, "accuracy"), "50% is guessing"),
        ("Always the longer answer", _percent(found, "longer_accuracy"), "the model must beat this"),
        ("Annotators agree with each other", _percent(found, "annotator_agreement"), "measured by rlhf data check"),
        ("Ceiling of accuracy", _with_interval(found, "ceiling"), "follows from their agreement"),
        ("Best answer found", _percent(found, "top1_accuracy"), "of a whole ranking"),
        ("Kendall's tau-b", _number(found, "kendall_tau_b"), "1 is the annotators' order, 0 is chance"),
        ("Log loss", _number(found, "log_loss"), "0.693 is guessing; lower is better"),
        ("Calibration error", _number(found, "calibration_error"), "how far its probabilities are off"),
        ("Held out", f"{found.get('pairs', 0):,} pairs", f"of {found.get('rankings', 0):,} rankings"),
    ]
    return [row for row in rows if row[1]] if found else []


def _percent(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    return percent(value) if isinstance(value, (int, float)) else ""


def _number(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    return format_number(float(value), 3) if isinstance(value, (int, float)) else ""


def _with_interval(found: Mapping[str, Any], key: str) -> str:
    bounds = found.get(f"{key}_interval")
    if not isinstance(bounds, list) or len(bounds) != 2:
        return _percent(found, key)
    return f"{_percent(found, key)} ({percent(bounds[0])} to {percent(bounds[1])})"


# ---- lineage, cost, versions ---------------------------------------------------------------------------------------


def inputs(run: RunRecord) -> Iterator[tuple[str, str, str, bool]]:
    """Kind, path and fingerprint of each model and dataset that a run read, and whether the model has changed."""
    for parent in run.evidence.info.get("parents", []):
        path, mark = str(parent.get("path", "")), str(parent.get("fingerprint") or "")
        place = located(path, run.path)
        there = read_run(place).get("model_fingerprint") if mark and place is not None and is_run(place) else mark
        yield str(parent.get("stage", "model")), path, mark[:12], there != mark
    for one in run.evidence.info.get("data", []):
        yield str(one.get("kind", "data")), str(one.get("path", "")), str(one.get("fingerprint", ""))[:12], False


@dataclass(frozen=True)
class RunCost:
    """What a run took."""

    seconds: float
    tokens: float
    memory: float
    """Peak bytes of one process."""
    processes: int


def cost(run: RunRecord) -> RunCost:
    """Time in steps (without loading and evaluation), tokens and peak memory, from the run's metrics."""
    evidence = run.evidence
    info = evidence.info
    if run.stage == "ppo":
        phases = ("rollout", "score", "learn")
        seconds = sum(sum(evidence[f"time/{phase}"].values) for phase in phases)
        pairs = zip(evidence["time/learn"].values, evidence["throughput/learn"].values)
        tokens = sum(time * rate for time, rate in pairs)
        logged = len(evidence["time/learn"])
        every = evidence.steps / logged if logged else 1.0  # with log.every above 1 the steps between count too
        seconds, tokens = seconds * every, tokens * every
    else:
        steps, times = evidence["time/step"].steps, evidence["time/step"].values
        seconds = sum(time * (step - before) for time, step, before in zip(times, steps, (0, *steps)))
        tokens = sum(evidence["train/tokens"].values)
    memory = float(info.get("peak_memory") or 0) or max(evidence["memory/peak_gb"].values, default=0.0) * 1e9
    return RunCost(seconds, tokens, memory, int(info.get("processes") or 1))


def duration(seconds: float) -> str:
    """A time in words: `36 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def versions(run: RunRecord) -> dict[str, str]:
    """Package -> version, with the commit of this project's code."""
    packages = run.evidence.info.get("packages")
    found = {str(k): str(v) for k, v in packages.items()} if isinstance(packages, dict) else {}
    return found | {"commit": str(run.evidence.info.get("git") or "unknown")[:12]}


# ---- configs -------------------------------------------------------------------------------------------------------


def differences(configs: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between configs -> the value in each, `-` where it is absent. `run` always differs."""
    found = [{key: str(value) for key, value in flat(config).items()} for config in configs]
    keys = dict.fromkeys(key for one in found for key in one)
    rows = [(key, [one.get(key, "-") for one in found]) for key in keys if key != "run"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


SECRET_KEYS = re.compile(
    r"(?im)^(?P<key>[ \t-]*[\w.-]*(?:api_?key|secret|passw(?:or)?d|credential|authorization|access_?token|auth_?token)"
    r"[\w.-]*[ \t]*:[ \t]*)(?!null\b)\S.*$"
)
SECRET_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b")
SECRET_VARIABLES = re.compile(r"(?i)(?:^|_)(?:key|token|secret|password|passwd|credentials?)$")
HIDDEN = "[hidden]"


def without_secrets(text: str) -> str:
    """A text without what looks like a secret: values of keys such as `api_key` in YAML, keys of well-known services,
    user names in URLs, and values of environment variables whose names say that they are secret."""
    text = SECRET_KEYS.sub(rf"\g<key>{HIDDEN}", without_credentials(text))
    text = SECRET_SHAPES.sub(HIDDEN, text)
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name) and len(value) >= 8:
            text = text.replace(value, HIDDEN)
    return text


def results(subject: Subject) -> dict[str, str]:
    """Headline metrics of a subject's runs, for a table of several subjects."""
    found = {}
    for run in subject.runs:
        for name, value in headline(run.evidence).items():
            found[f"{run.title}: {name.removeprefix('eval/')}"] = format_number(value, 4)
    return found
