"""The comparison as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.comparison.plots import all_plots
from rlhf.comparison.show import COLUMNS, LEGEND, TaskResult
from rlhf.core.page import drawings, render_page

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render(title: str, facts: str, results: Sequence[TaskResult]) -> str:
    """The page's HTML.

    Args:
        title: Its heading.
        facts: What the ways share: base, budget, seeds.
        results: The tasks.
    """
    return render_page(
        TEMPLATE,
        title=title,
        facts=facts,
        results=results,
        columns=COLUMNS,
        legend=LEGEND,
        drawn=drawings(all_plots(results)),
    )
