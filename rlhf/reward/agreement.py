"""How far the people who ranked a dataset agree, and so how accurate a reward model can be on it.

`rlhf data check` leaves the figures in the dataset's manifest, under `agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.errors import UserError
from rlhf.data.store import Dataset


@dataclass(frozen=True)
class Agreement:
    """Shares of pairs, in [0, 1]."""

    agreement: float
    """How often two annotators order a pair alike."""
    ceiling: float
    """The accuracy that a reward model can reach on rankings by such people."""
    interval: tuple[float, float]
    """95%, of the ceiling."""

    @classmethod
    def of(cls, datasets: Sequence[Dataset]) -> Agreement | None:
        """What is known of the datasets that a model is measured on: of one. Of several together nothing is known.

        Raises:
            UserError: The manifest's entry is not what `rlhf data check` writes.
        """
        noted: Any = datasets[0].manifest.get("agreement") if len(datasets) == 1 else None
        if noted is None:
            return None
        try:
            low, high = map(float, noted["interval"])
            return cls(float(noted["agreement"]), float(noted["ceiling"]), (low, high))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{datasets[0].path}/manifest.json: `agreement` is damaged ({error!r})",
                remedy=f"Write it anew: rlhf data check {datasets[0].path}",
            ) from None

    def figures(self) -> dict[str, Any]:
        """For JSON, beside a model's figures."""
        return {
            "annotator_agreement": self.agreement,
            "ceiling": self.ceiling,
            "ceiling_interval": list(self.interval),
        }

    def beside(self, accuracy: float | None) -> str:
        """The line that puts a model's accuracy beside people's."""
        low, high = self.interval
        shown = "-" if accuracy is None else f"{accuracy:.2f}"
        people = f"annotators agree {self.agreement:.2f}; ceiling {self.ceiling:.2f}, {low:.2f} to {high:.2f}"
        return f"accuracy {shown} ({people})"
