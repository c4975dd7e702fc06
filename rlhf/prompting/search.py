"""Search for an instruction: proposed, scored on one part of the data, reported on another (APE, Zhou et al. 2022).

    examples -> instructions -> scores -> the best -> other wordings of them -> scores -> ... -> winner -> report

A folder holds all of it. Each step depends on the seed and on what the steps before it wrote, so a search that was
killed continues where it was, and ends with the same winner:

    search.json        what is searched for, and by what
    round-0.json       the instructions of a round with the texts they are from, written when the round is complete
    candidates.jsonl   one line per scored instruction
    winner.yaml        the way of prompting with the best instruction, for --prompting
    result.json        the scores of the best, and the report
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.core.files import append_jsonl, write_json, write_text
from rlhf.data.schema import Demonstration
from rlhf.prompting.proposals import Proposer, from_examples, instruction_in, reword
from rlhf.prompting.ways import Prompting
from rlhf.rollout.streams import stream_seed
from rlhf.tasks.answers import normalised
from rlhf.tasks.metrics import MetricValue
from rlhf.tasks.task import Task

PAIRS = 5
"""Solved examples in a request for an instruction."""


@dataclass(frozen=True)
class SearchPlan:
    """How long and how wide a search is."""

    candidates: int
    """Instructions that are asked for in each round."""
    rounds: int
    """Rounds of other wordings after the first round."""
    keep: int
    """The best so many are reworded."""
    records: int
    """Records that each instruction is scored on."""
    seed: int


@dataclass(frozen=True)
class Parts:
    """The parts of the data. None has a question of another."""

    shown: list[Demonstration]
    """Solved examples for the requests."""
    scored: Task
    """What instructions are scored on."""
    reported: Task
    """What the search never sees."""


def split_parts(task: Task, train: Sequence[Demonstration], plan: SearchPlan) -> Parts:
    """Parts of a task's data: the reported one is what the task measures, the others are of the training records.

    Args:
        task: Its records are reported on.
        train: Training records; those with a question that is reported on are left out.
        plan: For the number of scored records and the seed.

    Raises:
        UserError: There are too few training records.
    """
    reported = {record.prompt_id for record in task.records}
    known: dict[str, tuple[Demonstration, str]] = {}
    for record in train:
        reference = task.rules.reference(record.answer)
        if reference is not None and record.prompt_id not in reported:
            known.setdefault(record.prompt_id, (record, reference))
    rows = sorted(known.values(), key=lambda row: row[0].prompt_id)
    random.Random(f"{plan.seed}:parts").shuffle(rows)
    shown = min(len(rows) // 2, 4 * PAIRS)
    if shown < 1:
        raise UserError(
            f"prompt-search: {task.data.path} has {len(rows):,} training records that are not reported on, too few",
            "Instructions are proposed from some records, scored on others, and reported on a third part.",
            "Make a train and an eval split with `rlhf data split`.",
        )
    scored = rows[shown:][: plan.records]
    part = replace(task, records=[record for record, _ in scored], references=[right for _, right in scored])
    return Parts([record for record, _ in rows[:shown]], part, task)


class PromptSearch:
    """A search in its folder.

    Args:
        out: The folder; an unfinished search in it continues.
        facts: What is searched for, and by what: a search of other facts is refused.
        plan: How long and how wide.
        parts: The data.
        way: The way of prompting that gets the instruction, with its values as a file has them.
        measure: (task, way) -> the first metric of the task.
        proposer: Opens whatever writes the instructions of a round with the round's seed.
    """

    def __init__(
        self, out: Path, facts: dict[str, Any], plan: SearchPlan, parts: Parts, way: tuple[Prompting, dict[str, Any]],
        measure: Callable[[Task, Prompting], MetricValue], proposer: Callable[[int], AbstractContextManager[Proposer]],
    ) -> None:  # fmt: skip
        self.out, self.facts, self.plan, self.parts = out, facts, plan, parts
        (self.way, self.values), self._measure, self._proposer = way, measure, proposer
        self.scored: dict[str, dict[str, Any]] = {}
        """Normalised instruction -> its line in candidates.jsonl."""

    def run(self) -> dict[str, Any]:
        """Search, or go on with a search, and report.

        Raises:
            UserError: The folder holds another search, or something else.
        """
        self._open()
        self._score([{"instruction": self.way.wording.instruction, "round": -1, "from": "given"}])
        for number in range(self.plan.rounds + 1):
            self._score(self._round(number))
            best = self.best(1)[0]
            say(f"round {number}: {len(self.scored):,} instructions, the best {best['score']:.4g}: {_brief(best)}")
        return self._report()

    def best(self, count: int) -> list[dict[str, Any]]:
        """The best scored instructions; of equal ones the earliest."""
        return sorted(self.scored.values(), key=lambda row: -row["score"])[:count]

    # ---- the folder --------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        file = self.out / "search.json"
        if self.out.exists() and not file.is_file() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out}: exists and is not a search", remedy="Name another folder.")
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, self.facts)
        found = json.loads(file.read_text("utf-8"))
        wanted = json.loads(json.dumps(self.facts))
        if found != wanted:
            changed = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
            raise UserError(
                f"--out {self.out}: holds another search",
                "; ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} here" for key in changed),
                "Give the same options to go on with it, add --overwrite, or name another folder.",
            )
        for row in self._lines():
            self.scored[normalised(row["instruction"])] = row

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of candidates.jsonl; half a line at its end, of a process that was killed, is removed."""
        file = self.out / "candidates.jsonl"
        text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(file, whole)
        return [json.loads(line) for line in whole.splitlines()]

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> list[dict[str, Any]]:
        """The instructions of a round, written by the model or read from the folder."""
        file = self.out / f"round-{number}.json"
        if not file.is_file():
            write_json(file, self._propose(number))
        found: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
        return [row for row in found if row["instruction"]]

    def _propose(self, number: int) -> list[dict[str, Any]]:
        plan, each = self.plan, 1
        with self._proposer(stream_seed(plan.seed, 1, number)) as proposer:
            if number == 0:
                draw, requests, origins = random.Random(f"{plan.seed}:pairs"), [], ["examples"] * plan.candidates
                for _ in origins:
                    records = draw.sample(self.parts.shown, min(PAIRS, len(self.parts.shown)))
                    rules = self.parts.scored.rules
                    pairs = [(r.messages[-1].content, rules.reference(r.answer) or r.answer) for r in records]
                    requests.append(from_examples(pairs, proposer.fits))
            else:
                origins = [row["instruction"] for row in self.best(plan.keep) if row["instruction"]]
                each = -(-plan.candidates // max(1, len(origins)))
                requests = [reword(instruction) for instruction in origins]
            texts = proposer.write(requests, each)
        return [
            {"instruction": instruction_in(text), "round": number, "from": origin, "text": text}
            for origin, several in zip(origins, texts) for text in several
        ]  # fmt: skip

    def _score(self, rows: Sequence[dict[str, Any]]) -> None:
        """Score the instructions that are new, each written to the folder at once."""
        for row in rows:
            key = normalised(row["instruction"])
            if key in self.scored:
                continue
            found = self._measure(self.parts.scored, self._with(row["instruction"]))
            line = {
                "instruction": row["instruction"], "round": row["round"], "from": row["from"], "metric": found.metric,
                "score": found.value, "low": found.low, "high": found.high, "records": found.n,
            }  # fmt: skip
            append_jsonl(self.out / "candidates.jsonl", [line])
            self.scored[key] = line

    def _with(self, instruction: str) -> Prompting:
        return replace(self.way, wording=replace(self.way.wording, instruction=instruction))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        file = self.out / "result.json"
        if not file.is_file():
            winner, given = self.best(1)[0], self.way.wording.instruction
            values = {**self.values, "instruction": winner["instruction"]}
            about = f"# rlhf prompt-search: {winner['metric']} {winner['score']:.4g} on the records it was chosen by\n"
            write_text(self.out / "winner.yaml", about + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            reports = [self._measure(self.parts.reported, self._with(text)) for text in (winner["instruction"], given)]
            write_json(file, {
                "winner": winner, "best": self.best(10), "candidates": len(self.scored),
                "report": {"records": len(self.parts.reported.records), "winner": reports[0].as_dict(),
                           "without_search": reports[1].as_dict()},
                "file": str(self.out / "winner.yaml"),
            })  # fmt: skip
        return json.loads(file.read_text("utf-8"))


def _brief(row: dict[str, Any]) -> str:
    text = str(row["instruction"]) or "(no instruction)"
    return text if len(text) <= 100 else text[:97] + "..."
