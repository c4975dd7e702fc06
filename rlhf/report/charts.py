"""Which metrics the page draws, and how: SVG that also prints and works without scripts, with points for hovering."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.core.console import format_number
from rlhf.core.plot import COLOURS, FAINT, INK, svg_plot
from rlhf.doctor.evidence import Evidence

MOST_POINTS = 300
"""Points of a line on the page; longer series are thinned, keeping the lowest and highest value of each stretch."""
WIDTH, HEIGHT = 3.7, 2.1
"""Hundreds of units; drawn at about 340 pixels, letters of 9 points have 11."""
LONG_NAME = 22
"""Letters of a line's name above which the legend has one name a row."""


@dataclass(frozen=True)
class Spec:
    """A chart: some metrics of one stage over the steps."""

    title: str
    metrics: Mapping[str, str]
    """Metric -> its name in the legend."""
    about: str
    """What is good, in a few words."""
    percent: bool = False


_LOSS = Spec(
    "Loss", {"train/loss": "training", "eval/loss": "held out"},
    "Should fall; a held-out loss that rises while the other falls is overfitting.",
)  # fmt: skip
_GRADIENT = Spec("Gradient norm", {"optimizer/grad_norm": "before clipping"}, "Steady; spikes are single odd batches.")
_ORDERED = Spec(
    "Held-out pairwise accuracy", {"eval/accuracy": "held out"},
    "A coin gets 50%; the annotators' own agreement sets a ceiling.", percent=True,
)  # fmt: skip
_LOG_LOSS = Spec(
    "Log loss and calibration", {"eval/log_loss": "log loss", "eval/calibration_error": "calibration error"},
    "0.693 is guessing; lower is better.",
)  # fmt: skip
CHARTS: dict[str, Sequence[Spec]] = {
    "sft": (
        _LOSS,
        Spec("Token accuracy", {"train/token_accuracy": "training", "eval/token_accuracy": "held out"},
             "Share of tokens that the model ranks first.", percent=True),
        _GRADIENT,
    ),
    "reward": (_LOSS, _ORDERED, _LOG_LOSS, _GRADIENT),
    "dpo": (_LOSS, _ORDERED, _LOG_LOSS, _GRADIENT),
    "specialist": (
        _LOSS,
        Spec("Held-out quality", {"eval/accuracy": "accuracy", "eval/f1": "F1"}, "Higher is better.", percent=True),
        _GRADIENT,
    ),
    "ppo": (
        Spec("Score", {"objective/scores": "training prompts", "eval/scores": "held out"},
             "What PPO maximises; held out should follow training."),
        Spec("KL to the reference", {"objective/kl": "training prompts", "eval/kl": "held out"},
             "Nats per answer: how far the policy has moved. Fast growth is a warning."),
        Spec("Gold reward", {"objective/gold_reward": "training prompts", "eval/gold_reward": "held out"},
             "A reward held out of training: if it falls while the score rises, the policy games its reward."),
        Spec("Answer length", {"rollout/response_length": "training prompts", "eval/response_length": "held out"},
             "Tokens. A score that rises with length alone is a length bias."),
        Spec("Entropy", {"objective/entropy": "nats per token"}, "Falls slowly; near 0 the policy no longer explores."),
        Spec("Answers that end", {"rollout/eos_rate": "training prompts", "eval/eos_rate": "held out"},
             "Share of the answers that end by themselves.", percent=True),
        Spec("Clipped tokens", {"policy/clipfrac": "policy", "val/clipfrac": "critic"},
             "1% to 10% of the policy's tokens is healthy.", percent=True),
        Spec("Critic", {"val/explained_variance": "explained variance"},
             "1 predicts every return; below 0 a constant would do better."),
        Spec("KL coefficient", {"objective/kl_coef": "coefficient"}, "The weight of the KL penalty in the reward."),
        _GRADIENT,
    ),
}  # fmt: skip
"""Stage -> its charts in reading order. One whose metrics were not logged is left out."""


@dataclass(frozen=True)
class ChartLine:
    """One series of a chart."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dots: bool = False
    """Measured at few steps: drawn with markers."""
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """A drawn chart. `points` is what the page's script needs to show values at the pointer."""

    title: str
    about: str
    svg: str
    points: dict[str, Any] = field(default_factory=dict)
    narrow: Chart | None = None
    """The same for a narrow screen, where the letters of a wide chart would be too small."""


def stage_charts(name: str, runs: Sequence[tuple[str, Evidence]], levels: Mapping[str, float]) -> list[Chart]:
    """The charts of runs of one stage.

    Args:
        name: Letters that make the ids of this stage's charts unique on the page.
        runs: Label and evidence of each run; with several the colour says which run it is.
        levels: Title of a chart -> height of a dotted line in it, such as human agreement.
    """
    drawn = []
    for index, spec in enumerate(CHARTS.get(runs[0][1].stage, ())):
        lines = _lines(spec, runs)
        if spec.title == "KL coefficient" and all(len(set(line.ys)) < 2 for line in lines):
            continue  # a fixed coefficient is in the config
        if any(len(line.ys) > 1 for line in lines):
            drawn.append(draw(f"{name}{index}", spec.title, spec.about, lines, "step", spec.percent,
                              levels.get(spec.title)))  # fmt: skip
    return drawn


