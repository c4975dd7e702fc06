"""The answers that the page shows: before and after training, the best and the worst."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.console import format_number
from rlhf.core.page import cut
from rlhf.report.gather import Answer, RunRecord, pairs_of

MEASURES = {
    "kl": "KL to the reference, nats",
    "advantage": "advantage",
    "reward": "reward",
    "value": "critic's value",
    "logprob": "log-prob",
    "ref_logprob": "reference's log-prob",
}
"""Numbers of a token -> what the page calls them."""
COLOURED = ("kl", "advantage", "reward", "value")
"""Measures that tokens can be coloured by."""
PAIRS, MORE_PAIRS, EXTREMES = 3, 12, 5
"""Pairs shown of the largest rises and falls each; further pairs; best and worst answers."""


@dataclass(frozen=True)
class Token:
    """A token as the page shows it."""

    text: str
    says: str
    """JSON of measure -> text, for the script that shows them."""
    heat: str
    """JSON of measure -> colour strength from -1 to 1."""


@dataclass(frozen=True)
class ShownAnswer:
    """An answer as the page shows it."""

    text: str
    score: str
    ended: bool
    tokens: list[Token]
    """Empty where per-token numbers were not recorded."""
    measures: dict[str, str]
    """Those of `COLOURED` that are there -> their names."""


@dataclass(frozen=True)
class ShownPair:
    """A prompt with its answers before and after."""

    prompt: str
    before_prompt: str
    """Earlier messages."""
    before: ShownAnswer
    after: ShownAnswer
    change: str
    rose: bool


def shown(answer: Answer) -> ShownAnswer:
    """An answer with its tokens coloured, as far as numbers were recorded."""
    tokens, measures = _tokens(answer)
    score = "" if answer.score is None else f"{answer.score:.2f}"
    return ShownAnswer(cut(answer.text), score, answer.ended, tokens, measures)


def before_and_after(run: RunRecord) -> tuple[list[ShownPair], list[ShownPair]]:
    """Pairs of the first and the last evaluation: the largest rises and falls, and further ones in their order."""
    steps = sorted(run.evaluations)
    if len(steps) < 2:
        return [], []
    pairs = list(pairs_of(run.evaluations[steps[0]], run.evaluations[steps[-1]]))
    scored = [(a, b) for a, b in pairs if a.score is not None and b.score is not None]
    if not scored:
        return [], [_pair(*pair) for pair in pairs[:MORE_PAIRS]]
    ordered = sorted(range(len(scored)), key=lambda i: _change(*scored[i]))
    recorded = [i for i in ordered if scored[i][1].tokens]
    pool = recorded if len(recorded) > 2 * PAIRS else ordered  # those with numbers for each token say more
    chosen = list(dict.fromkeys([*reversed(pool[-PAIRS:]), *pool[:PAIRS]]))
    rest = [i for i in range(len(scored)) if i not in chosen][:MORE_PAIRS]
    return [_pair(*scored[i]) for i in chosen], [_pair(*scored[i]) for i in rest]


def best_and_worst(run: RunRecord) -> tuple[list[tuple[str, ShownAnswer]], list[tuple[str, ShownAnswer]]]:
    """Prompt and answer of the highest and the lowest scores in the last evaluation."""
    steps = sorted(run.evaluations)
    scored = [answer for answer in (run.evaluations[steps[-1]] if steps else []) if answer.score is not None]
    ordered = sorted(scored, key=lambda answer: answer.score or 0.0)
    best, worst = ordered[::-1][:EXTREMES], ordered[:EXTREMES]
    return [(cut(a.prompt), shown(a)) for a in best], [(cut(a.prompt), shown(a)) for a in worst]


def _change(before: Answer, after: Answer) -> float:
    return (after.score or 0.0) - (before.score or 0.0)


def _pair(before: Answer, after: Answer) -> ShownPair:
    change = _change(before, after)
    words = "" if before.score is None or after.score is None else f"{change:+.2f}"
    return ShownPair(cut(before.prompt), cut(before.before), shown(before), shown(after), words, change >= 0)


def _tokens(answer: Answer) -> tuple[list[Token], dict[str, str]]:
    """The tokens of an answer with their numbers, and the measures that colour them; empty where the record is absent
    or not as expected."""
    record = answer.tokens or {}
    texts = record.get("text")
    if not isinstance(texts, list) or not texts:
        return [], {}
    columns: dict[str, Sequence[Any]] = {
        name: record[name]
        for name in MEASURES
        if isinstance(record.get(name), list) and len(record[name]) == len(texts)
    }
    if not all(isinstance(value, (int, float)) for column in columns.values() for value in column):
        return [], {}
    if {"logprob", "ref_logprob"} <= columns.keys():
        columns["kl"] = [p - q for p, q in zip(columns["logprob"], columns["ref_logprob"])]
    # what colours are relative to: the largest value of the answer, but not less than 1
    scales = {
        name: max([1.0, *(abs(value) for value in columns[name] if math.isfinite(value))])
        for name in COLOURED if name in columns
    }  # fmt: skip
    tokens = []
    for i, text in enumerate(texts):
        says = {MEASURES[name]: format_number(float(columns[name][i]), 3) for name in MEASURES if name in columns}
        heat = {name: round(max(-1.0, min(1.0, columns[name][i] / scale)), 2) for name, scale in scales.items()}
        tokens.append(Token(str(text), json.dumps(says), json.dumps(heat)))
    return tokens, {name: MEASURES[name] for name in scales}
