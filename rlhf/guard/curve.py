"""Gold and proxy of a PPO run against the distance from its start: points, what to say of them, and the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from rlhf.core.console import format_number
from rlhf.core.errors import UserError
from rlhf.doctor.evidence import Evidence, guard_alarms, read_evidence
from rlhf.guard.overoptimization import CurveFit, fit
from rlhf.guard.rules import GOLD, SCORE

KL = "objective/kl"


@dataclass(frozen=True)
class Curve:
    """A run's updates with a gold reward, in their order."""

    steps: list[int]
    distance: np.ndarray
    """sqrt(KL) of each update, float [n]; KL in nats per completion, k1, negative estimates counted as 0."""
    proxy: np.ndarray
    """Mean score that the policy is trained on, float [n]."""
    gold: np.ndarray
    """Mean gold reward, float [n]."""
    fit: CurveFit | None
    """Gao's RL form; None for too few points."""

    @property
    def best(self) -> int:
        """Where the smoothed gold reward is highest, as an index."""
        return int(np.argmax(smooth(self.gold)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is infinite becomes null."""
        found = {
            "steps": self.steps, "sqrt_kl": self.distance.tolist(), "proxy": self.proxy.tolist(),
            "gold": self.gold.tolist(), "best_step": self.steps[self.best],
            "fit": asdict(self.fit) if self.fit else None,
        }  # fmt: skip
        return dict(_finite(found))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over five values around each, fewer at the ends."""
    return np.array([values[max(0, i - 2) : i + 3].mean() for i in range(len(values))])


def curve_of(run: Evidence) -> Curve:
    """The curve of a PPO run.

    Raises:
        UserError: It is not a PPO run, or has no gold reward.
    """
    if run.stage != "ppo":
        raise UserError(f"{run.path}: a run of {run.stage}", "Only PPO has a gold reward.", "Name a run of PPO.")
    series = {name: dict(zip(run[name].steps, run[name].values)) for name in (GOLD, SCORE, KL)}
    steps = sorted(set(series[GOLD]) & set(series[SCORE]) & set(series[KL]))
    if not steps:
        raise UserError(
            f"{run.path}: has no gold reward", "Its config has no `gold`.",
            "Set gold.reward, such as gold.reward={name: function, function: module:function}, in a new run. "
            f"What the guard's other rules found in this one: rlhf doctor {quote(str(run.path))}",
        )  # fmt: skip
    columns = {name: np.array([values[step] for step in steps]) for name, values in series.items()}
    distance = np.sqrt(np.clip(columns[KL], 0, None))
    return Curve(steps, distance, columns[SCORE], columns[GOLD], fit(distance, columns[GOLD]))


def describe(curve: Curve) -> list[str]:
    """What the curve says, in lines."""
    gold, best = smooth(curve.gold), curve.best
    lines = [
        f"gold {_of(gold[0])} at the start, at most {_of(gold[best])} (mean of updates around {curve.steps[best]},"
        f" sqrt(KL) {_of(curve.distance[best])}), {_of(gold[-1])} at the end; score {_of(curve.proxy[0])} to"
        f" {_of(smooth(curve.proxy)[-1])}"
    ]
    found = curve.fit
    if found is None:
        return [*lines, f"no fit: {len(curve.steps)} updates with a gold reward are too few"]
    lines.append(
        f"R(d) = d (alpha - beta log d), d = sqrt(KL): alpha {_interval(found.alpha)}, beta {_interval(found.beta)};"
        f" explains {found.explained:.0%} of the variance"
    )
    if math.isinf(found.peak.value):
        return [*lines, "the form has no peak: the gold reward does not bend down yet"]
    where = "reached" if found.peak.value <= found.furthest else f"extrapolated beyond {_of(found.furthest)}"
    lines.append(
        f"predicted peak at d {_interval(found.peak)} ({where}), KL {_of(found.peak.value**2)} nats, gold"
        f" {_interval(found.peak_gold)}; {found.falls:.0%} of the bootstrap replicates have a peak"
    )
    return lines


def _of(value: float) -> str:
    return format_number(float(value), 3)


def _interval(value: Any) -> str:
    low, high = ("no bound" if math.isinf(bound) else _of(bound) for bound in (value.low, value.high))
    return f"{_of(value.value)} ({low} to {high})"


# ---- the plot ------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY, RED = "#2f6fb3", "#d9822b", "#777777", "#d64545"


def draw(axes: Any, curve: Curve, alarms: Iterable[Mapping[str, Any]] = (), title: str = "") -> None:
    """Draw gold and proxy, both as gains from their start, against sqrt(KL), with the fitted form and the alarms.

    Args:
        axes: Matplotlib axes.
    """
    form = curve.fit
    start = form.start.value if form else float(curve.gold[0])
    shown = 1.05 * max(float(curve.distance.max()), 1e-6)
    axes.plot(curve.distance, curve.proxy - curve.proxy[0], ".", color=BLUE, label="score (trained on)")
    axes.plot(curve.distance, curve.gold - start, ".", color=ORANGE, label="gold (held out)")
    if form is not None:
        grid, peak, far = np.linspace(0, form.furthest, 200), form.peak, 1.5 * form.furthest
        axes.plot(grid, form(grid) - start, "-", color=ORANGE, label="d (α - β log d)")
        if peak.value <= far:
            axes.axvline(peak.value, color=ORANGE, linestyle=":", linewidth=1, label="predicted peak, 95%")
            axes.axvspan(peak.low, min(peak.high, far), color=ORANGE, alpha=0.12, linewidth=0)
            shown = max(shown, 1.05 * peak.value)
    places = [(curve.distance[curve.steps.index(a["step"])], a) for a in alarms if a["step"] in curve.steps]
    for index, (place, alarm) in enumerate(places):
        axes.axvline(place, color=RED, linewidth=1, label="rule fires" if index == 0 else None)
        axes.annotate(
            alarm["rule"], (place, 0.02 + 0.05 * (index % 6)), (3, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color=RED,
        )  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.set_xlim(-0.02 * shown, shown)
    axes.set(xlabel="sqrt(KL) to the initial policy, KL in nats per completion", ylabel="gain", title=title)
    axes.legend(frameon=False, fontsize=8)


def plot(runs: Sequence[Path], out: Path) -> None:
    """Write the plot of one or several runs to an SVG, PNG or PDF file with a white background.

    Raises:
        UserError: The file's name has another suffix.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if out.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {out}: the name must end in .svg, .png or .pdf")
    style: Any = {
        "savefig.facecolor": "white",
        "text.parse_math": False,
        "svg.hashsalt": "guard",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 3.8 * len(runs)), layout="constrained")
        for place, run in enumerate(runs):
            axes = figure.add_subplot(len(runs), 1, place + 1)
            draw(axes, curve_of(read_evidence(run)), guard_alarms(run), title=run.as_posix())
        metadata: Any = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, metadata=metadata)
