"""Datasets derived from datasets: what all commands that write one share.

The new manifest's `origin` names the parents (path and fingerprint), the command and the counts, for
`rlhf data lineage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.io.rejects import FILE_NAME, Rejects, by_count, warn_rejected
from data_tools.statistics.accumulator import Accumulator
from data_tools.statistics.agreement import AgreementObserver
from rlhf.core import console
from rlhf.core.command_line import command_line
from rlhf.core.errors import UserError
from rlhf.data.store import Dataset
from rlhf.data.writer import DatasetWriter


class Derivation(DatasetWriter):
    """Writes a dataset made from others.

    Bad rows of a JSONL parent go to `rejects`: read the parents with ``parent.records(on_reject=made.rejects)``.

    Args:
        out: The folder to make.
        kind: The kind of its records; None takes the kind of the first.
        parents: The opened datasets that it is made from.
        facts: More for the manifest's `origin`; `origin` may be added to until the block ends.
        judgements: The records are unchanged judgements of the first parent. Its agreement is copied where the new
            records show none (for instance because each prompt is kept once).
        overwrite: Replace a dataset of that name.

    Raises:
        UserError: `out` is one of the parents, is there already, or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        kind: str | None,
        parents: Sequence[Dataset],
        facts: dict[str, Any] | None = None,
        judgements: bool = False,
        overwrite: bool = False,
    ) -> None:
        for parent in parents:
            if Path(out).resolve() == parent.path.resolve():
                raise UserError(f"--out {out}: is the parent dataset itself", "It is kept.", "Choose another --out.")
        origin = {
            "command": command_line(),
            "parents": [{"path": str(parent.path), "fingerprint": parent.fingerprint} for parent in parents],
            **(facts or {}),
        }
        known = parents[0].manifest.get("agreement") if judgements else None
        observer = AgreementObserver(Accumulator(brief=False), otherwise=known)
        super().__init__(out, kind, origin, observer, overwrite)
        self.rejects = Rejects(self.partial / FILE_NAME)

    def summary(self, **left_out: int | dict[str, int]) -> dict[str, Any]:
        """out, kind, read, written, the records left out, rejected, and reasons (bad rows of a JSONL dataset).

        Args:
            left_out: Names of counts, or of counts by why; `read` is the sum of these, `written` and `rejected`.
        """
        counts = {"written": self.count, **left_out, "rejected": self.rejects.count}
        facts = {"out": str(self.path), "kind": self.kind, "read": sum(map(total, counts.values()))}
        return {**facts, **counts, "reasons": by_count(self.rejects.reasons)}

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self.rejects.__exit__(error, *rest)
        self.origin |= {"written": self.count, "rejected": self.rejects.count}
        self.origin |= {"reasons": by_count(self.rejects.reasons)} if self.rejects.count else {}
        super().__exit__(error, *rest)


def total(count: int | Mapping[str, int]) -> int:
    """A count, or the sum of counts by why."""
    return sum(count.values()) if isinstance(count, Mapping) else count


def show_counts(summary: Mapping[str, Any], words: str, left_out: str, more: str = "") -> None:
    """Print the counts of `Derivation.summary`, and warn of bad rows.

    Args:
        words: What is said of the records that were left out, whose count has the name `left_out`.
        more: Follows the line.
    """
    line = f"read {summary['read']:,} = written {summary['written']:,} + {words} {total(summary[left_out]):,}"
    line += f" + rejected {summary['rejected']:,}" if summary["rejected"] else ""
    console.say(f"{line} -> {summary['out']} ({summary['kind']}s){more}")
    warn_rejected(summary)
