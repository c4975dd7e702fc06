"""The table of metrics and how a row is added to it; the rows stand in `data_tools.check.metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_tools.statistics.intervals import Estimate
from rlhf.core.table import Table
from rlhf.data.schema import KINDS

Found = Estimate | str
METRICS = Table("metric")
ANY, RANKINGS = tuple(KINDS), ("ranking",)
WITH_ANSWERS = ("demonstration", "proposal", "ranking")

NO_NEAR = "the near-duplicate search was switched off (--no-near)"
NO_SETS = "no evaluation set was named (--against)"
NO_SPLITS = "fewer than two splits"
NO_TWO = "no pair of answers was ordered by two named people"
NO_NAMES = "no ranking names its annotator"


def or_why(found: Estimate | None, why: str) -> Found:
    """The estimate, or the words that say why there is none."""
    return why if found is None else found


def metric(name: str, part: str, unit: str, basis: str, **more: Any) -> Callable[[Any], Any]:
    """Decorator that adds a function of the facts as the metric `name`; what is told of it are the row's traits.

    Args:
        part: Of the report, a key of `show.PARTS`.
        unit: share (0 to 1), count (of what should not be), or number.
        basis: What it is counted over, for people.
        sampled: What of a large dataset is sampled for it, a key of `Facts.is_sample`; none by default.
        look, bad: Conditions, any of which makes it need a look or be bad; without any it is information only.
        advice: What to do then.
        kinds: The kinds of dataset that it is made for; rankings by default.
    """
    defaults = {"sampled": "", "look": (), "bad": (), "advice": "", "kinds": RANKINGS}
    return METRICS.row(name, part=part, unit=unit, basis=basis, **{**defaults, **more})
