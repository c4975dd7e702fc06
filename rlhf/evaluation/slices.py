"""Accuracy on parts of the pairs: by margin, length, source, annotator, group, turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.data.schema import Ranking
from rlhf.evaluation.estimates import fraction
from rlhf.evaluation.scored import RecordPairs, ScoredRecord

LENGTHS = (
    ("less than half as long", 0.0, 0.5), ("shorter", 0.5, 0.9), ("about as long (within 10%)", 0.9, 1 / 0.9),
    ("longer", 1 / 0.9, 2.0), ("more than twice as long", 2.0, np.inf),
)  # fmt: skip
"""Bins of the better answer's characters divided by the worse one's."""
RATINGS = ("smallest third", "middle third", "largest third")
MOST_TURNS = 4


def slices(pairs: RecordPairs, scored: Sequence[ScoredRecord]) -> dict[str, list[dict[str, Any]]]:
    """The parts of the pairs by each property that takes more than one value.

    Returns:
        Name of the property -> a row for each part, as `part_facts` gives it, with its `label`. The properties: `rank
        distance` (how far the annotator's ranks are from each other), `rating margin` (thirds of the difference of
        the candidates' own ratings), `length of the better answer` (in characters, compared with the worse one),
        `source`, `annotator`, `group`, `turns` (messages of the user). By source, annotator and group, the part with
        the most pairs comes first.
    """
    distances = sorted(set(pairs.distance.tolist()), key=str)
    found = {
        "rank distance": _rows({str(one): pairs.where(pairs.distance == one) for one in distances}),
        "rating margin": _rows(_by_rating(pairs)),
        "length of the better answer": _rows(_by_length(pairs)),
    }
    for name, label in RECORD_LABELS.items():
        parts = pairs.by([label(one.record) for one in scored])
        found[name] = sorted(_rows(parts), key=lambda row: 0 if name == "turns" else -row["count"])
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def _rows(parts: dict[str, RecordPairs]) -> list[dict[str, Any]]:
    return [{"label": name, **part_facts(part)} for name, part in parts.items() if len(part)]


def part_facts(part: RecordPairs) -> dict[str, Any]:
    """Of some pairs: the accuracy as `fraction` gives it, `log_loss` (nats) and `longer` (accuracy of that rule)."""
    return {
        **fraction(part.correct, part.prompt),
        "log_loss": float(part.log_loss.mean()),
        "longer": float(part.longer.mean()),
    }


def _turns(record: Ranking) -> str:
    count = sum(message.role == "user" for message in record.messages)
    return str(count) if count < MOST_TURNS else f"{MOST_TURNS} or more"


RECORD_LABELS: dict[str, Callable[[Ranking], str | None]] = {
    "source": lambda record: record.source or "(not given)",
    "annotator": lambda record: record.annotator or "(not given)",
    "group": lambda record: record.group,
    "turns": _turns,
}


def _by_length(pairs: RecordPairs) -> dict[str, RecordPairs]:
    ratio = pairs.lengths[:, 0] / pairs.lengths[:, 1]
    return {name: pairs.where((ratio >= low) & (ratio < high)) for name, low, high in LENGTHS}


def _by_rating(pairs: RecordPairs) -> dict[str, RecordPairs]:
    """Thirds of the rating margins; fewer parts where many margins are equal."""
    rated = np.isfinite(pairs.rating)
    if not rated.any():
        return {}
    edges = np.quantile(pairs.rating[rated], [1 / 3, 2 / 3])
    third = np.where(rated, np.searchsorted(edges, pairs.rating, side="left"), -1)
    return {name: pairs.where(third == index) for index, name in enumerate(RATINGS)}
