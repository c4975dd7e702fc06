"""The evaluation of policies as one self-contained HTML page, with its plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.core.page import drawings, render_page
from rlhf.core.plot import BLUE, FAINT, INK, ORANGE, page_plot
from rlhf.policy_evaluation import tables
from rlhf.policy_evaluation.examples import AnswerExample, chosen
from rlhf.policy_evaluation.measures import PolicyAnswers

COLOURS = (BLUE, ORANGE)
BINS = 24


def win_rate_plot(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Raw and length-controlled win rate against each opponent, with their intervals.

    Args:
        name: Letters; unique on the page.
        rows: See `rlhf.policy_evaluation.tables.comparisons`.
    """
    kinds = (("raw", "win_rate", "interval", BLUE, -0.14),
             ("length-controlled", "length_controlled", "length_controlled_interval", ORANGE, 0.14))  # fmt: skip

    def draw(axes: Any) -> None:
        for word, key, bounds, colour, shift in kinds:
            for place, one in enumerate(rows):
                axes.plot(one[bounds], [place + shift] * 2, color=colour, linewidth=2.5, alpha=0.5)
                axes.text(one[bounds][1] + 0.02, place + shift, f"{one[key]:.1%}", va="center", fontsize=9, color=INK)
            axes.plot(
                [one[key] for one in rows], [at + shift for at in range(len(rows))], "o", color=colour, label=word
            )
        axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(rows)), [f"against {short(one['against'])}" for one in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel="win rate")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, labelcolor=INK)

    words = "; ".join(
        f"against {one['against']} {one['win_rate']:.1%}, length-controlled {one['length_controlled']:.1%}"
        for one in rows
    )
    return page_plot(name, f"Win rates: {words}", 1.3 + 0.6 * len(rows), draw, width=5)


def histogram_plot(name: str, across: str, columns: Sequence[tuple[str, Sequence[float]]]) -> str:
    """How the values of each policy's answers are distributed; empty without values.

    Args:
        name: Letters; unique on the page.
        across: What the values are.
        columns: Policy -> its values, in order.
    """
    shown = [(word, np.array(values, dtype=float)) for word, values in columns if len(values)]
    if not shown:
        return ""
    everything = np.concatenate([values for _, values in shown])
    edges = np.linspace(everything.min(), everything.max() or 1.0, BINS + 1)
    if edges[0] == edges[-1]:
        edges = np.array([edges[0] - 0.5, edges[0] + 0.5])

    def draw(axes: Any) -> None:
        for (word, values), colour in zip(shown, COLOURS):
            share = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=share, color=colour, alpha=0.45, label=short(word))
            axes.axvline(values.mean(), color=colour, linewidth=1.8)
        axes.set(xlabel=across)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        if len(shown) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, labelcolor=INK, fontsize=9)

    words = "; ".join(
        f"{word}: mean {values.mean():.3g}, {values.min():.3g} to {values.max():.3g}" for word, values in shown
    )
    return page_plot(name, f"{across}. {words}", 2.6, draw, width=4.4)


def short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 24 else "…" + name[-23:]


TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render(
    result: dict[str, Any],
    examples: Sequence[AnswerExample],
    mine: PolicyAnswers | None = None,
    theirs: PolicyAnswers | None = None,
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
    drawn = {"wins": win_rate_plot("wins", wins)} if wins else {}
    columns = [(name, one) for name, one in zip(names, (mine, theirs)) if one is not None]
    for name, across, values in (
        ("scores", "score", lambda one: _flat(one.scores)),
        ("kls", "KL to the reference of an answer, nats", lambda one: _flat(one.kls)),
        ("lengths", "length of an answer, characters", lambda one: list(map(len, _flat(one.texts)))),
    ):
        drawn[name] = histogram_plot(name, across, [(word, values(one)) for word, one in columns])
    return render_page(
        TEMPLATE, result=result, names=names, wins=wins, tables=tables, metrics=tables.metric_rows(result),
        drawn=drawings(drawn), examples=chosen(examples),
    )  # fmt: skip


def _flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [one for row in rows for one in row]
