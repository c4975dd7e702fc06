"""Evaluations of the reward model and of the policy, where `rlhf evaluate --out` has written them into run folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import markupsafe

from rlhf.evaluation import page
from rlhf.policy_evaluation import tables as policy_tables
from rlhf.policy_evaluation.page import win_rate_plot
from rlhf.report.gather import RunRecord

MOST = 3
"""Evaluations that are drawn of a run; the newest by name."""
OTHER = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""Errors of reading a file that is not an evaluation, or lacks the part."""


def evaluations(run: RunRecord, name: str) -> list[dict[str, Any]]:
    """What `rlhf evaluate` measured of a reward run, from the JSON files in its folder; files of others are left out.

    Args:
        name: Letters; unique on the page.

    Returns:
        For each dataset of an evaluation `file`, `dataset`, and `plots`: title, SVG, and what it shows.
    """
    found = []
    with_cards = [(file, cards) for file, one in run.results.items() if isinstance(cards := one.get("datasets"), list)]
    for file, cards in with_cards[-MOST:]:
        for number, card in enumerate(cards):
            drawn = list(_plots(card, f"{name}{file.encode().hex()}x{number}")) if isinstance(card, dict) else []
            if drawn:
                found.append({"file": file, "dataset": str(card.get("dataset", "")), "plots": drawn})
    return found[-MOST:]


def policy_evaluations(run: RunRecord, name: str) -> list[dict[str, Any]]:
    """What `rlhf evaluate` measured of a policy, from the JSON files in its folder; files of others are left out.

    Args:
        name: Letters; unique on the page.

    Returns:
        For each evaluation `file`, `dataset`, `lines` (the result in a few sentences), and `plot` (win rates or None).
    """
    found = []
    for number, (file, result) in enumerate(run.results.items()):
        try:
            wins, lines = policy_tables.comparisons(result), policy_tables.headlines(result)
            plot = markupsafe.Markup(win_rate_plot(f"{name}x{number}", wins)) if wins else None
        except OTHER:
            continue
        if lines:
            found.append({"file": file, "dataset": str(result.get("dataset", "")), "lines": lines, "plot": plot})
    return found[-MOST:]


def _plots(card: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, markupsafe.Markup, str]]:
    choices: list[tuple[str, Callable[[], str], str]] = [
        ("Accuracy", lambda: page.accuracy_plot(f"{prefix}a", card),
         "The model, simple rules that it must beat, and the annotators' ceiling."),
        ("Calibration", lambda: page.reliability_plot(f"{prefix}c", card["pairs"]["calibration"]),
         "How often the model is right when it is this sure; the dotted line is perfect."),
        ("Changes that should not matter",
         lambda: page.battery_plot(f"{prefix}b", card["perturbations"]["perturbations"]),
         "Effect of changes to an answer, in standard deviations of the scores."),
    ]  # fmt: skip
    for title, draw, about in choices:
        try:
            yield title, markupsafe.Markup(draw()), about
        except OTHER:
            continue
