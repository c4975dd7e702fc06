"""The evaluation of policies as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.core.page import drawings, render_page
from rlhf.policy_evaluation import plots, tables
from rlhf.policy_evaluation.examples import Example, chosen
from rlhf.policy_evaluation.measures import Answers

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render(
    result: dict[str, Any], examples: Sequence[Example], mine: Answers | None = None, theirs: Answers | None = None
) -> str:
    """The page's HTML.

    Args:
        result: What `rlhf evaluate` writes as JSON.
        examples: Answers to show.
        mine: The policy's answers, whose scores, KL and lengths are drawn.
        theirs: Its opponent's.
    """
    wins = list(tables.comparisons(result))
    opponents = [result["against"]["model"]] if "against" in result else [one["against"] for one in wins[:1]]
    names = [result["model"], *opponents]
    drawn = {"wins": plots.win_rate_plot("wins", wins)} if wins else {}
    columns = [(name, one) for name, one in zip(names, (mine, theirs)) if one is not None]
    for name, across, values in (
        ("scores", "score", lambda one: _flat(one.scores)),
        ("kls", "KL to the reference of an answer, nats", lambda one: _flat(one.kls)),
        ("lengths", "length of an answer, characters", lambda one: list(map(len, _flat(one.texts)))),
    ):
        drawn[name] = plots.histogram_plot(name, across, [(word, values(one)) for word, one in columns])
    return render_page(
        TEMPLATE, result=result, names=names, wins=wins, tables=tables, metrics=tables.metric_rows(result),
        drawn=drawings(drawn), examples=chosen(examples),
    )  # fmt: skip


def _flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [one for row in rows for one in row]
