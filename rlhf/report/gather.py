"""What a report reads: a run with the runs that it was made from, and everything that they logged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.limits import read_json_object
from rlhf.doctor.diagnosis import checks_made, examine
from rlhf.doctor.evidence import Evidence, read_evidence
from rlhf.doctor.findings import Finding
from rlhf.report.pipelines import folders_of, is_pipeline, pipeline_name
from rlhf.runs.logged import logged_lines
from rlhf.runs.model_folder import tensor_sizes
from rlhf.runs.run import is_run, read_run

STAGE_NAMES = {
    "sft": "Instruction tuning", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO", "specialist": "Specialist",
}  # fmt: skip
"""What the page calls a stage."""


@dataclass(frozen=True)
class Answer:
    """A completion of an evaluation, as samples.jsonl has it."""

    prompt: str
    """The last message of the prompt, or the rendered prompt."""
    before: str
    """The messages before it, if any."""
    text: str
    score: float | None
    ended: bool
    tokens: Mapping[str, Any] | None
    """Per-token numbers; see `rlhf.replay.tokens`. None where they were not recorded."""


@dataclass(frozen=True)
class RunRecord:
    """One run with all that a report shows of it."""

    evidence: Evidence

    @property
    def path(self) -> Path:
        assert self.evidence.path is not None  # it was read from a folder
        return self.evidence.path

    @property
    def stage(self) -> str:
        return self.evidence.stage

    @property
    def title(self) -> str:
        return STAGE_NAMES.get(self.stage, self.stage)

    @cached_property
    def _examined(self) -> tuple[list[Finding], dict[str, list[str]]]:
        return examine(self.evidence)

    @property
    def findings(self) -> list[Finding]:
        """What `rlhf doctor` says."""
        return self._examined[0]

    @property
    def checks(self) -> int:
        """How many checks of `rlhf doctor` could be made."""
        return checks_made(self.stage, self._examined[1])

    @property
    def held_out(self) -> dict[str, Any]:
        """A reward run's reward_metrics.json; empty if it is absent or damaged."""
        return self.results.get("reward_metrics.json", {})

    @cached_property
    def evaluations(self) -> dict[int, list[Answer]]:
        """Step -> the completions of the evaluation at that step."""
        found: dict[int, list[Answer]] = {}
        for _, row in logged_lines(self.path / "samples.jsonl", [], complete=False):
            found.setdefault(int(row["step"]), []).append(_answer(row))
        return found

    @cached_property
    def parameters(self) -> int | None:
        """Number of weights of the result, from the headers of its safetensors files; None without a result."""
        try:
            return sum(tensor_sizes(self.path / "model")) or None
        except (OSError, UserError):
            return None

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Name -> content of the JSON objects in the run's folder, by name; damaged files are left out."""
        found = {}
        for file in sorted(self.path.glob("*.json")):
            with suppress(OSError, ValueError):
                found[file.name] = read_json_object(file)
        return found

    def file(self, name: str) -> str:
        """The text of a small file of the run; empty if it is absent."""
        try:
            return (self.path / name).read_text("utf-8", errors="replace")
        except OSError:
            return ""


@dataclass(frozen=True)
class Subject:
    """What a report is about: the run that ends a chain, after the runs that it was made from."""

    name: str
    runs: Sequence[RunRecord]

    @property
    def last(self) -> RunRecord:
        return self.runs[-1]

    def of(self, *stages: str) -> RunRecord | None:
        """The last run of one of the stages."""
        return next((run for run in reversed(self.runs) if run.stage in stages), None)


def gather(paths: Sequence[Path]) -> list[Subject]:
    """A subject for each run folder, each folder that holds the runs of a pipeline, and each pipeline file.

    Raises:
        UserError: There is no run, or a file of one is damaged.
    """
    subjects = []
    names = [pipeline_name(path) if is_pipeline(path) else name for name, path in zip(short_names(paths), paths)]
    for name, path in zip(names, paths):
        subjects.append(Subject(name, [RunRecord(read_evidence(folder)) for folder in chain(folders_of(path))]))
    return subjects


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them from each other."""
    parts = [path.resolve().parts for path in paths]
    for size in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-size:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def chain(folders: Iterable[Path]) -> list[Path]:
    """Run folders, each after those that it was made from, as far as these are still there.

    Raises:
        UserError: One is no run folder, or its run.json is damaged.
    """
    found: dict[Path, Path] = {}
    begun: set[Path] = set()

    def add(folder: Path) -> None:
        key = folder.resolve()
        if key in begun:
            return
        begun.add(key)
        for parent in read_run(folder).get("parents", []):
            place = located(str(parent.get("path", "")), folder)
            if place is not None and is_run(place):
                add(place)
        found[key] = folder

    for folder in folders:
        add(folder)
    return list(found.values())


def located(path: str, run: Path) -> Path | None:
    """Where a folder is that a run names: as it is written, else among the run's neighbours, if runs were moved."""
    if not path:
        return None
    ends = ["/".join(Path(path).parts[-n:]) for n in (1, 2, 3)]
    places = [Path(path), *(above / end for above, end in itertools.product(list(run.resolve().parents)[:3], ends))]
    return next((place for place in places if place.exists()), None)


def _answer(row: Mapping[str, Any]) -> Answer:
    messages = [one for one in row.get("messages") or [] if isinstance(one, dict)]
    parts = [str(one.get("content", "")) for one in messages] or [str(row.get("prompt", ""))]
    roles = [str(one.get("role", "")) for one in messages]
    before = "\n".join(f"{role}: {text}" for role, text in zip(roles[:-1], parts))
    score, tokens = row.get("score"), row.get("tokens")
    return Answer(
        parts[-1], before, str(row.get("answer", "")), float(score) if isinstance(score, (int, float)) else None,
        bool(row.get("ended", True)), tokens if isinstance(tokens, dict) else None,
    )  # fmt: skip


def pairs_of(first: Sequence[Answer], last: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """The answers of two evaluations to the same prompts."""
    for one, other in zip(first, last):
        if (one.prompt, one.before) == (other.prompt, other.before):
            yield one, other
