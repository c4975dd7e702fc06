"""Rankings by simulated annotators."""

from __future__ import annotations

import numpy as np

from rlhf.data.schema import Candidate, Message, Ranking, dense_ranks

# ---- annotators of known quality -------------------------------------------------------------------------------------


def simulated(
    seed: int,
    prompts: int = 400,
    k: int = 4,
    per_prompt: int = 5,
    people: int = 10,
    random: int = 2,
    reversed_: int = 0,
) -> tuple[list[Ranking], dict[str, dict[str, float]]]:
    """Rankings by annotators of known quality, and the true value of each prompt's answers.

    Values are normal. Annotators see them through Gumbel noise (a Plackett-Luce ranking) of a scale of their own, from
    0.3 (careful) to 1.2; the first `random` of them do not look, the next `reversed_` rank upside down.
    """
    draw = np.random.default_rng(seed)
    noise = np.append(np.zeros(random), np.linspace(0.3, 1.2, people - random))
    rankings, truth = [], {}
    for prompt in range(prompts):
        value = draw.normal(size=k)
        truth[f"{prompt}?"] = {f"answer {i} to {prompt}": float(value[i]) for i in range(k)}
        for who in draw.choice(people, per_prompt, replace=False):
            seen = value + noise[who] * draw.gumbel(size=k)
            if who < random:
                seen = draw.normal(size=k)
            elif who < random + reversed_:
                seen = -seen
            shown = draw.permutation(k)
            candidates = tuple(Candidate(f"answer {i} to {prompt}") for i in shown)
            ranks = dense_ranks(-seen[shown])
            rankings.append(
                Ranking((Message("user", f"{prompt}?"),), candidates=candidates, ranks=ranks, annotator=f"{who:02}")
            )
    return rankings, truth
