"""The evaluation of a reward model as one self-contained HTML page, with its plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.core.page import drawings, render_page
from rlhf.core.plot import BLUE, FAINT, GREEN, GREY, INK, ORANGE, RED, page_plot
from rlhf.evaluation import tables
from rlhf.evaluation.benchmarks import STYLES

COLOURS = {"robust": GREEN, "sensitive": ORANGE, "exploitable": RED, "unclear": GREY}


def accuracy_plot(name: str, card: Mapping[str, Any]) -> str:
    """Accuracy of the model and the baselines, and the annotators' ceiling."""
    facts, human = card["pairs"], card["agreement"]
    rows = [("the model", facts["accuracy"], BLUE)]
    rows += [(one["name"], one, GREY) for one in facts["baselines"]]

    def draw(axes: Any) -> None:
        _dots(axes, rows)
        axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=":")
        if human:
            low, high = human["ceiling_interval"]
            axes.axvspan(low, high, color=ORANGE, alpha=0.2, linewidth=0)
            axes.axvline(human["ceiling"], color=ORANGE, linewidth=1.5, label="annotators' ceiling")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), labelcolor=INK, borderaxespad=0)
        axes.set(xlabel="accuracy over pairs")
        axes.xaxis.set_major_formatter("{x:.0%}")

    words = ", ".join(f"{label} {one['value']:.1%}" for label, one, _ in rows)
    return page_plot(name, f"Accuracy: {words}", 1.1 + 0.34 * len(rows), draw)


def reliability_plot(name: str, facts: Mapping[str, Any]) -> str:
    """Accuracy against confidence, with the diagonal of perfect calibration."""
    bins = facts["reliability"]

    def draw(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle=":")
        for one in bins:
            if one["low"] is not None:
                axes.plot([one["confidence"]] * 2, [one["low"], one["high"]], color=BLUE, linewidth=2, alpha=0.5)
            axes.plot([one["confidence"]], [one["value"]], "o", color=BLUE)
            axes.text(
                one["confidence"], 0.02, f"{one['count']:,}", transform=axes.get_xaxis_transform(), ha="center",
                fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.set(xlabel="confidence: sigmoid of the score difference (pairs at the bottom)", ylabel="accuracy")
        axes.set(xlim=(0.49, 1.01))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.08 * (high - low), high)

    words = ", ".join(f"{one['confidence']:.0%}: {one['value']:.0%}" for one in bins)
    return page_plot(name, f"Accuracy by confidence: {words}", 3.2, draw)


def slice_plot(name: str, title: str, parts: Sequence[Mapping[str, Any]], overall: float) -> str:
    """Accuracy by part, with a line at the accuracy over all pairs."""

    def draw(axes: Any) -> None:
        _dots(axes, [(one["label"], one, BLUE) for one in parts])
        axes.axvline(overall, color=FAINT, linewidth=1, linestyle="--")
        axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=":")
        axes.xaxis.set_major_formatter("{x:.0%}")

    words = ", ".join(f"{one['label']} {one['value']:.1%}" for one in parts)
    return page_plot(name, f"Accuracy by {title}: {words}", 0.7 + 0.3 * len(parts), draw)


def best_of_plot(name: str, curve: Sequence[Mapping[str, float]]) -> str:
    """Utility of the best of n by the model, by the annotator, and of a random choice."""

    def draw(axes: Any) -> None:
        sizes = [one["n"] for one in curve]
        lines = (("best", "the annotator's choice", ORANGE, "--"), ("chosen", "the model's choice", BLUE, "-"))
        for key, label, colour, style in lines:
            axes.plot(sizes, [one[key] for one in curve], style, marker="o", color=colour, label=label)
        axes.axhline(curve[0]["random"], color=FAINT, linestyle=":", label="a random choice")
        axes.set(xlabel="answers to choose from", ylabel="utility (1 best, 0 worst)", xticks=sizes)
        axes.legend(loc="upper left", labelcolor=INK)

    words = ", ".join(f"{one['n']}: {one['chosen']:.2f}" for one in curve)
    return page_plot(name, f"Utility of the model's choice by the number of answers: {words}", 2.8, draw)


def battery_plot(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Effects of the perturbations in standard deviations of the scores."""
    shown = [one for one in rows if one["answers"]]

    def draw(axes: Any) -> None:
        _dots(axes, [(one["name"], one["effect"], COLOURS[one["verdict"]]) for one in shown])
        axes.axvspan(-0.2, 0.2, color=FAINT, alpha=0.15, linewidth=0)
        axes.axvline(0, color=FAINT, linewidth=1)
        boundary = sum(one["expected"] == "same" for one in shown) - 0.5
        axes.axhline(boundary, color=FAINT, linewidth=1, linestyle=":")
        for word, colour in COLOURS.items():
            if any(one["verdict"] == word for one in shown):
                axes.plot([], [], "o", color=colour, label=word)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, labelcolor=INK, borderaxespad=0)
        axes.set(xlabel="change of the score, standard deviations")

    words = ", ".join(f"{one['name']} {one['effect']['value']:+.2f} ({one['verdict']})" for one in shown)
    return page_plot(name, f"Effects of the perturbations: {words}", 1.2 + 0.3 * len(shown), draw)


def _dots(axes: Any, rows: Sequence[tuple[str, Mapping[str, Any], str]]) -> None:
    """A labelled row for each value with its interval, the first at the top."""
    for place, (_, facts, colour) in enumerate(rows):
        if facts["low"] is not None:
            axes.plot([facts["low"], facts["high"]], [place] * 2, color=colour, linewidth=2.5, alpha=0.5)
        axes.plot([facts["value"]], [place], "o", color=colour)
    axes.set_yticks(range(len(rows)), [_short(row[0]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _short(label: str) -> str:
    return label if len(label) <= 28 else label[:27] + "\N{HORIZONTAL ELLIPSIS}"


TEMPLATE = Path(__file__).with_name("page.html.jinja")
PLOTTED = ("length of the better answer", "rank distance", "rating margin", "turns")
"""Properties whose parts are drawn; those of the others are tables only."""


def render(result: Mapping[str, Any]) -> str:
    """The page's HTML, from what `rlhf evaluate` writes as JSON."""
    drawn: dict[str, str] = {}
    for index, card in enumerate(result["datasets"]):
        drawn |= {f"{index}/{name}": svg for name, svg in _plots(card, f"d{index}").items()}
    return render_page(TEMPLATE, result=result, tables=tables, drawn=drawings(drawn), styles=STYLES)


def _plots(card: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Name of a plot -> SVG."""
    facts, lists, battery = card["pairs"], card["listwise"], card["perturbations"]
    found: dict[str, str] = {}
    if facts:
        found["accuracy"] = accuracy_plot(f"{prefix}accuracy", card)
        found["reliability"] = reliability_plot(f"{prefix}reliability", facts["calibration"])
        for place, name in enumerate(PLOTTED):
            if parts := facts["slices"].get(name):
                overall = facts["accuracy"]["value"]
                found[f"by {name}"] = slice_plot(f"{prefix}slice{place}", name, parts, overall)
    if lists and len(lists["curve"]) > 2:
        found["best of n"] = best_of_plot(f"{prefix}bestof", lists["curve"])
    if battery:
        found["battery"] = battery_plot(f"{prefix}battery", battery["perturbations"])
    return found
