"""The report as one self-contained HTML page, with plots in its colours and font; equal values give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.check import show
from data_tools.check.report import Report
from data_tools.statistics.annotators import VERDICTS, AnnotatorReport
from data_tools.statistics.biases import WinRate
from rlhf.core import page
from rlhf.core.plot import BLUE, FAINT, INK, ORANGE, RED, page_plot

TEMPLATE = Path(__file__).with_name("page.html.jinja")
MOST_ANNOTATORS = 40
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
        "answers": answers_plot(report.k) if len(report.k) > 1 else "",
        "lengths": lengths_plot(report.length_histograms) if report.length_histograms else "",
        "longer": length_bias_plot(report.wins_by_length) if report.wins_by_length else "",
        "authors": authors_plot(report.authors) if report.authors else "",
        "annotators": annotators_plot(report.annotators) if any(a.agreement for a in report.annotators) else "",
    }


# ---- plots ----------------------------------------------------------------------------------------------------------


def answers_plot(k: dict[int, int]) -> str:
    """Number of rankings with K answers."""

    def draw(axes: Any) -> None:
        bars = axes.bar([str(size) for size in k], list(k.values()), color=BLUE, width=0.6)
        axes.bar_label(bars, [f"{times:,}" for times in k.values()], color=INK)
        axes.set(xlabel="answers to rank (K)", ylabel="rankings")
        axes.margins(y=0.15)

    words = ", ".join(f"{times:,} with {size}" for size, times in k.items())
    return page_plot("answers", f"Rankings by number of answers: {words}", 2.4, draw)


def lengths_plot(histograms: dict[str, tuple[list[float], list[float]]]) -> str:
    """Characters of the better and of the worse answer of a pair."""

    def draw(axes: Any) -> None:
        for (name, (fractions, edges)), colour, line in zip(histograms.items(), (BLUE, ORANGE), ("-", "--")):
            axes.stairs(fractions, edges, color=colour, linewidth=2, linestyle=line, label=name)
        axes.set(xscale="log", xlabel="characters of the answer", ylabel="fraction of pairs")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(loc="upper left")

    return page_plot("lengths", "Length of the better and of the worse answer of each pair", 2.6, draw)


def length_bias_plot(rates: Sequence[WinRate]) -> str:
    """Win rate of the longer answer by the ratio of the lengths."""

    def draw(axes: Any) -> None:
        _dots(axes, [one.rate for one in rates], BLUE, range(len(rates)), upright=True)
        axes.set_xticks(range(len(rates)), [f"{one.name} ×\n{one.rate.n:,} pairs" for one in rates])
        axes.axhline(0.5, color=FAINT, linewidth=1, linestyle=":")
        axes.set(ylabel="win rate of the longer answer", xlabel="ratio of the lengths", ylim=(0, 1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    words = ", ".join(f"{one.name} times: {one.rate.value:.0%}" for one in rates)
    return page_plot("longer", f"Win rate of the longer answer by the ratio of the lengths: {words}", 2.8, draw)


def authors_plot(authors: Sequence[WinRate]) -> str:
    """Win rates of the authors, the best at the top."""

    def draw(axes: Any) -> None:
        _rows(axes, [one.name for one in authors])
        _dots(axes, [one.rate for one in authors], BLUE, range(len(authors)))
        axes.set(xlabel="win rate against other authors, without ties (dotted: one half)", xlim=(0, 1.02))

    words = ", ".join(f"{one.name} {one.rate.value:.0%}" for one in authors[:5])
    return page_plot("authors", f"Win rate of each author, the best first: {words}", 0.9 + 0.28 * len(authors), draw)


def annotators_plot(annotators: Sequence[AnnotatorReport]) -> str:
    """Agreement of each annotator with the others; doubtful ones are drawn as squares."""
    annotators = [one for one in annotators if one.agreement is not None][:MOST_ANNOTATORS]

    def draw(axes: Any) -> None:
        _rows(axes, [one.name for one in annotators])
        for doubtful, colour, marker in ((False, BLUE, "o"), (True, RED, "s")):
            places = [i for i, one in enumerate(annotators) if (one.verdict in ("random", "reversed")) == doubtful]
            _dots(axes, [annotators[i].agreement for i in places], colour, places, marker)
        axes.set(xlabel="agrees with the majority of the others (dotted: chance)", xlim=(0, 1.02))

    words = ", ".join(f"{one.name} {one.agreement.value:.0%}" for one in annotators[:5] if one.agreement)
    return page_plot(
        "annotators", f"Agreement of each annotator with the others: {words}", 0.9 + 0.28 * len(annotators), draw
    )


def _rows(axes: Any, names: Sequence[str]) -> None:
    """One row per name, the first at the top, and a line at one half."""
    plain = ["".join(letter if letter.isprintable() else "\ufffd" for letter in name) for name in names]
    axes.set_yticks(range(len(names)), [name if len(name) <= 28 else name[:27] + "…" for name in plain])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=":")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _dots(
    axes: Any, estimates: Sequence[Any], colour: str, places: Sequence[int], marker: str = "o", upright: bool = False
) -> None:
    """Estimates with their intervals."""
    values = [one.value for one in estimates]
    reach = [[one.value - one.low for one in estimates], [one.high - one.value for one in estimates]]
    at, error = ((places, values), "yerr") if upright else ((values, places), "xerr")
    axes.errorbar(*map(list, at), fmt=marker, color=colour, capsize=3, markersize=6, **{error: reach})
