"""Rankings by simulated annotators, which the tests of `rlhf data check` share."""

from __future__ import annotations

import random

from rlhf.data.schema import Candidate, Message, Ranking


def ranking(prompt, answers, ranks, annotator="", **more):
    """A ranking from plain texts."""
    candidates = tuple(a if isinstance(a, Candidate) else Candidate(a) for a in answers)
    return Ranking((Message("user", prompt),), candidates=candidates, ranks=tuple(ranks), annotator=annotator, **more)


def panel(
    prompts: int, accuracy: dict[str, float], k: int = 2, each: int | None = None, seed: int = 0
) -> list[Ranking]:
    """Rankings of K answers by people who tell the truth with some probability, pair by pair.

    The true order of the answers is chance. Someone of accuracy 0.5 ranks at random, of accuracy 1 truly, of 0 the
    wrong way round; between, they swap neighbours of the true order, from the best on, with probability 1 - accuracy
    (for K = 2 that is the probability of a wrong pair).

    Args:
        accuracy: Annotator -> accuracy.
        each: How many of them, at random, rank each prompt; all without it.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(prompts):
        truth = draw.sample(range(k), k)
        for name in draw.sample(sorted(accuracy), each or len(accuracy)):
            shown = draw.sample(range(k), k)
            if accuracy[name] == 0.5:
                ranks = draw.sample(range(1, k + 1), k)
            elif accuracy[name] == 0:
                ranks = [k - truth[answer] for answer in shown]
            else:
                order = sorted(range(k), key=lambda answer: truth[answer])
                for place in range(k - 1):
                    if draw.random() > accuracy[name]:
                        order[place], order[place + 1] = order[place + 1], order[place]
                ranks = [order.index(answer) + 1 for answer in shown]
            answers = [f"answer {answer} to {number}" for answer in shown]
            rows.append(ranking(f"Question {number}?", answers, ranks, name, shown=True))
    return rows
