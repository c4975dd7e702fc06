"""How far a judge agrees with human rankings: measured before it is used, and recorded in a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.intervals import fraction_interval
from rlhf.core.lazy import np
from rlhf.core.limits import parse_json
from rlhf.data.schema import Ranking
from rlhf.judging.judge import Judge, PairVerdicts

SAME = ("url", "model", "kind", "prompt_fingerprint", "temperature")
"""What a judge must have in common with the measured one."""


@dataclass(frozen=True)
class Pair:
    """Two candidates of a ranking."""

    ranking: Ranking
    one: int
    two: int

    @property
    def human(self) -> float:
        """1 if the first candidate is ranked better, 0 if the second, 0.5 for a tie."""
        first, second = self.ranking.ranks[self.one], self.ranking.ranks[self.two]
        return 0.5 if first == second else float(first < second)

    def item(self) -> tuple[list[dict[str, str]], str, str]:
        """What `Judge.compare` takes."""
        texts = self.ranking.candidates
        return self.ranking.chat, texts[self.one].text, texts[self.two].text


def pairs_of(rankings: Iterable[Ranking], most: int, seed: int = 0) -> Iterator[Pair]:
    """At most `most` pairs of each ranking, in random order; the two candidates of a pair are in random order too."""
    for ranking in rankings:
        chance = random.Random(f"{seed} {ranking.prompt_id} {ranking.annotator}")
        found = list(combinations(range(len(ranking.candidates)), 2))
        for one, two in chance.sample(found, min(most, len(found))):
            yield Pair(ranking, *((one, two) if chance.random() < 0.5 else (two, one)))


def by_rating(judge: Judge, pairs: Sequence[Pair]) -> list[PairVerdicts]:
    """Verdicts that follow from the ratings of both candidates: the higher rating wins, equal ratings tie."""
    answers = [(pair.ranking.chat, text) for pair in pairs for text in pair.item()[1:]]
    ratings = list(judge.rate(answers))
    found = []
    for one, two in zip(ratings[::2], ratings[1::2]):
        verdict: Any = None if one is None or two is None else "A" if one > two else "B" if two > one else "C"
        found.append(PairVerdicts(verdict, verdict))
    return found


def agreement_metrics(pairs: Sequence[Pair], verdicts: Sequence[PairVerdicts], swapped: bool = True) -> dict[str, Any]:
    """Agreement of verdicts with rankings.

    Args:
        pairs: The pairs.
        verdicts: One for each.
        swapped: Whether each was asked in both orders; position bias and consistency need that.

    Returns:
        - `pairs`, `rankings`, `unreadable` (pairs with an unreadable verdict, which count nowhere else).
        - `strict_pairs`: readable pairs that the annotator does not tie; `agreement`: fraction of them that the judge
          orders as the annotator, where a tie of the judge counts half; `interval`: Wilson's 95% interval with the
          effective size of pairs clustered by prompt.
        - `judge_ties`: fraction of the strict pairs that the judge ties; `agreement_without_ties`.
        - `human_ties`, `tie_agreement`: pairs that the annotator ties, and the fraction that the judge ties too.
        - `consistent`: fraction of readable pairs with the same verdict in both orders; `first_position`: fraction of
          the verdicts, ties left out, for the answer that was shown first, 0.5 without bias; with its interval.
    """
    read = [(pair, one) for pair, one in zip(pairs, verdicts) if one.readable]
    strict = [(pair, one) for pair, one in read if pair.human != 0.5]
    credits = [1.0 - abs(pair.human - float(one.credit or 0.0)) for pair, one in strict]
    tied = [one for pair, one in read if pair.human == 0.5]
    decided = [credit for credit in credits if credit != 0.5]
    found: dict[str, Any] = {
        "pairs": len(pairs), "rankings": len({id(pair.ranking) for pair in pairs}),
        "unreadable": len(pairs) - len(read), "strict_pairs": len(strict),
        "agreement": _mean(credits), "interval": clustered(credits, [pair.ranking.prompt_id for pair, _ in strict]),
        "judge_ties": _mean([credit == 0.5 for credit in credits]), "agreement_without_ties": _mean(decided),
        "human_ties": len(tied), "tie_agreement": _mean([one.credit == 0.5 for one in tied]),
    }  # fmt: skip
    if swapped:
        shown = [first for _, one in read for first in one.shown_first]
        prompts = [pair.ranking.prompt_id for pair, one in read for _ in one.shown_first]
        found |= {
            "consistent": _mean([one.consistent for _, one in read]),
            "first_position": _mean(shown), "first_position_interval": clustered(shown, prompts),
        }  # fmt: skip
    return found


def clustered(values: Sequence[float], clusters: Sequence[str]) -> list[float] | None:
    """Wilson's 95% interval of a mean of values in [0, 1] that come in clusters; None without values."""
    if not values:
        return None
    _, index = np.unique(clusters, return_inverse=True)
    return list(fraction_interval(np.bincount(index, values), np.bincount(index)) or ())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def check_recorded(path: str, judge: Judge) -> tuple[float, float, float]:
    """The agreement that `rlhf judge --out FILE` has recorded for this judge, and the bounds of its interval.

    Raises:
        UserError: The file cannot be read, or was measured with another server, model, prompt or temperature.
    """
    try:
        found = parse_json(Path(path).read_text("utf-8"))
        measured, (low, high) = dict(found["judge"]), found["metrics"]["interval"]
        agreement = tuple(float(value) for value in (found["metrics"]["agreement"], low, high))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"judge's agreement {path}: cannot be read ({error})", "A judge is measured before it is used.",
            f"Measure it: rlhf judge {judge.config.url} RANKINGS --kind {judge.prompt.kind} --out {quote(str(path))}",
        ) from None  # fmt: skip
    mine = judge.facts()
    if other := [name for name in SAME if measured.get(name) != mine[name]]:
        values = [(name, json.dumps(measured.get(name)), json.dumps(mine[name])) for name in other]
        differences = "; ".join(f"{name}: {then}, now {now}" for name, then, now in values)
        raise UserError(
            f"judge's agreement {path}: was measured with another judge ({differences})",
            "Its agreement says nothing about this one.",
            "Measure this judge with `rlhf judge`, or name the file of its own measurement.",
        )
    return agreement[0], agreement[1], agreement[2]
