"""Rounds of ranking on disk.

FOLDER/candidates/    the proposals of the round
FOLDER/rankings*      people's rankings so far: `rlhf data rank` and `rlhf data label-studio pull` write here
FOLDER/collected/     the rankings that the round trains on, written once there are enough of them
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
    """Whether a path is a complete dataset folder."""
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
        """The pattern of the paths that rankings are read from."""
        return self.folder / "rankings*"

    @property
    def collected(self) -> Path:
        """The dataset of rankings that the round trains on."""
        return self.folder / "collected"

    def sources(self) -> list[Dataset]:
        """The datasets of rankings so far: folders, and JSONL files that are not empty.

        Raises:
            UserError: One of them holds something else.
        """
        found = sorted(self.folder.glob(self.pattern.name))
        return [open_dataset(path, "ranking") for path in found if is_dataset(path) or _is_jsonl(path)]


def _is_jsonl(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")) and path.stat().st_size > 0


def sources(rounds: Sequence[Round]) -> list[Dataset]:
    """The datasets of rankings of all the rounds so far."""
    return [dataset for one in rounds for dataset in one.sources()]


def new_rankings(rounds: Sequence[Round], datasets: Sequence[Dataset]) -> list[Ranking]:
    """The rankings for the last of the rounds: all rankings, each once, except those that an earlier round trained on.

    A ranking that arrives after its own round has continued therefore counts in the next round.
    """
    used = {record.id for one in rounds[:-1] for record in open_dataset(one.collected, "ranking").records()}
    found = {record.id: record for dataset in datasets for record in dataset.records()}
    return [record for name, record in found.items() if name not in used]


def collect(rounds: Sequence[Round]) -> int:
    """Write the dataset that the last of the rounds trains on. Its parents are the candidates and all rankings so far.

    Args:
        rounds: All rounds up to the one that is collected.

    Returns:
        The number of rankings. Bad rows of the sources are in its `rejected.jsonl`.

    Raises:
        UserError: There is no ranking, or the dataset cannot be written.
    """
    last, datasets = rounds[-1], sources(rounds)
    rankings = new_rankings(rounds, datasets)
    if not rankings:
        raise UserError(f"{last.pattern}: no ranking yet")
    parents = [open_dataset(last.candidates, "proposal"), *datasets]
    with Derivation(last.collected, "ranking", parents, {"round": last.number}, overwrite=True) as made:
        for reject in (reject for dataset in datasets for reject in dataset.rejects):
            made.rejects(reject)
        for ranking in rankings:
            made.write(ranking)
    return len(rankings)
