"""A judge's ratings as scores for PPO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf.core.console import is_main, say, warn
from rlhf.core.errors import UserError
from rlhf.judging.agreement import check_recorded
from rlhf.judging.config import RewardJudgeConfig
from rlhf.judging.judge import Judge
from rlhf.judging.prompt import LOWEST, TO_BE_READABLE

MOST_UNREADABLE = 0.5
"""A batch with a larger fraction of unreadable ratings ends the run."""
FEWEST = 8
"""Answers from which that fraction is judged; smaller batches are counted together until they have as many."""

Rate = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str]], list[float]]


def refuse_unmeasured(url: str, agreement: str, unmeasured: bool) -> None:
    """Refuse a judge without a file of its agreement with people.

    Raises:
        UserError: No file is named, or there is none of that name.
    """
    if agreement and not Path(agreement).is_file():
        raise UserError(f"reward.agreement: there is no file {agreement}", remedy="`rlhf judge --out FILE` writes it.")
    if not agreement and not unmeasured:
        raise UserError(
            f"reward: the agreement of the judge {url} with people was not measured",
            "A policy learns whatever its judge prefers, such as length.",
            f"Measure it: rlhf judge {url} RANKINGS --kind rating --out judge.json; then set `agreement: judge.json`."
            " Or set `unmeasured: true`.",
        )


def rating_source(config: RewardJudgeConfig) -> Rate:
    """A function of (prompts' messages, answers) that gives a rating of each.

    Raises:
        UserError: No agreement is recorded for this judge, or its file is that of another one.
    """
    refuse_unmeasured(config.url, config.agreement, config.unmeasured)
    judge = Judge(config, "rating")
    if config.agreement:
        agreed_on, low, high = check_recorded(config.agreement, judge)
        if is_main():
            agreed = f"agreement with people {agreed_on:.2f} ({low:.2f} to {high:.2f})"
            (say if low > 0.5 else warn)(f"Judge {judge.server.model}, {judge.prompt.version}: {agreed}")

    recent: list[float | None] = []
    counts: Counter[str] = Counter()

    def rate(messages: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]) -> list[float]:
        ratings = list(judge.rate(zip(messages, answers)))
        recent.extend(ratings)
        unread = recent.count(None)
        if len(recent) >= FEWEST and unread > MOST_UNREADABLE * len(recent):
            raise UserError(
                f"judge {config.url}: {unread} of {len(recent)} ratings cannot be read",
                judge.why_unreadable(),
                f"{TO_BE_READABLE} In PPO, the last checkpoint is usable.",
            )
        if len(recent) >= FEWEST:
            recent.clear()
        counts.update(asked=len(ratings), missing=ratings.count(None))
        if counts["missing"] >= max(1, 2 * counts["said"]):  # each time that they have doubled, not at every prompt
            counts["said"] = counts["missing"]
            so_far = f"{counts['missing']:,} of {counts['asked']:,} ratings so far"
            warn(f"judge: {so_far} cannot be read; these answers get {LOWEST}")
        return [float(LOWEST) if rating is None else rating for rating in ratings]

    return rate
