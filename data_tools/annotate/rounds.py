"""Rounds of ranking on disk: what was proposed, what people have said of it, and what is learned from.

FOLDER/candidates/    the proposals of the round
FOLDER/rankings*      what people say, as it comes: `rlhf data rank` and `rlhf data label-studio pull` write here
FOLDER/collected/     the rankings that the round trains on, fixed once there were enough of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.io.derive import Derivation
from rlhf.core.errors import UserError
from rlhf.data.schema import Ranking
from rlhf.data.store import Dataset, open_dataset


def is_dataset(path: Path) -> bool:
    """Whether a whole dataset folder is there."""
    return (path / "manifest.json").is_file()


@dataclass(frozen=True)
class Round:
    """One round of ranking, in a folder of its own. Rounds count from 1."""

    number: int
    folder: Path

    @property
    def candidates(self) -> Path:
        """The dataset of proposals."""
        return self.folder / "candidates"

    @property
    def pattern(self) -> Path:
        """Where rankings are looked for."""
        return self.folder / "rankings*"

    @property
    def collected(self) -> Path:
        """The dataset of rankings that the round trains on."""
        return self.folder / "collected"

    def sources(self) -> list[Dataset]:
        """The datasets of rankings that have come: folders, and JSONL files that are not empty.

        Raises:
            UserError: One of them holds something else.
        """
        found = sorted(self.folder.glob(self.pattern.name))
        return [open_dataset(path, "ranking") for path in found if is_dataset(path) or _is_jsonl(path)]


def _is_jsonl(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")) and path.stat().st_size > 0


def sources(rounds: Sequence[Round]) -> list[Dataset]:
    """The datasets of rankings that have come to any of the rounds."""
    return [dataset for one in rounds for dataset in one.sources()]


def untaken(rounds: Sequence[Round], come: Sequence[Dataset]) -> list[Ranking]:
    """The rankings for the last of the rounds: all that have come, each once, without those that an earlier one took.

    So a ranking that comes after its own round went on counts in the next.
    """
    taken = {record.id for one in rounds[:-1] for record in open_dataset(one.collected, "ranking").records()}
    found = {record.id: record for dataset in come for record in dataset.records()}
    return [record for name, record in found.items() if name not in taken]


def collect(rounds: Sequence[Round]) -> int:
    """Write what the last of the rounds trains on; its parents are the candidates and all that has come.

    Args:
        rounds: All rounds up to the one that is collected.

    Returns:
        How many rankings it holds. Bad rows of the sources are in its `rejected.jsonl`.

    Raises:
        UserError: Nothing has come, or it cannot be written.
    """
    last, come = rounds[-1], sources(rounds)
    rankings = untaken(rounds, come)
    if not rankings:
        raise UserError(f"{last.pattern}: no ranking has come")
    parents = [open_dataset(last.candidates, "proposal"), *come]
    with Derivation(last.collected, "ranking", parents, {"round": last.number}) as made:
        for reject in (reject for dataset in come for reject in dataset.rejects):
            made.rejects(reject)
        for ranking in rankings:
            made.write(ranking)
    return len(rankings)