def _lines(spec: Spec, runs: Sequence[tuple[str, Evidence]]) -> list[ChartLine]:
    lines = []
    for place, (label, run) in enumerate(runs):
        for number, (metric, word) in enumerate(spec.metrics.items()):
            pairs = [(x, y) for x, y in zip(run[metric].steps, run[metric].values) if math.isfinite(y)]
            if not pairs:
                continue
            held_out = metric.startswith("eval/") and len(spec.metrics) > 1 and number > 0
            name = word if len(runs) == 1 else label if len(spec.metrics) == 1 else f"{label}, {word}"
            colour = COLOURS[(number if len(runs) == 1 else place) % len(COLOURS)]
            xs, ys = thinned(pairs)
            lines.append(ChartLine(name, xs, ys, colour, dots=held_out or len(pairs) < 12))
    return lines


def thinned(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most about MOST_POINTS of the points: the lowest and the highest of each stretch, and both ends."""
    if len(pairs) > MOST_POINTS:
        size = math.ceil(2 * len(pairs) / MOST_POINTS)
        kept = {pairs[0], pairs[-1]}
        for start in range(0, len(pairs), size):
            stretch = pairs[start : start + size]
            kept |= {min(stretch, key=lambda pair: pair[1]), max(stretch, key=lambda pair: pair[1])}
        pairs = sorted(kept)
    return [x for x, _ in pairs], [y for _, y in pairs]


def draw(
    name: str, title: str, about: str, lines: Sequence[ChartLine], across: str, percent: bool = False,
    level: float | None = None, upward: str = "", width: float = WIDTH,
) -> Chart:  # fmt: skip
    """Lines in one chart.

    Args:
        name: Letters; unique on the page.
        across: What the horizontal axis shows.
        percent: Values are fractions, shown as percent.
        level: Height of a dotted line.
        upward: What the vertical axis shows, where the title does not say it.
        width: Of the drawing, in hundreds of units; letters keep their size.
    """
    seen: list[Any] = []

    def paint(axes: Any) -> None:
        seen.append(axes)
        for line in lines:
            axes.plot(
                line.xs, line.ys, color=line.colour, linewidth=1.6 if line.joined else 0, label=line.name,
                marker="o" if line.dots else None, markersize=3.5, alpha=1 if line.joined else 0.45,
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color=FAINT, linewidth=1.2, linestyle=":")
        axes.set_xlabel(across, fontsize=9)
        if upward:
            axes.set_ylabel(upward, fontsize=9)
        axes.tick_params(labelsize=9)
        axes.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6, integer=across == "step")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if across == "step" else f"{value:g}")
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if -1e-9 < value < 1 + 1e-9 else "")
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
        if len(lines) > 1:
            axes.legend(fontsize=8.5, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)

    columns = 2 if max((len(line.name) for line in lines), default=0) <= LONG_NAME else 1
    rows = max(0, math.ceil(len(lines) / columns) - 1) if len(lines) > 1 else 0
    height = HEIGHT * (0.6 + 0.4 * width / WIDTH) + 0.2 * rows
    svg = svg_plot(name, f"{title}: {in_words(lines, percent)}", height, paint, width)
    return Chart(title, about, svg, _points(seen[0], lines, across, percent))


def in_words(lines: Sequence[ChartLine], percent: bool) -> str:
    """What the lines show, for people who do not see them."""
    show = _shown(percent)
    return "; ".join(
        f"{line.name} from {show(line.ys[0])} to {show(line.ys[-1])},"
        f" between {show(min(line.ys))} and {show(max(line.ys))}"
        for line in lines
    )


def _shown(percent: bool) -> Callable[[float], str]:
    return (lambda value: f"{value:.1%}") if percent else (lambda value: format_number(value, 3))


def _points(axes: Any, lines: Sequence[ChartLine], across: str, percent: bool) -> dict[str, Any]:
    """Where each point lies in the drawing, as fractions of its width and height, and what it says."""
    box, (left, right), (low, high) = axes.get_position(), axes.get_xlim(), axes.get_ylim()

    def place(x: float, y: float) -> list[float]:
        return [
            round(box.x0 + (x - left) / (right - left) * box.width, 4),
            round(1 - box.y0 - (y - low) / (high - low) * box.height, 4),
        ]

    show = _shown(percent)
    return {
        "across": across,
        "box": [round(value, 4) for value in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)],
        "lines": [
            {
                "name": line.name, "colour": line.colour, "xs": [round(x, 4) for x in line.xs],
                "at": [place(x, y) for x, y in zip(line.xs, line.ys)], "says": [show(y) for y in line.ys],
            }
            for line in lines
        ],
    }  # fmt: skip
