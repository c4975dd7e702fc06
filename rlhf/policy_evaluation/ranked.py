"""Win rates from people's rankings whose candidates name the policies that wrote them. Loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf.core.errors import UserError
from rlhf.data.schema import MODEL_AUTHOR, Ranking
from rlhf.judging.agreement import Pair
from rlhf.judging.win_rate import win_rates

REFERENCES, RANKINGS = "references", "rankings"
"""What the command line says in place of a policy and of a judge: the dataset's own answers, and its rankings."""
MOST_NAMED = 10
"""Authors that an error lists."""


def find_author(name: str, records: Sequence[Ranking], option: str) -> str:
    """The author of candidates that a name means: itself, without a slash at its end, or as `model:NAME`.

    Args:
        option: Whose value the name is, for the message.

    Raises:
        UserError: No candidate has such an author.
    """
    counts = Counter(one.author for record in records for one in record.candidates)
    for author in (name, name.rstrip("/"), MODEL_AUTHOR + name):
        if author in counts:
            return author
    known = [f"{author} ({count:,})" for author, count in counts.most_common(MOST_NAMED) if author]
    raise UserError(
        f"{option}{name}: wrote none of the {sum(counts.values()):,} ranked answers",
        f"Their authors are: {', '.join(known)}." if known else "No answer names its author.",
        "Give a name as the field `author` of the candidates has it; see docs/policy-evaluation.md.",
    )


def ranked_pairs(records: Sequence[Ranking], mine: str, other: str) -> list[Pair]:
    """Each answer of one author with each answer of the other in the same ranking."""
    return [
        Pair(record, i, j)
        for record in records
        for i, one in enumerate(record.candidates) if one.author == mine
        for j, two in enumerate(record.candidates) if two.author == other
    ]  # fmt: skip


def ranked_win_rate(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How often people rank one author's answer above the other's.

    Args:
        pairs: At least one.

    Returns:
        See `win_rates`; `prompts`, `annotators` (named ones), and `by_annotator`: name -> `win_rates`, where at least
        two annotators are named.
    """
    named: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.ranking.annotator:
            named.setdefault(pair.ranking.annotator, []).append(pair)
    by_annotator = {name: _win_rates(found) for name, found in sorted(named.items())} if len(named) > 1 else {}
    return _win_rates(pairs) | {"annotators": len(named), "by_annotator": by_annotator}


def _win_rates(pairs: Sequence[Pair]) -> dict[str, Any]:
    prompts = [pair.ranking.prompt_id for pair in pairs]
    lengths = [(len(one), len(other)) for _, one, other in map(Pair.item, pairs)]
    return win_rates([pair.human for pair in pairs], lengths, prompts) | {"prompts": len(set(prompts))}


def ranked_comparisons(
    records: Sequence[Ranking], mine: str, against: str | None
) -> tuple[list[dict[str, Any]], dict[str, list[Pair]]]:
    """Win rates of one author against another, or against each that it shares rankings with.

    Returns:
        For each opponent `against` (its name) and what `ranked_win_rate` gives, most comparisons first; and the pairs.

    Raises:
        UserError: An author is unknown, or the two share no ranking.
    """
    mine = find_author(mine, records, "")
    if against is None:
        ranked = [{one.author for one in record.candidates} for record in records]
        others = sorted(set[str]().union(*(names for names in ranked if mine in names)) - {mine, ""})
    else:
        others = [find_author(against, records, "--against ")]
        if others == [mine]:
            raise UserError(f"--against {against}: is the policy itself", remedy="Name another author.")
    pairs = {name: ranked_pairs(records, mine, name) for name in others}
    pairs = {name: found for name, found in sorted(pairs.items(), key=lambda one: -len(one[1])) if found}
    if not pairs:
        who = f"{mine} and {others[0]}" if against else f"{mine} and another author"
        raise UserError(f"no ranking holds answers of {who}", remedy="Rank answers of both to the same prompts.")
    return [{"against": name, **ranked_win_rate(found)} for name, found in pairs.items()], pairs
