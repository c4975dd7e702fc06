"""The report as one self-contained HTML page: no script, font or image from another place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from data_tools.check import plots, show
from data_tools.check.report import Report
from data_tools.statistics.annotators import VERDICTS
from rlhf.core.console import printable
from rlhf.core.errors import UserError

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SYMBOLS = {"bad": "✗", "look": "!", "good": "✓", "info": "", "none": ""}


def render(report: Report) -> str:
    """The page's HTML. All texts of the dataset are escaped, and control characters replaced."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {"show": show, "symbols": SYMBOLS, "verdicts": VERDICTS}
    environment.filters["code"] = _code
    examples: dict[str, list[Any]] = {}
    for one in report.examples:
        examples.setdefault(one.metric, []).append(one)
    drawn = {name: markupsafe.Markup(svg) for name, svg in _plots(report).items()}
    page = environment.from_string(TEMPLATE.read_text("utf-8"))
    return printable(page.render(report=report, examples=examples, drawn=drawn))


def _code(text: str) -> str:
    """The text escaped, with words in backticks as code."""
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


def _plots(report: Report) -> dict[str, str]:
    """Name -> SVG of the plots that have something to show."""
    drawn = {
        "answers": plots.answers_plot(report.k) if len(report.k) > 1 else "",
        "lengths": plots.lengths_plot(report.length_histograms) if report.length_histograms else "",
        "longer": plots.length_bias_plot(report.wins_by_length) if report.wins_by_length else "",
        "authors": plots.authors_plot(report.authors) if report.authors else "",
        "annotators": plots.annotators_plot(report.annotators) if any(a.agreement for a in report.annotators) else "",
    }
    return {name: svg for name, svg in drawn.items() if svg}
