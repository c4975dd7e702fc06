"""The page of `rlhf evaluate` in a browser: at two widths, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from chromium import Chromium, needs_chromium

from rlhf.data.store import open_dataset
from rlhf.evaluation.battery import battery
from rlhf.evaluation.card import dataset_card
from rlhf.evaluation.scored import FunctionScorer

CONTRAST = """[...document.querySelectorAll("p, td, th, summary, h1, h2, h3")].filter(e => {
  const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => rgb(c).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(document.body).backgroundColor)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
}).length"""
"""How many texts have less contrast with the page than WCAG's AA asks for."""


@pytest.mark.slow
@needs_chromium
def test_the_page_fits_and_is_legible_at_both_widths_light_and_dark(tmp_path: Path) -> None:
    from rlhf.evaluation.page import render

    scorer = FunctionScorer("a/long/path/of/a/run/that/does/not/fit/in/one/line:length", lambda _, text: len(text))
    path = tiny.write_rankings(tmp_path / "rankings", 20, held_out=20, candidates=4)
    data = open_dataset(path)
    records = list(data.records("eval"))
    card: dict[str, Any] = dataset_card(scorer, data, records, None, None, 0)
    card["perturbations"] = battery(scorer, records, 20, 0)
    parts: dict[str, Any] = {
        "chat": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 9, "matrix": [[0.1, 0.2, 0.3]] * 3}
    }
    for name in ("easy", "normal", "hard"):
        parts["chat"][name] = 0.5
    overall = {"score": 0.5, "low": 0.4, "high": 0.6, "easy": 0.5, "normal": 0.5, "hard": 0.5}
    card["benchmarks"] = [{"name": "rm-bench", "parts": parts, "left_out": {}, **overall}]
    page = tmp_path / "page.html"
    page.write_text(render({"model": scorer.name, "split": None, "seed": 0, "datasets": [card]}), "utf-8")
    with Chromium() as browser:
        for width in (390, 1280):
            for dark in (False, True):
                tab = browser.page(page.as_uri(), width=width, dark=dark)
                tab.eval("document.querySelectorAll('details').forEach(one => one.open = true)")
                assert tab.eval("document.documentElement.scrollWidth") <= width
                assert tab.eval(
                    "[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().height > 40)"
                )
                assert tab.eval(CONTRAST) == 0
                assert "exploitable" in tab.text() and "It goes to the" in tab.text("blockquote")
                assert tab.eval(
                    "[...document.querySelectorAll('.matrices > *')].every(e => e.scrollWidth <= e.clientWidth)"
                )
                assert tab.faults() == []
                tab.close()
