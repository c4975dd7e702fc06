"""What leaving each annotator out does to a reward model: a bag of words, trained with and without their rankings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn import model_selection

from data_tools.statistics.intervals import SEED, Estimate
from data_tools.statistics.words import FEWEST_PROMPTS, FOLDS, WordPairs, predictions, turns
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.core.intervals import resampled_sums
from rlhf.data.store import open_dataset

FEWEST_RANKINGS = 20
"""An annotator with fewer is not left out: the interval would say nothing."""
LEVEL = 0.05


@dataclass(frozen=True)
class Effect:
    """What one annotator's rankings do to the accuracy on what the others ranked."""

    name: str
    rankings: int
    accuracy: float
    """Of the model with all rankings, on held-out pairs that others ranked."""
    gain: Estimate
    """That accuracy minus the accuracy without the annotator."""
    gain_over_others: Estimate
    """The accuracy without as many rankings of others, minus the accuracy without the annotator: above 0, their
    rankings teach more than those of the others."""
    verdict: str
    """Of `gain`, corrected for the number of annotators (Bonferroni). helps: without them the reward model is worse.
    harms: without them it is better. no clear effect: the difference may be chance."""


def leave_out(path: str | Path, most: int = 20) -> dict[str, Any]:
    """Train the model of `bag_of_words` with all rankings, without each annotator's, and without as many random
    rankings of others, in five folds that keep a prompt together; compare them on held-out pairs that others ranked.

    Intervals are 95 % percentile intervals of a paired bootstrap over prompts (Efron 1979): both models are judged on
    the same resampled prompts.

    Args:
        path: A dataset of rankings that name their annotators.
        most: The annotators with the most rankings that are left out, one after the other.

    Returns:
        pairs, prompts, accuracy (of the model with all), effects (see `Effect`, most harmful first), not_tried
        (annotators with too few rankings, or beyond `most`).

    Raises:
        UserError: Too few annotators or prompts.
    """
    records = open_dataset(path, "ranking").records()
    pairs = WordPairs(one for one in records if one.annotator and not one.merged)
    rankings = pairs.rankings
    if pairs.prompts < FEWEST_PROMPTS:
        why = f"{pairs.prompts} prompts were ranked by named annotators; {FEWEST_PROMPTS} are needed."
        raise UserError(f"{path}: too few rankings", why, "Rank more, with `rlhf data rank`.")
    tried = [who for who, count in rankings.most_common(most) if count >= FEWEST_RANKINGS]
    if len(rankings) < 2 or not tried:
        why = f"An annotator is left out who has {FEWEST_RANKINGS} rankings or more, if there is another one."
        raise UserError(f"{path}: no annotator can be left out", why, "`rlhf data stats` counts them.")
    winner = turns(len(pairs.prompt))
    difference = pairs.difference.multiply(winner[:, None]).tocsr()
    folds = list(model_selection.GroupKFold(FOLDS).split(winner, groups=pairs.prompt))
    everybody = predictions(difference, winner, folds)
    found = []
    for who in console.track(tried, "leaving annotators out", unit="annotators"):
        judged = pairs.annotator != who
        without = predictions(difference, winner, folds, judged)
        fewer = predictions(difference, winner, folds, _without_as_many_others(pairs, who))
        gain, clear = _compare(everybody, without, pairs, judged, len(tried))
        verdict = "no clear effect" if not clear else "helps" if gain.value > 0 else "harms"
        over, _ = _compare(fewer, without, pairs, judged, 1)
        accuracy = float(everybody[judged].mean())
        found.append(Effect(who, rankings[who], accuracy, gain, over, verdict))
    found.sort(key=lambda one: (one.gain.value, one.name))
    return {
        "pairs": len(winner), "prompts": len(np.unique(pairs.prompt)), "accuracy": float(everybody.mean()),
        "effects": [asdict(one) for one in found], "not_tried": len(rankings) - len(tried),
    }  # fmt: skip


def _without_as_many_others(pairs: WordPairs, who: str) -> np.ndarray:
    """(n,) bool: everything but as many random rankings of others as the annotator has; half of them if there are no
    more."""
    own = np.unique(pairs.ranking[pairs.annotator == who])
    others = np.unique(pairs.ranking[pairs.annotator != who])
    count = min(len(own), len(others) // 2)
    left = np.random.default_rng(SEED).choice(others, count, replace=False)
    return ~np.isin(pairs.ranking, left)


def _compare(
    one: np.ndarray, other: np.ndarray, pairs: WordPairs, judged: np.ndarray, tests: int
) -> tuple[Estimate, bool]:
    """Difference of two accuracies on the judged pairs, and whether it is not 0 at `LEVEL` / `tests`."""
    index = np.unique(pairs.prompt[judged], return_inverse=True)[1]
    sums = np.stack([np.bincount(index, (one - other)[judged]), np.bincount(index)], 1)
    drawn = resampled_sums(sums)
    means = drawn[:, 0] / drawn[:, 1]
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    clear = abs(value) > float(stats.norm.ppf(1 - LEVEL / 2 / tests)) * float(means.std())
    return Estimate(value, float(low), float(high), int(judged.sum())), clear


def show(found: dict[str, Any]) -> None:
    """Print the table and what it means."""

    def points(estimate: dict[str, Any]) -> str:
        value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
        return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"

    rows = [
        [one["name"], one["rankings"], f"{one['accuracy']:.1%}", points(one["gain"]),
         points(one["gain_over_others"]), one["verdict"]]
        for one in found["effects"]
    ]  # fmt: skip
    columns = ["annotator", "rankings", "accuracy", "gain, points", "over others", "verdict"]
    console.table("what each annotator's rankings do to a reward model", columns, rows)
    console.say(
        f"A bag-of-words reward model is right on {found['accuracy']:.1%} of {found['pairs']:,} held-out pairs of "
        f"{found['prompts']:,} prompts. Gain: its accuracy on what the others ranked, minus that without the annotator."
    )
    console.say("Over others: the gain above that of as many rankings of others. In brackets 95% intervals.")
    if found["not_tried"]:
        console.say(
            f"{found['not_tried']} annotators were not left out: fewer than {FEWEST_RANKINGS} rankings, or --most."
        )
