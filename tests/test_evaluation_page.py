"""The page of `rlhf evaluate` in a browser: at two widths, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from chromium import CONTRAST, UNREADABLE, Chromium, needs_chromium
from report_runs import HOSTILE

from rlhf.data.schema import Message, Prompt
from rlhf.data.store import open_dataset
from rlhf.evaluation.battery import battery
from rlhf.evaluation.card import dataset_card
from rlhf.evaluation.scored import function_scorer
from rlhf.judging.texts import text_metrics
from rlhf.policy_evaluation.examples import of_answers
from rlhf.policy_evaluation.measures import PolicyAnswers, compare_answers

SEEN = "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height).filter(height => height)"
"""Heights of the plots that are shown: each has a drawing for phones, too."""


@pytest.mark.slow
@needs_chromium
def test_the_page_fits_and_is_legible_at_both_widths_light_and_dark(tmp_path: Path) -> None:
    from rlhf.evaluation.page import render

    scorer = function_scorer("a/long/path/of/a/run/that/does/not/fit/in/one/line:length", lambda _, text: len(text))
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
                assert tab.eval(f"[{SEEN}.every(height => height > 40), {SEEN}.length]") == [True, 6]
                assert tab.eval(UNREADABLE) == []
                assert tab.eval(CONTRAST) == 0
                assert "exploitable" in tab.text() and "It goes to the" in tab.text("blockquote")
                assert tab.eval(
                    "[...document.querySelectorAll('.matrices > *')].every(e => e.scrollWidth <= e.clientWidth)"
                )
                assert tab.faults() == []
                tab.close()


@pytest.mark.slow
@needs_chromium
def test_the_page_of_policies_fits_and_is_legible_at_both_widths_light_and_dark(tmp_path: Path) -> None:
    from rlhf.policy_evaluation.page import render

    result, mine, theirs = policies("a/long/path/of/a/policy/that/does/not/fit/in/one/line/ppo", HOSTILE)
    page = tmp_path / "page.html"
    page.write_text(render(result, of_answers(mine, theirs), mine, theirs), "utf-8")
    with Chromium() as browser:
        for width in (390, 1280):
            for dark in (False, True):
                tab = browser.page(page.as_uri(), width=width, dark=dark)
                assert tab.eval("document.documentElement.scrollWidth") <= width
                assert tab.eval(f"[{SEEN}.every(height => height > 40), {SEEN}.length]") == [True, 4]
                assert tab.eval(UNREADABLE) == []
                assert tab.eval(CONTRAST) == 0
                assert "score 2.00, KL 3" in tab.text() and HOSTILE[:20] in tab.text("blockquote")
                assert tab.faults() == []
                tab.close()


def policies(name: str, text: str) -> tuple[dict[str, Any], PolicyAnswers, PolicyAnswers]:
    """What `rlhf evaluate` writes of two policies, without models; every text of theirs contains `text`."""
    prompts = [Prompt((Message("user", f"{text} {n}"),)) for n in range(12)]
    words = [[f"{text} {'word ' * n}"] for n in range(12)]
    mine = PolicyAnswers(prompts, words, [[2.0 - n % 3] for n in range(12)], [[3.0 + n] for n in range(12)])
    theirs = PolicyAnswers(prompts, words[::-1], [[0.5] for _ in range(12)], [[] for _ in range(12)])
    metrics = {"records": 9, "loss": 1.5, "loss_low": 1.4, "loss_high": 1.6, "perplexity": 4.5, "kl": 3.0,
               "kl_low": 2.0, "kl_high": 4.0, "eos_rate": 1.0, **text_metrics(words)}  # fmt: skip
    result = {
        "model": name, "dataset": "data", "fingerprint": "f" * 64, "split": None, "policy": metrics, "reward": text,
        "reference": "runs/sft", "seed": 0, "sampling": {"temperature": 1.0, "max_new_tokens": 9},
        "against": {"model": "runs/sft", **metrics}, "comparison": compare_answers(mine, theirs),
        "loss_difference": {"value": 0.1, "low": 0.05, "high": 0.15},
    }  # fmt: skip
    return result, mine, theirs
