"""Plots as inline SVG in a page's colours and font; equal values give equal bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib import figure as mpl

INK, FAINT = "#010203", "#010204"
"""Placeholders that are replaced in the SVG by the page's colours, which depend on its light or dark mode."""
BLUE, ORANGE, RED = "#3d85c6", "#d9822b", "#d64545"
STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


def svg_plot(name: str, title: str, height: float, draw: Callable[[Any], None], width: float = 6.4) -> str:
    """An inline SVG, 100 x `width` wide and 100 x `height` high, of what `draw(axes)` draws.

    Args:
        name: Letters; a prefix that makes the ids of several plots on one page unique.
        title: What the plot shows, for screen readers.
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
    return svg.replace("<svg ", f'<svg class="plot" role="img" aria-label="{label}" ', 1)
