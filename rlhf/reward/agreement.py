"""Human agreement: how often the annotators of a dataset agree, and so how accurate a reward model can be on it.

`rlhf data check` writes the numbers into the dataset's manifest, under `agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from rlhf.core.errors import UserError
from rlhf.data.store import Dataset


@dataclass(frozen=True)
class Agreement:
    """Fractions of pairs, in [0, 1]."""

    agreement: float
    """How often two annotators order a pair the same way."""
    ceiling: float
    """The accuracy that a reward model can reach on rankings by these annotators."""
    interval: tuple[float, float]
    """The 95% interval of the ceiling."""

    @classmethod
    def of(cls, datasets: Sequence[Dataset]) -> Agreement | None:
        """The agreement recorded in the manifest of a single dataset; None without one, or for several datasets.

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
                remedy=f"Write it again: rlhf data check {quote(str(datasets[0].path))}",
            ) from None

    def metrics(self) -> dict[str, Any]:
        """For JSON, next to the metrics of a model."""
        return {
            "annotator_agreement": self.agreement,
            "ceiling": self.ceiling,
            "ceiling_interval": list(self.interval),
        }

    def compared_with(self, accuracy: float | None) -> str:
        """The line that shows the accuracy of a model next to human agreement."""
        low, high = self.interval
        shown = "-" if accuracy is None else f"{accuracy:.2f}"
        human = f"annotators agree {self.agreement:.2f}; ceiling {self.ceiling:.2f}, {low:.2f} to {high:.2f}"
        return f"accuracy {shown} ({human})"
