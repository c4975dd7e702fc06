"""The check in brief, after each import: a few lines, from one pass in bounded memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.statistics import consistency
from data_tools.statistics.annotators import annotators_of
from data_tools.statistics.ceiling import agreement_facts, several_times
from data_tools.statistics.columns import Collector, as_shards, row_groups
from data_tools.statistics.judgements import pairs_of, votes_of
from rlhf.core import console
from rlhf.core.lazy import lazy
from rlhf.data.store import Dataset, open_dataset

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy("numpy")

READ = ["id", "prompt_id", "split", "candidates", "answer", "author", "ranks", "annotator", "merged"]


def brief(path: str | Path) -> None:
    """Print three to six lines on a dataset: answers and ties, repeats, length, contradictions, agreement, people.

    Memory grows by 16 bytes a record, and by what `ceiling.MOST_PROMPTS` prompts that were ranked more than once need.

    Raises:
        UserError: The dataset cannot be read.
    """
    dataset = open_dataset(path)
    with as_shards(dataset) as shards:
        lines = [*_one_pass(shards)]
        if dataset.kind == "ranking":
            lines += _several_rankings(shards)
    for line in lines:
        console.say(f"  {line}")
    console.say(f"  more: rlhf data check {path} --html check.html")


def _one_pass(shards: Dataset) -> list[str]:
    """Lines from figures that add up over the row groups."""
    ids, prompts = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    sizes: Counter[int] = Counter()
    tied = total = longer = unequal = 0
    for group in row_groups(shards):
        collector = Collector()
        collector.add(group.read(READ))
        columns = collector.columns()
        ids.append(columns.id)
        prompts.append(columns.prompt)
        sizes.update(columns.sizes.tolist())
        if shards.kind == "ranking":
            pairs = pairs_of(columns)
            difference = np.sign(columns.chars[pairs.one] - columns.chars[pairs.other]) * pairs.order
            tied, total = tied + int((pairs.order == 0).sum()), total + len(pairs)
            longer, unequal = longer + int((difference > 0).sum()), unequal + int((difference != 0).sum())
    records, distinct = sum(sizes.values()), _distinct(prompts)
    repeats = records - _distinct(ids)
    lines = [f"{distinct:,} prompts"]
    if max(sizes) > 1:
        shares = ", ".join(f"{size} in {times / records:.1%}" for size, times in sorted(sizes.items())[:6])
        lines[0] += f"; answers to rank: {shares}" + (f"; {tied / total:.1%} of pairs tied" if total else "")
    if repeats:
        lines.append(f"{repeats:,} records ({repeats / records:.1%}) repeat an earlier one in everything")
    if unequal:
        lines.append(f"the longer answer wins {longer / unequal:.1%} of the pairs")
    return lines


def _distinct(parts: list[np.ndarray]) -> int:
    whole = np.concatenate(parts)
    parts.clear()
    whole.sort()
    return int(np.count_nonzero(whole[1:] != whole[:-1])) + (len(whole) > 0)


def _several_rankings(shards: Dataset) -> list[str]:
    """Lines on prompts that were ranked more than once."""
    columns = several_times(shards, named=False)
    if columns is None:
        return ["no prompt was ranked twice: nothing is known of agreement, and the ceiling of a reward model is open"]
    pairs = pairs_of(columns)
    votes = votes_of(columns, pairs)
    lines = []
    both = consistency.contradictions(columns, pairs)
    if both is not None:
        lines.append(f"{both.value:.1%} of {both.n:,} pairs that were ordered more than once were ordered both ways")
    facts = agreement_facts(votes)
    if facts is None:
        lines.append("no pair was ordered by two named people: the ceiling of a reward model is open")
    else:
        low, high = facts["interval"]
        told = f"two people agree on {facts['agreement']:.1%} of pairs: a reward model's accuracy on single judgements"
        lines.append(f"{told} is at most {facts['ceiling']:.1%} [{low:.1%}, {high:.1%}]")
    doubtful = [one for one in annotators_of(columns, pairs, votes) if one.verdict in ("random", "reversed")]
    if doubtful:
        names = ", ".join(f"{one.name} ({one.verdict}, {one.agreement.value:.0%})" for one in doubtful[:3])
        console.warn(f"{len(doubtful)} annotators do not agree with the others beyond chance: {names}")
    return lines
