"""Accuracy on parts of the pairs: by margin, length, source, annotator, group, turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.evaluation.estimates import fraction
from rlhf.evaluation.scored import Pairs, ScoredRecord
from rlhf.reward.metrics import credit

LENGTHS = (
    ("less than half as long", 0.0, 0.5), ("shorter", 0.5, 0.9), ("about as long (within 10%)", 0.9, 1 / 0.9),
    ("longer", 1 / 0.9, 2.0), ("more than twice as long", 2.0, np.inf),
)  # fmt: skip
"""Bins of the better answer's characters divided by the worse one's."""
RATINGS = ("smallest third", "middle third", "largest third")
MOST_TURNS = 4


def slices(pairs: Pairs, scored: Sequence[ScoredRecord]) -> dict[str, list[dict[str, Any]]]:
    """The parts of the pairs by each property that takes more than one value.

    Returns:
        Name of the property -> a row for each part, as `part_facts` gives it, with its `label`. The properties: `rank
        distance` (how far the annotator's ranks are from each other), `rating margin` (thirds of the difference of
        the candidates' own ratings), `length of the better answer` (in characters, compared with the worse one),
        `source`, `annotator`, `group`, `turns` (messages of the user). By source, annotator and group, the part with
        the most pairs comes first.
    """
    found = {
        "rank distance": _by(pairs, [str(distance) for distance in pairs.distance.tolist()], sorted),
        "rating margin": _by_rating(pairs),
        "length of the better answer": _by_length(pairs),
        **{name: _by_record(pairs, scored, label) for name, label in RECORD_LABELS.items()},
        "turns": _by_record(pairs, scored, _turns, sorted),
    }
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def part_facts(part: Pairs) -> dict[str, Any]:
    """Of some pairs: the accuracy as `fraction` gives it, `log_loss` (nats) and `longer` (accuracy of that rule)."""
    return {
        **fraction(part.correct, part.prompt),
        "log_loss": float(np.logaddexp(0, -part.gap).mean()),
        "longer": float(credit(part.lengths[:, 0] - part.lengths[:, 1]).mean()),
    }


def _turns(one: ScoredRecord) -> str:
    count = sum(message.role == "user" for message in one.record.messages)
    return str(count) if count < MOST_TURNS else f"{MOST_TURNS} or more"


RECORD_LABELS: dict[str, Callable[[ScoredRecord], str | None]] = {
    "source": lambda one: one.record.source or "(not given)",
    "annotator": lambda one: one.record.annotator or "(not given)",
    "group": lambda one: one.record.group,
}


def _by_record(
    pairs: Pairs, scored: Sequence[ScoredRecord], label: Callable[[ScoredRecord], str | None], order: Any = None
) -> list[dict[str, Any]]:
    of_record = [label(one) for one in scored]
    return _by(pairs, [of_record[index] for index in pairs.ranking.tolist()], order)


def _by(pairs: Pairs, labels: Sequence[str | None], order: Any = None) -> list[dict[str, Any]]:
    """The parts by label, without None; ordered by label, or by the number of pairs if `order` is None."""
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        if label is not None:
            members.setdefault(label, []).append(index)
    names = order(members) if order else sorted(members, key=lambda name: (-len(members[name]), name))
    return [{"label": name, **part_facts(pairs.where(np.array(members[name])))} for name in names]


def _by_length(pairs: Pairs) -> list[dict[str, Any]]:
    ratio = pairs.lengths[:, 0] / pairs.lengths[:, 1]
    return _in_bins(pairs, [(name, (ratio >= low) & (ratio < high)) for name, low, high in LENGTHS])


def _by_rating(pairs: Pairs) -> list[dict[str, Any]]:
    """Thirds of the rating margins; fewer parts where many margins are equal."""
    rated = np.isfinite(pairs.rating)
    if not rated.any():
        return []
    edges = np.quantile(pairs.rating[rated], [1 / 3, 2 / 3])
    third = np.where(rated, np.searchsorted(edges, pairs.rating, side="left"), -1)
    return _in_bins(pairs, [(name, third == index) for index, name in enumerate(RATINGS)])


def _in_bins(pairs: Pairs, bins: Sequence[tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
    return [{"label": name, **part_facts(pairs.where(chosen))} for name, chosen in bins if chosen.any()]
