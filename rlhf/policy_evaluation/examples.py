"""Answers of two policies to the same prompts, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.core.console import format_number
from rlhf.core.page import cut
from rlhf.data.schema import Prompt
from rlhf.judging.agreement import Pair
from rlhf.policy_evaluation.measures import PolicyAnswers

EXTREMES, MORE = 4, 8
"""Examples of the largest gains and losses each; further ones, in the order of the data."""


@dataclass(frozen=True)
class Side:
    """One answer, with what is known of it in a few words."""

    text: str
    says: str


@dataclass(frozen=True)
class AnswerExample:
    """A prompt with the answer of the policy and, if there is one, that of its opponent."""

    prompt: str
    before: str
    """Earlier messages."""
    sides: Sequence[Side]
    gain: float | None
    """How far the first is ahead, in scores or ranks; None where nothing compares the two."""


def chosen(found: Sequence[AnswerExample]) -> dict[str, list[AnswerExample]]:
    """The largest gains and the largest losses, largest first, and further ones in their order."""
    known = sorted((one.gain, at) for at, one in enumerate(found) if one.gain)
    losses = [at for gain, at in known[:EXTREMES] if gain < 0]
    wins = [at for gain, at in known[::-1][:EXTREMES] if gain > 0]
    more = [at for at in range(len(found)) if at not in {*losses, *wins}][:MORE]
    parts = {"largest gains": wins, "largest losses": losses, "more": more}
    return {title: [found[at] for at in places] for title, places in parts.items()}


def of_answers(mine: PolicyAnswers, theirs: PolicyAnswers | None) -> list[AnswerExample]:
    """The first answer to each prompt that both can answer."""
    found = []
    both = [one for one in (mine, theirs) if one is not None]
    for at, prompt in enumerate(mine.prompts):
        if not all(one.texts[at] for one in both):
            continue
        scores = [next(iter(one.scores[at]), None) for one in both]
        kls = [next(iter(one.kls[at]), None) for one in both]
        sides = [
            Side(cut(one.texts[at][0].strip()), _says(score, kl)) for one, score, kl in zip(both, scores, kls)
        ]  # fmt: skip
        known = [score for score in scores if score is not None]
        found.append(AnswerExample(*_parts(prompt), sides, known[0] - known[1] if len(known) > 1 else None))
    return found


def of_rankings(pairs: Sequence[Pair]) -> list[AnswerExample]:
    """Two ranked answers each, the first such pair of each prompt."""
    first = {pair.ranking.prompt_id: pair for pair in reversed(pairs)}
    found = []
    for pair in list(first.values())[::-1]:
        ranks, texts = pair.ranking.ranks, [one.text for one in pair.ranking.candidates]
        sides = [Side(cut(texts[at].strip()), f"rank {ranks[at]} of {max(ranks)}") for at in (pair.one, pair.two)]
        found.append(AnswerExample(*_parts(pair.ranking), sides, float(ranks[pair.two] - ranks[pair.one])))
    return found


def _says(score: float | None, kl: float | None) -> str:
    parts = [] if score is None else [f"score {score:.2f}"]
    return ", ".join(parts + ([] if kl is None else [f"KL {format_number(kl, 3)}"]))


def _parts(prompt: Prompt) -> tuple[str, str]:
    *before, last = prompt.messages
    return cut(last.content), cut("\n".join(f"{one.role}: {one.content}" for one in before))
