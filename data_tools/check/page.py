"""The report as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.check import plots, show
from data_tools.check.report import Report
from data_tools.statistics.annotators import VERDICTS
from rlhf.core import page

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SYMBOLS = {"bad": "✗", "look": "!", "good": "✓", "info": "", "none": ""}


def render(report: Report) -> str:
    """The page's HTML."""
    examples: dict[str, list[Any]] = {}
    for one in report.examples:
        examples.setdefault(one.metric, []).append(one)
    return page.render_page(
        TEMPLATE, report=report, examples=examples, drawn=page.drawings(_plots(report)),
        show=show, symbols=SYMBOLS, verdicts=VERDICTS,
    )  # fmt: skip


def write_page(report: Report, path: Path) -> None:
    """Write the page.

    Raises:
        UserError: The file cannot be written.
    """
    page.write_page(render(report), path, "--html")


def _plots(report: Report) -> dict[str, str]:
    """Name -> SVG, empty where there is nothing to show."""
    return {
        "answers": plots.answers_plot(report.k) if len(report.k) > 1 else "",
        "lengths": plots.lengths_plot(report.length_histograms) if report.length_histograms else "",
        "longer": plots.length_bias_plot(report.wins_by_length) if report.wins_by_length else "",
        "authors": plots.authors_plot(report.authors) if report.authors else "",
        "annotators": plots.annotators_plot(report.annotators) if any(a.agreement for a in report.annotators) else "",
    }
