"""What is known of a run: its facts, config, metrics and samples, as the checks read them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.runs.lock import in_use
from rlhf.runs.logged import as_number, logged_lines, logged_numbers
from rlhf.runs.run import read_run
from rlhf.runs.run_config import read_run_config

WINDOW = 5
"""Steps over which "now" is taken: one step alone is noise."""


class NothingLogged(Exception):
    """A value is asked of a metric that was not logged, or not often enough."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged. An empty one has no values to give: `NothingLogged`."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def at_least(self, count: int = WINDOW) -> Series:
        """The same, if it has so many values; else `NothingLogged`, so that the check finds nothing yet."""
        if len(self) < count:
            raise NothingLogged
        return self

    def after(self, fraction: float) -> Series:
        """The part after a fraction of the logged steps."""
        start = int(len(self) * fraction)
        return Series(self.steps[start:], self.values[start:])

    @property
    def first(self) -> float:
        """The median of the first steps."""
        return statistics.median(self.logged[:WINDOW])

    @property
    def last(self) -> float:
        """The median of the last steps."""
        return statistics.median(self.logged[-WINDOW:])

    @property
    def median(self) -> float:
        return statistics.median(self.logged)

    @property
    def logged(self) -> list[float]:
        """The values, at least one."""
        return self.at_least(1).values

    @property
    def mean_and_error(self) -> tuple[float, float]:
        """Mean of at least two values and its standard error, as if the steps were independent."""
        values = self.at_least(2).values
        return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


@dataclass
class Evidence:
    """A run, finished, running, or crashed.

    Args:
        stage: sft, reward, dpo, ppo or specialist.
        config: The resolved config as plain values.
        info: The content of run.json.
        path: The run folder; None while the run itself is watched.
        running: Whether a process holds the run.
    """

    stage: str
    config: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    running: bool = False
    columns: dict[str, Series] = field(default_factory=dict)
    samples: list[Mapping[str, Any]] = field(default_factory=list)
    """The completions of the last evaluation."""
    absent: set[str] = field(default_factory=set)
    """Metrics that were asked for and never logged."""
    damage: list[str] = field(default_factory=list)
    """What is wrong with lines of the logs, such as `metrics.jsonl line 4 cannot be read`."""

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a logged step."""
        for name, value in metrics.items():
            series = self.columns.setdefault(name, Series())
            series.steps.append(step)
            series.values.append(float(value))

    def __getitem__(self, metric: str) -> Series:
        """A metric's series; an empty one, which is noted in `absent`, if it was never logged."""
        if metric not in self.columns:
            self.absent.add(metric)
        return self.columns.get(metric, Series())

    def option(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key."""
        found: Any = self.config
        for name in key.split("."):
            if not isinstance(found, Mapping) or name not in found:
                return default
            found = found[name]
        return found

    @property
    def steps(self) -> int:
        """The last logged step."""
        return max((series.steps[-1] for series in self.columns.values()), default=0)

    @property
    def state(self) -> str:
        """`complete`, `running`, or `stopped` where nothing works on an incomplete run."""
        if self.info.get("status") == "complete":
            return "complete"
        return "running" if self.running else "stopped"

    @property
    def low_precision(self) -> bool:
        """Whether the computation may be in bfloat16; `auto` is, on a GPU."""
        precision = self.option("precision", "auto")
        return bool(precision == "bfloat16" or (precision == "auto" and self.info.get("device", "cpu") != "cpu"))


def read_evidence(path: str | Path) -> Evidence:
    """The evidence in a run folder.

    Raises:
        UserError: It is no run folder, or a file in it is damaged.
    """
    folder = Path(path)
    info = read_run(folder)
    found = Evidence(info["stage"], read_run_config(folder), info, folder, in_use(folder))
    complete = found.state == "complete"
    for place, row in logged_lines(folder / "metrics.jsonl", found.damage, complete):
        found.add(int(row["step"]), logged_numbers(place, row, found.damage))
    samples = list(logged_lines(folder / "samples.jsonl", found.damage, complete))
    found.samples = [row for _, row in samples if row["step"] == samples[-1][1]["step"]]
    for place, row in samples:
        found.damage += [f"{place}: {fault}" for fault in _sample_faults(row)]
    list(_alarms(folder, found.damage, complete))
    return found


def _sample_faults(row: Mapping[str, Any]) -> Iterator[str]:
    """What of a sample cannot be shown."""
    if not isinstance(row.get("answer", ""), str):
        yield "answer is no text"
    if row.get("score") is not None and as_number(row["score"]) is None:
        yield f"score is {json.dumps(row['score'])[:40]}, not a number"


def guard_alarms(run: Path) -> list[dict[str, Any]]:
    """The guard's alarms in a run's events.jsonl: `step`, `rule`, `what`, `action`. Damaged lines are left out."""
    return list(_alarms(run, [], complete=False))


def _alarms(run: Path, damage: list[str], complete: bool) -> Iterator[dict[str, Any]]:
    for place, row in logged_lines(run / "events.jsonl", damage, complete):
        if row.get("event") != "guard":
            continue
        if wrong := [name for name in ("rule", "what", "action") if not isinstance(row.get(name), str)]:
            damage.append(f"{place}: {', '.join(wrong)} is no text")
        else:
            yield row | {"step": int(row["step"])}


# ---- how good a run is ---------------------------------------------------------------------------------------------

HEADLINES = {
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/log_loss"),
    "dpo": ("eval/accuracy", "eval/log_loss"),
    "ppo": ("eval/scores", "eval/kl"),
    "specialist": ("eval/accuracy", "eval/f1", "eval/loss"),
}
"""The metrics that say how good a run is, by stage; see docs/metrics.md."""


def headline(run: Evidence) -> dict[str, float]:
    """The metrics that say how good a run is, by name; of a PPO run also the score at its start.

    Those of a complete run's result, as run.json keeps them, which may be of an earlier step than the last one; else
    the newest that were logged.
    """
    kept = run.info.get("metrics") if run.state == "complete" else None
    found = {}
    for name in HEADLINES.get(run.stage, ()):
        value = _kept(kept, name)
        if value is not None:
            found[name] = value
        elif len(run[name]):
            found[name] = run[name].values[-1]
    if "eval/scores" in found:
        start = _kept(kept, "eval/scores_at_start")
        found["eval/scores_at_start"] = run["eval/scores"].values[0] if start is None else start
    return found


def _kept(metrics: Any, name: str) -> float | None:
    """A number of run.json's metrics, which the reward stage, DPO and specialists write without `eval/`."""
    if not isinstance(metrics, dict):
        return None
    return as_number(metrics.get(name, metrics.get(name.removeprefix("eval/"))))
