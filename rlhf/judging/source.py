"""A judge's ratings as scores for PPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf.core.console import is_main, say, warn
from rlhf.core.errors import UserError
from rlhf.judging.agreement import check_recorded
from rlhf.judging.config import JudgeConfig
from rlhf.judging.judge import Judge
from rlhf.judging.prompt import LOWEST

MOST_UNREADABLE = 0.5
"""A batch with a larger fraction of unreadable ratings ends the run."""
FEWEST = 8
"""Answers below which that fraction is not judged."""

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


def rating_source(config: JudgeConfig, agreement: str, unmeasured: bool) -> Rate:
    """A function of (prompts' messages, answers) that gives a rating of each.

    Args:
        config: The judge.
        agreement: The file that `rlhf judge` has written for it.
        unmeasured: Use a judge without one.

    Raises:
        UserError: No agreement is recorded for this judge, or its file is that of another one.
    """
    refuse_unmeasured(config.url, agreement, unmeasured)
    judge = Judge(config, "rating")
    if agreement:
        metrics = check_recorded(agreement, judge)
        low, high = metrics.get("interval") or (0.0, 1.0)
        if is_main():
            agreed = f"agreement with people {metrics.get('agreement') or 0.0:.2f} ({low:.2f} to {high:.2f})"
            (say if low > 0.5 else warn)(f"Judge {judge.server.model}, {judge.prompt.version}: {agreed}")

    def rate(messages: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]) -> list[float]:
        ratings = list(judge.rate(zip(messages, answers)))
        missing = sum(rating is None for rating in ratings)
        if len(ratings) >= FEWEST and missing > MOST_UNREADABLE * len(ratings):
            raise UserError(
                f"judge {config.url}: {missing} of {len(ratings)} ratings cannot be read",
                "; ".join(f"{count}: {reason}" for reason, count in judge.failures.items()),
                "Look at its replies in the cache, raise max_tokens, or change the prompt; the last checkpoint is"
                " usable.",
            )
        if missing:
            warn(f"judge: {missing} of {len(ratings)} ratings cannot be read; these answers get {LOWEST}")
        return [float(LOWEST) if rating is None else rating for rating in ratings]

    return rate
