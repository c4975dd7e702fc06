"""UKPConvArg1 (Habernal & Gurevych 2016): human judgements of which of two arguments convinces more, as rankings.

Five workers judged each pair; the strict part holds 11,650 clean pairs over 32 topics (16 debates, two sides each).
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.writer import DatasetWriter

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/preferences/ukpconvarg1_strict_pairs.jsonl.gz"

Pair = tuple[str, str]
"""The better text, the worse text."""


def rebuild_rankings(pairs: Iterable[Pair], largest: int = 6) -> Iterator[list[str]]:
    """K-way rankings of up to `largest` texts, best first, that state exactly the given pairs, each of them once.

    The pairs are a directed graph. A ranking is a set of texts of which every pair was judged and no judgement
    contradicts the order, so nothing is concluded that nobody said. The largest ones are taken first and their pairs
    removed; what is left over stays a ranking of two, and so does a pair that repeats or contradicts another.
    """
    worse: dict[str, set[str]] = {}
    for winner, loser in pairs:
        beaten = worse.setdefault(winner, set())
        if loser in beaten or winner in worse.setdefault(loser, set()):
            yield [winner, loser]
        else:
            beaten.add(loser)
    for size in range(largest, 1, -1):
        while found := _chain([], set(worse), size, worse):
            yield found
            for place, text in enumerate(found):
                worse[text] -= set(found[place + 1 :])


def _chain(found: list[str], left: set[str], size: int, worse: dict[str, set[str]]) -> list[str] | None:
    """`found` extended to `size` texts out of `left`, each worse than all before it; None where there are none."""
    if len(found) == size:
        return found
    if len(found) + len(left) < size:
        return None
    longer = (_chain([*found, text], left & worse[text], size, worse) for text in sorted(left))
    return next(filter(None, longer), None)


def write_ukp(path: Path, seed: int = 0, largest: int = 6) -> Counter[str]:
    """Write all of it as one dataset of K-way rankings, split by topic: 22 to train on, 4 `eval`, 6 `test`.

    The best checkpoint is chosen by `eval`; nothing is chosen by `test`. The other side of a held-out topic's debate
    may be trained on. With seed 0 the length rule has 0.736 on the test topics, as it has on those that TRL's
    RewardTrainer was measured on: presumably the same six.

    Args:
        seed: Chooses the topics.
        largest: See `rebuild_rankings`.

    Returns:
        How many pairs each split has.
    """
    topics: dict[str, list[dict[str, str]]] = {}
    with gzip.open(SOURCE, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            topics.setdefault(row["topic"], []).append(row)
    order = sorted(topics)
    random.Random(seed).shuffle(order)
    split_of = dict(zip(order, ["test"] * 6 + ["eval"] * 4 + ["train"] * 22))
    pairs: Counter[str] = Counter()
    with DatasetWriter(path, "ranking", overwrite=True) as writer:
        for topic, rows in topics.items():
            for texts in rebuild_rankings([(row["chosen"], row["rejected"]) for row in rows], largest):
                ranking = Ranking(
                    (Message("user", rows[0]["prompt"]),),
                    source="UKPConvArg1",
                    group=topic,
                    split=split_of[topic],
                    candidates=tuple(Candidate(text, author_kind="person") for text in texts),
                    ranks=tuple(range(1, len(texts) + 1)),
                )
                writer.write(ranking)
                pairs[ranking.split or ""] += ranking.informative_pairs
    return pairs
