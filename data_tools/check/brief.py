"""The brief check after each import: a few lines, from what was gathered while the dataset was written."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from data_tools.statistics import consistency
from data_tools.statistics.accumulator import Accumulator
from data_tools.statistics.agreement import agreement_facts
from data_tools.statistics.annotators import annotators_of
from data_tools.statistics.judgements import pairs_of, votes_of
from rlhf.core import console


def show_brief(gathered: Accumulator, path: str | Path) -> None:
    """Print three to six lines: answers and ties, repeats, length, contradictions, agreement, annotators."""
    lines = _counts(gathered)
    if "ranks" in gathered.columns:
        lines += _repeated_rankings(gathered)
    for line in [*lines, f"more: rlhf data check {quote(str(path))} --html check.html"]:
        console.say(f"  {line}")


def _counts(gathered: Accumulator) -> list[str]:
    records, repeats = gathered.records, gathered.records - gathered.distinct("id")
    lines = [f"{gathered.distinct('prompt'):,} prompts"]
    if max(gathered.sizes) > 1:
        sizes = ", ".join(f"{size} in {times / records:.1%}" for size, times in sorted(gathered.sizes.items())[:6])
        tied = f"; {gathered.tied / gathered.pairs:.1%} of pairs tied" if gathered.pairs else ""
        lines[0] += f"; answers to rank: {sizes}{tied}"
    if repeats:
        lines.append(f"{repeats:,} records ({repeats / records:.1%}) repeat an earlier one exactly")
    if gathered.unequal:
        lines.append(f"the longer answer wins {gathered.longer / gathered.unequal:.1%} of the pairs")
    return lines


def _repeated_rankings(gathered: Accumulator) -> list[str]:
    """Lines on prompts that were ranked more than once."""
    columns = gathered.ranked_repeatedly(named=False)
    if columns is None:
        return ["no prompt was ranked twice, so the agreement and the ceiling of a reward model are unknown"]
    pairs = pairs_of(columns)
    votes = votes_of(pairs)
    lines = []
    both = consistency.contradictions(pairs)
    if both is not None:
        lines.append(
            f"{both.value:.1%} [{both.low:.1%}, {both.high:.1%}] of {both.n:,} pairs that were ordered more than once "
            "were ordered both ways"
        )
    facts = agreement_facts(votes)
    if facts is None:
        lines.append("no two named annotators ordered the same pair, so the ceiling of a reward model is unknown")
    else:
        low, high = facts["interval"]
        lines.append(
            f"two annotators agree on {facts['agreement']:.1%} of {facts['pairs']:,} pairs: a reward model's accuracy "
            f"on single judgements is at most {facts['ceiling']:.1%} [{low:.1%}, {high:.1%}]"
        )
    doubtful = [one for one in annotators_of(pairs, votes) if one.verdict in ("random", "reversed")]
    if doubtful:
        names = ", ".join(f"{one.name} ({one.verdict}, {one.agreement.value:.0%})" for one in doubtful[:3])
        console.warn(f"{len(doubtful)} annotators agree with the others no more than chance would: {names}")
    return lines
