"""The evaluation of a reward model as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.core.page import drawings, render_page
from rlhf.evaluation import plots, tables
from rlhf.evaluation.benchmarks import STYLES

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
        found["accuracy"] = plots.accuracy_plot(f"{prefix}accuracy", card)
        found["reliability"] = plots.reliability_plot(f"{prefix}reliability", facts["calibration"])
        for place, name in enumerate(PLOTTED):
            if parts := facts["slices"].get(name):
                overall = facts["accuracy"]["value"]
                found[f"by {name}"] = plots.slice_plot(f"{prefix}slice{place}", name, parts, overall)
    if lists and len(lists["curve"]) > 2:
        found["best of n"] = plots.best_of_plot(f"{prefix}bestof", lists["curve"])
    if battery:
        found["battery"] = plots.battery_plot(f"{prefix}battery", battery["perturbations"])
    return found
