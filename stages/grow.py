"""`rlhf data grow`: new instructions with answers, from seed tasks, written by a teacher (Self-Instruct, Alpaca).

seed tasks -> requests with examples of both kinds -> tasks in the replies -> unusable ones and duplicates rejected
-> the others added to the pool, from which later requests take examples -> a dataset of demonstrations
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from data_tools.growth.novelty import Novelty
from data_tools.growth.tasks import GrownTask, Kind, fault, parse, request
from data_tools.io.derive import Derivation
from data_tools.io.rejects import print_reasons
from rlhf.cli import options
from rlhf.cli.sampling_options import SamplingOptions, with_options, with_sampling
from rlhf.cli.teacher_options import Cache, ServerOptions, TeacherName, open_teacher
from rlhf.core.console import print_json, say, warn
from rlhf.core.errors import UserError
from rlhf.data.jsonl import Reject
from rlhf.data.schema import MODEL_AUTHOR, BadRecord, Demonstration, Message, Prompt
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new
from rlhf.inference.teacher import Teacher
from rlhf.servers.replies import Failure, Reply

ROUND = 8
"""Requests per state of the pool. The number is fixed, so that a result does not depend on speed."""
GROWN = 4
"""One in this many examples is a grown task, once there are some (Self-Instruct: 2 of 8)."""


@with_sampling
@with_options("server", ServerOptions)
def command(
    seeds: Path,
    *,
    teacher: TeacherName,
    out: Path,
    count: options.Positive,
    examples: options.Positive = 6,
    per_request: options.Positive = 10,
    max_requests: options.PositiveOrNone = None,
    similar: Annotated[float, typer.Option(min=0.01, max=1)] = 0.7,
    classification: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    cache: Cache = None,
    overwrite: options.ReplaceDataset = False,
    as_json: options.Json = False,
    sampling: SamplingOptions,
    server: ServerOptions,
) -> None:
    """Grow new instructions with answers from seed tasks. Rejected ones are in OUT/rejected.jsonl with the reason.

    A killed command continues when it is repeated: replies are cached on disk, and none is paid for twice.

    Args:
        seeds (DATASET): Demonstrations: the seed tasks, 100 or more.
        out: Output dataset, of the new tasks only.
        count: Number of new tasks.
        examples: Example tasks per request.
        per_request: New tasks asked for per request.
        max_requests: Most requests; by default ten times what --count needs.
        similar: Reject an instruction whose ROUGE-L to another is at least this.
        classification (SHARE): Share of classification tasks; not limited by default.
    """
    data = open_dataset(seeds, "demonstration")
    check_new(out, overwrite)
    known = [task_of(record) for record in data.records()]
    most = max_requests or 10 * -(-count // per_request)
    with open_teacher(teacher, sampling, server, cache or Path(f"{out}.replies")) as opened:
        facts = {"teacher": opened.facts(), "examples": examples, "per_request": per_request, "similar": similar}
        with Derivation(out, "demonstration", [data], facts, overwrite=overwrite) as made:
            made.origin["parents"] += opened.parents()
            pool = Pool(known, count, classification, Novelty(similar), sampling.seed)
            asked = grow(pool, opened, made, data, examples, per_request, most)
            if not pool.grown:
                remedy = "Ask a stronger teacher, one that follows instructions, or raise --max-new-tokens."
                raise UserError(f"{out}: not made: no task of the teacher is usable", made.rejects.in_words(), remedy)
            kinds = dict(Counter(task.kind for task in pool.grown))
            made.origin |= {"requests": asked, "kinds": kinds}
        summary = {"out": str(out), "written": made.count, "rejected": made.rejects.count, "kinds": kinds}
        summary |= {"reasons": made.rejects.reasons, "requests": asked, "usage": opened.usage.as_dict()}
    print_reasons(made.rejects.reasons, made.rejects.first)
    if made.count < count:
        warn(f"{asked:,} requests gave {made.count:,} of {count:,} tasks; raise --max-requests, or see rejected.jsonl")
    say(f"grown {made.count:,} tasks -> {out} (demonstrations); rejected {made.rejects.count:,}; {kinds}")
    if as_json:
        print_json(summary)


def task_of(record: Demonstration) -> GrownTask:
    """A seed: the last user message up to the first empty line is the instruction, the rest its input."""
    instruction, _, given = record.messages[-1].content.partition("\n\n")
    return GrownTask(" ".join(instruction.split()), given.strip(), record.answer.strip())


class Pool:
    """The seed tasks and those that have grown.

    Args:
        seeds: The seed tasks.
        count: Most grown tasks.
        classification: The share of classification tasks among them; None for any.
        novelty: Compares instructions; the seeds are added to it.
        seed: Seed of the choice of examples.
    """

    def __init__(
        self, seeds: list[GrownTask], count: int, classification: float | None, novelty: Novelty, seed: int
    ) -> None:
        self.seeds, self.grown, self.count, self._novelty = seeds, list[GrownTask](), count, novelty
        self._seed, self._most = seed, dict[Kind, int](classification=count, generation=count)
        if classification is not None:
            share = round(classification * count)
            self._most = {"classification": share, "generation": count - share}
        for task in seeds:
            novelty.add(task.instruction)

    @property
    def full(self) -> bool:
        return len(self.grown) >= self.count

    def choose(self, examples: int, number: int) -> list[GrownTask]:
        """Examples for a request, of both kinds in turn, of which one in four has grown."""
        chance = random.Random(f"{self._seed} {number}")
        grown = min(len(self.grown), examples // GROWN)
        chosen = chance.sample(self.grown, grown)
        rest = [task for task in self.seeds if task not in chosen]
        for kind in ("classification", "generation") * examples:
            same = [task for task in rest if task.kind == kind] or rest
            if len(chosen) < examples and same:
                chosen.append(chance.choice(same))
                rest.remove(chosen[-1])
        chance.shuffle(chosen)
        return chosen

    def add(self, task: GrownTask) -> BadRecord | None:
        """Add a task, or return why it is rejected."""
        bad = fault(task)
        if bad is not None:
            return bad
        if sum(other.kind == task.kind for other in self.grown) >= self._most[task.kind]:
            return BadRecord(f"there are enough {task.kind} tasks", remedy="Change --classification.")
        near = self._novelty.closest(task.instruction)
        if near is not None:
            detail = f"ROUGE-L {near[0]:.2f} to {near[1][:80]!r}"
            return BadRecord("the instruction is too similar to another", detail, "Raise --similar or --temperature.")
        self._novelty.add(task.instruction)
        self.grown.append(task)
        return None


def grow(
    pool: Pool, teacher: Teacher, made: Derivation, data: Dataset, examples: int, per_request: int, most: int
) -> int:
    """Ask for tasks until the pool is full or `most` requests are made; gives the number of requests."""
    asked = 0
    while not pool.full and asked < most:
        numbers = range(asked, min(asked + ROUND, most))
        texts = [request(pool.choose(examples, number), per_request) for number in numbers]
        prompts = [Prompt((Message("user", text),)) for text in texts]
        for number, (reply,) in zip(numbers, teacher.answers(prompts)):
            asked = number + 1
            for task, unread in _tasks(reply):
                if pool.full:
                    break
                bad = unread or pool.add(task)
                if bad is not None:
                    raw = json.dumps(asdict(task), ensure_ascii=False)
                    made.rejects(Reject.of(Path(f"{data.path}, request"), number + 1, bad, raw))
                else:
                    message = (Message("user", task.prompt),)
                    author = MODEL_AUTHOR + teacher.name
                    made.write(Demonstration(message, "grown", task.kind, None, answer=task.output, author=author))
    return asked


def _tasks(reply: Reply | Failure) -> Iterator[tuple[GrownTask, BadRecord | None]]:
    """The tasks in a reply; one with a fault if there are none."""
    if isinstance(reply, Failure):
        yield GrownTask("", "", ""), BadRecord(reply.reason, reply.detail, "Start the command again with --overwrite.")
        return
    found = parse(reply.text, reply.finish_reason == "length")
    for task in found:
        yield task, None
    if not found:
        yield (
            GrownTask("", "", reply.text),
            BadRecord("the reply has no complete task", remedy="Raise --max-new-tokens."),
        )
