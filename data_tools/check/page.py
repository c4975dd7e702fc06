"""The report as one self-contained HTML page: no script, no font and no image from anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from data_tools.check import plots, show
from data_tools.check.report import Measured, Report
from data_tools.statistics.annotators import VERDICTS
from rlhf.core.errors import UserError

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SYMBOLS = {"bad": "✗", "look": "!", "good": "✓", "info": "", "none": ""}


def render(report: Report) -> str:
    """The page's HTML. All texts of the dataset are escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {
        "figure": show.figure, "interval": show.interval, "value_of": show.value_of, "basis": show.basis,
        "conditions": show.conditions, "symbols": SYMBOLS, "words": show.GRADE_WORDS, "verdicts": VERDICTS,
    }  # fmt: skip
    environment.filters["marked"] = _marked
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(
        report=report, headline=show.headline(report), ceiling=show.ceiling_line(report), parts=_parts(report),
        missing=_missing(report), examples=_examples(report),
        drawn={name: markupsafe.Markup(svg) for name, svg in _plots(report).items()},
    )  # fmt: skip


def _marked(text: str) -> str:
    """The text escaped, with what stands in backticks as code."""
    parts = [str(markupsafe.escape(part)) for part in text.split("`")]
    return markupsafe.Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def write_page(report: Report, path: Path) -> None:
    """Write the page.

    Raises:
        UserError: The file cannot be written.
    """
    text = render(report)
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error}") from None


def _parts(report: Report) -> list[tuple[str, str, list[Measured]]]:
    found = [
        (part, title, [one for one in report.measured if one.row.traits["part"] == part and one.found is not None])
        for part, title in show.PARTS.items()
    ]
    return [one for one in found if one[2]]


def _missing(report: Report) -> dict[str, list[Measured]]:
    """Metrics without a figure, by why."""
    found: dict[str, list[Measured]] = {}
    for one in report.of_grade("none"):
        found.setdefault(one.why, []).append(one)
    return found


def _plots(report: Report) -> dict[str, str]:
    """Name -> SVG of those that have something to show."""
    found = {}
    if len(report.k) > 1:
        found["answers"] = plots.answers_plot(report.k)
    if report.length_histograms:
        found["lengths"] = plots.lengths_plot(report.length_histograms)
    if report.wins_by_length:
        found["longer"] = plots.length_bias_plot(report.wins_by_length)
    if report.authors:
        found["authors"] = plots.authors_plot(report.authors)
    if any(one.agreement for one in report.annotators):
        found["people"] = plots.annotators_plot(report.annotators)
    return found


def _examples(report: Report) -> dict[str, list[Any]]:
    """Metric -> its examples."""
    found: dict[str, list[Any]] = {}
    for one in report.examples:
        found.setdefault(one.metric, []).append(one)
    return found
