"""The comparison as one self-contained HTML page, with its plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.comparison.show import COLUMNS, LEGEND, TaskResult, WayRow, amount
from rlhf.core.page import drawings, render_page
from rlhf.core.plot import COLOURS, FAINT, INK, page_plot

MARKERS = "osD^vPX*"


def parameters_plot(result: TaskResult) -> str:
    """Quality of each way against its trained parameters."""
    trained = [row.trained_parameters for row in result.rows if row.trained_parameters]
    least = min(trained, default=10)
    left = least / 8

    heights = label_heights(result.rows)

    def draw(axes: Any) -> None:
        for index, row in enumerate(result.rows):
            x = row.trained_parameters or left
            _point(axes, x, row, index)
            axes.annotate(
                row.way, (x, row.value), xytext=(8, heights[row.way]), textcoords=("offset points", "data"),
                fontsize=9, va="center", color=INK,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.axvline(left * 2.8, color=FAINT, linewidth=1, linestyle=":")
        axes.set(xlabel="trained parameters (left of the dotted line: none)", ylabel=result.metric)
        axes.xaxis.set_major_formatter(lambda value, _: amount(value) if value > left * 2.8 else "")
        axes.minorticks_off()
        axes.margins(x=0.18, y=0.15)

    words = ", ".join(f"{row.way} {row.value:.3f} with {row.trained_parameters:,}" for row in result.rows)
    return page_plot(_id("parameters", result), f"Quality against trained parameters: {words}", 3.6, draw)


def examples_plot(result: TaskResult) -> str:
    """Quality of each way against the number of training prompts; empty without curves."""
    curves = {way: points for way, points in result.curves.items() if len(points) > 1}
    if not curves:
        return ""
    flat = [row for row in result.rows if row.way not in curves and not row.trained_parameters]
    order = [row.way for row in result.rows]

    def draw(axes: Any) -> None:
        for way, points in curves.items():
            sizes, values = [point[0] for point in points], [point[1] for point in points]
            reach = [[p[1] - p[2] for p in points], [p[3] - p[1] for p in points]]
            axes.errorbar(sizes, values, yerr=reach, label=way, capsize=3, **_look(order.index(way)))
        for row in flat:
            colour = _look(order.index(row.way))["color"]
            axes.axhline(row.value, color=colour, linestyle=":", label=row.way)
        axes.set_xscale("log")
        sizes = sorted({point[0] for points in curves.values() for point in points})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="training prompts", ylabel=result.metric)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, labelcolor=INK)

    words = "; ".join(f"{way}: " + ", ".join(f"{p[1]:.3f} with {p[0]:,}" for p in ps) for way, ps in curves.items())
    return page_plot(_id("examples", result), f"Quality against the number of training prompts: {words}", 3.6, draw)


def label_heights(rows: Sequence[WayRow]) -> dict[str, float]:
    """Way -> height of its label near its value; labels of ways with about as many parameters do not overlap."""
    line = 0.065 * (max(row.high for row in rows) - min(row.low for row in rows))
    heights: dict[str, float] = {}
    ordered = sorted(rows, key=lambda row: row.trained_parameters)
    while ordered:
        widest = 3 * max(ordered[0].trained_parameters, 1)
        group = sorted((row for row in ordered if row.trained_parameters < widest), key=lambda row: row.value)
        ordered = [row for row in ordered if row not in group]
        places = [group[0].value]
        for row in group[1:]:
            places.append(max(row.value, places[-1] + line))
        lift = sum(place - row.value for place, row in zip(places, group)) / len(group)
        heights |= {row.way: place - lift for row, place in zip(group, places)}
    return heights


def _point(axes: Any, x: float, row: WayRow, index: int) -> None:
    reach = [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]
    axes.errorbar([x], [row.value], yerr=reach, capsize=3, markersize=6, **_look(index))
    if len(row.by_seed) > 1:
        axes.scatter([x] * len(row.by_seed), row.by_seed, s=14, color=INK, alpha=0.45, linewidths=0, zorder=3)


def _look(index: int) -> dict[str, str]:
    """Colour and marker of a way."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _id(name: str, result: TaskResult) -> str:
    """Letters that are unique on the page."""
    return name + "".join(letter if letter.isalnum() else f"-{ord(letter):x}-" for letter in result.name)


def all_plots(results: Sequence[TaskResult]) -> dict[str, str]:
    """`TASK/parameters` and `TASK/examples` -> SVG, for tasks with results."""
    drawn = {}
    for result in results:
        if result.rows:
            drawn[f"{result.name}/parameters"] = parameters_plot(result)
            drawn[f"{result.name}/examples"] = examples_plot(result)
    return drawn


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
