"""Plots as SVG that stands in a page: the page's own colours and font, the same bytes for the same figures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib import figure as mpl

from data_tools.statistics.annotators import Annotator
from data_tools.statistics.biases import Share

INK, FAINT = "#010203", "#010204"
"""Stand-ins for the page's text colour, replaced in the SVG: readable on light and dark."""
BLUE, ORANGE, RED = "#3d85c6", "#d9822b", "#d64545"
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
MOST_PEOPLE = 40


def _svg(name: str, title: str, height: float, draw: Any) -> str:
    """An inline SVG, 640 wide, of what `draw(axes)` draws.

    Args:
        name: Letters; keeps the ids of several plots on one page apart.
        title: What the plot shows, for those who cannot see it.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's font draws the text, not matplotlib's
        figure = mpl.Figure(figsize=(6.4, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"| height="[\d.]+pt"| width="[\d.]+pt"', "", svg, count=2)
    label = escape(title, {'"': "&quot;"})
    return svg.replace("<svg ", f'<svg class="plot" role="img" aria-label="{label}" ', 1)


def answers_plot(k: dict[int, int]) -> str:
    """How many records have K answers."""

    def draw(axes: Any) -> None:
        bars = axes.bar([str(size) for size in k], list(k.values()), color=BLUE, width=0.6)
        axes.bar_label(bars, [f"{times:,}" for times in k.values()], color=INK)
        axes.set(xlabel="answers to rank (K)", ylabel="rankings")
        axes.margins(y=0.15)

    told = ", ".join(f"{times:,} with {size}" for size, times in k.items())
    return _svg("answers", f"Rankings by number of answers: {told}", 2.4, draw)


def lengths_plot(histograms: dict[str, tuple[list[float], list[float]]]) -> str:
    """Characters of the better and of the worse answer of a pair."""

    def draw(axes: Any) -> None:
        for (name, (shares, edges)), colour, line in zip(histograms.items(), (BLUE, ORANGE), ("-", "--")):
            axes.stairs(shares, edges, color=colour, linewidth=2, linestyle=line, label=name)
        axes.set(xscale="log", xlabel="characters of the answer", ylabel="share of pairs")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(loc="upper left")

    return _svg("lengths", "Length of the better and of the worse answer of each pair", 2.6, draw)


def length_bias_plot(shares: Sequence[Share]) -> str:
    """How often the longer answer wins, by how much longer it is."""

    def draw(axes: Any) -> None:
        _dots(axes, [one.share for one in shares], BLUE, range(len(shares)), upright=True)
        axes.set_xticks(range(len(shares)), [f"{one.name} ×\n{one.share.n:,} pairs" for one in shares])
        axes.axhline(0.5, color=FAINT, linewidth=1, linestyle=":")
        axes.set(ylabel="longer answer wins", xlabel="how many times longer it is", ylim=(0, 1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    told = ", ".join(f"{one.name} times: {one.share.value:.0%}" for one in shares)
    return _svg("longer", f"How often the longer answer wins, by how many times longer it is: {told}", 2.8, draw)


def authors_plot(authors: Sequence[Share]) -> str:
    """Win rates of the authors, best on top."""

    def draw(axes: Any) -> None:
        _rows(axes, [one.name for one in authors])
        _dots(axes, [one.share for one in authors], BLUE, range(len(authors)))
        axes.set(xlabel="wins against other authors, ties aside (dotted: half of them)", xlim=(0, 1.02))

    told = ", ".join(f"{one.name} {one.share.value:.0%}" for one in authors[:5])
    return _svg("authors", f"Win rate of each author, best first: {told}", 0.9 + 0.28 * len(authors), draw)


def annotators_plot(people: Sequence[Annotator]) -> str:
    """How far each annotator agrees with the others; those in doubt are drawn as squares."""
    people = [one for one in people if one.agreement is not None][:MOST_PEOPLE]

    def draw(axes: Any) -> None:
        _rows(axes, [one.name for one in people])
        for doubtful, colour, marker in ((False, BLUE, "o"), (True, RED, "s")):
            places = [i for i, one in enumerate(people) if (one.verdict in ("random", "reversed")) == doubtful]
            _dots(axes, [people[i].agreement for i in places], colour, places, marker)
        axes.set(xlabel="agrees with the majority of the others (dotted: chance)", xlim=(0, 1.02))

    told = ", ".join(f"{one.name} {one.agreement.value:.0%}" for one in people[:5] if one.agreement)
    return _svg("people", f"Agreement of each annotator with the others: {told}", 0.9 + 0.28 * len(people), draw)


def _rows(axes: Any, names: Sequence[str]) -> None:
    """One row a name, the first on top, with one half marked."""
    plain = ["".join(letter if letter.isprintable() else "\ufffd" for letter in name) for name in names]
    axes.set_yticks(range(len(names)), [name if len(name) <= 28 else name[:27] + "…" for name in plain])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=":")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _dots(
    axes: Any, shares: Sequence[Any], colour: str, places: Sequence[int], marker: str = "o", upright: bool = False
) -> None:
    """Values with their intervals."""
    values = [one.value for one in shares]
    reach = [[one.value - one.low for one in shares], [one.high - one.value for one in shares]]
    style = {"fmt": marker, "color": colour, "capsize": 3, "markersize": 6}
    if upright:
        axes.errorbar(list(places), values, yerr=reach, **style)
    else:
        axes.errorbar(values, list(places), xerr=reach, **style)
