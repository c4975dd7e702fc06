"""Plots as inline SVG in a page's colours and font; equal values give equal bytes."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib import figure as mpl

INK, FAINT = "#010203", "#010204"
"""Placeholders that are replaced in the SVG by the page's colours, which depend on its light or dark mode."""
BLUE, ORANGE, GREEN, RED, GREY = "#3d85c6", "#d9822b", "#3a9d5d", "#d64545", "#8a93a0"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#8e63ce", "#8a6d3b", "#d16ba5", "#6b7a8f")
"""Of the lines or points of one drawing, in order."""
STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.handlelength": 1.4, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2,
}  # fmt: skip


NARROW, LINE = 3.7, 0.17
"""Width of a drawing for little room, and height of a line of text, in hundreds of units."""


def page_plot(name: str, title: str, height: float, draw: Callable[[Any], None], width: float = 6.4) -> str:
    """Two drawings of the same in a figure, of which `page.css` shows one: where there is as little room as on a phone,
    the wide one's letters would be too small to read. See `svg_plot`, which makes one."""

    def draw_narrow(axes: Any) -> None:
        draw(axes)
        axes.figure.set_figheight(height + LINE * _fit(axes))

    wide = svg_plot(name, title, height, draw, width, kind="wide")
    return wide + svg_plot(f"{name}-narrow", title, height, draw_narrow, NARROW, kind="narrow")


def _fit(axes: Any) -> int:
    """Break labels and put the legend above, so that a plot is narrow; gives how many lines that adds."""
    across = textwrap.wrap(axes.get_xlabel(), 36)
    axes.set(xlabel="\n".join(across), ylabel=textwrap.fill(axes.get_ylabel(), 22))
    if any(len(label.get_text()) > 16 for label in axes.get_yticklabels()):
        names = ["\n".join(textwrap.wrap(label.get_text(), 16)[:2]) for label in axes.get_yticklabels()]
        axes.set_yticks(axes.get_yticks(), names, fontsize=9)
    rows = 0
    if axes.get_legend() is not None:
        handles, names = axes.get_legend_handles_labels()
        for columns in (2, 1):
            legend = axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, labelcolor=INK)
            axes.figure.draw_without_rendering()
            if legend.get_window_extent().x1 < axes.figure.bbox.x1:
                break
        rows = -(-len(names) // columns)
    axes.figure.draw_without_rendering()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    if any(right.x0 < left.x1 + 4 for left, right in zip(boxes, boxes[1:])):
        axes.tick_params(axis="x", rotation=90)
        rows += max(len(line) for label in labels for line in label.get_text().split("\n")) // 2
    return rows + max(0, len(across) - 1)


def svg_plot(
    name: str, title: str, height: float, draw: Callable[[Any], None], width: float = 6.4, kind: str = ""
) -> str:
    """An inline SVG, 100 x `width` wide and 100 x `height` high, of what `draw(axes)` draws.

    Args:
        name: Letters; a prefix that makes the ids of several plots on one page unique.
        title: What the plot shows, for screen readers.
        kind: Another class of the SVG, besides `plot`.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's font draws the text, not matplotlib's
        figure = mpl.Figure(figsize=(width, height), layout="constrained")
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
    return svg.replace("<svg ", f'<svg class="{f"plot {kind}".strip()}" role="img" aria-label="{label}" ', 1)
