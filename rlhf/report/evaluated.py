"""Evaluations of the reward model and of the policy, where `rlhf evaluate --out` has written them into run folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markupsafe

from rlhf.core.limits import read_json_object
from rlhf.evaluation import plots
from rlhf.policy_evaluation import tables as policy_tables
from rlhf.policy_evaluation.plots import win_rate_plot
from rlhf.report.gather import RunRecord

NOT_EVALUATIONS = {"run.json", "reward_metrics.json"}
MOST = 3
"""Evaluations that are drawn of a run; the newest by name."""


@dataclass(frozen=True)
class EvaluatedPlot:
    """A plot of an evaluation."""

    title: str
    svg: markupsafe.Markup
    about: str


@dataclass(frozen=True)
class ShownEvaluation:
    """A dataset of an evaluation."""

    file: str
    dataset: str
    plots: list[EvaluatedPlot]


def evaluations(run: RunRecord, name: str) -> list[ShownEvaluation]:
    """What `rlhf evaluate` measured of a reward run, from the JSON files in its folder; files of others are left out.

    Args:
        name: Letters; unique on the page.
    """
    found = []
    with_cards = [(file, cards) for file in sorted(run.path.glob("*.json")) if (cards := _cards(file))]
    for file, cards in with_cards[-MOST:]:
        for number, card in enumerate(cards):
            drawn = list(_plots(card, f"{name}{file.stem.encode().hex()}x{number}"))
            if drawn:
                found.append(ShownEvaluation(file.name, str(card.get("dataset", "")), drawn))
    return found[-MOST:]


@dataclass(frozen=True)
class ShownPolicyEvaluation:
    """An evaluation of a policy."""

    file: str
    dataset: str
    lines: list[str]
    """The result in a few sentences."""
    plot: markupsafe.Markup | None
    """Win rates."""


def policy_evaluations(run: RunRecord, name: str) -> list[ShownPolicyEvaluation]:
    """What `rlhf evaluate` measured of a policy, from the JSON files in its folder; files of others are left out.

    Args:
        name: Letters; unique on the page.
    """
    found = []
    for number, file in enumerate(sorted(run.path.glob("*.json"))):
        try:
            result = read_json_object(file)
            wins = policy_tables.comparisons(result)
            lines = policy_tables.headlines(result)
            plot = markupsafe.Markup(win_rate_plot(f"{name}x{number}", wins)) if wins else None
        except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue
        if lines:
            found.append(ShownPolicyEvaluation(file.name, str(result.get("dataset", "")), lines, plot))
    return found[-MOST:]


def _cards(file: Path) -> list[Mapping[str, Any]]:
    if file.name in NOT_EVALUATIONS:
        return []
    try:
        cards = read_json_object(file).get("datasets")
    except (OSError, ValueError):
        return []
    return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []


def _plots(card: Mapping[str, Any], prefix: str) -> Iterator[EvaluatedPlot]:
    battery = card.get("perturbations") or {}
    choices: list[tuple[str, Callable[[], str], str]] = [
        ("Accuracy", lambda: plots.accuracy_plot(f"{prefix}a", card),
         "The model, simple rules that it must beat, and the annotators' ceiling."),
        ("Calibration", lambda: plots.reliability_plot(f"{prefix}c", card["pairs"]["calibration"]),
         "How often the model is right when it is this sure; the dotted line is perfect."),
        ("Changes that should not matter", lambda: plots.battery_plot(f"{prefix}b", battery["perturbations"]),
         "Effect of changes to an answer, in standard deviations of the scores."),
    ]  # fmt: skip
    for title, draw, about in choices:
        try:
            yield EvaluatedPlot(title, markupsafe.Markup(draw()), about)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # this evaluation has no such part
