"""`rlhf data distill`: a teacher's answers to prompts, as demonstrations to learn from or candidates to rank.

prompts -> n replies of the teacher to each, with or without a chain-of-thought cue -> replies cached on disk
-> cut-off, empty, refusing and repeating ones rejected -> a dataset of demonstrations or proposals
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_tools.annotate.candidates import fault
from data_tools.io.derive import Derivation
from data_tools.io.rejects import print_reasons
from rlhf.cli import options
from rlhf.cli.sampling_options import SamplingOptions, with_options, with_sampling
from rlhf.cli.teacher_options import AskingOptions, Cache, ServerOptions, TeacherName, open_teacher
from rlhf.core.console import print_json, say
from rlhf.core.errors import UserError
from rlhf.data.jsonl import Reject, to_dict
from rlhf.data.schema import MODEL_AUTHOR, BadRecord, Candidate, Demonstration, Message, Prompt, Proposal
from rlhf.data.selection import chosen_records, distinct, with_system
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new
from rlhf.inference.teacher import Teacher
from rlhf.servers.replies import Failure, Reply
from rlhf.tasks.answers import AnswerPattern, answer_pattern, normalised

Kind = Literal["demonstrations", "candidates"]


@with_sampling
@with_options("server", ServerOptions)
@with_options("asking", AskingOptions)
def command(
    prompts: Path,
    *,
    teacher: TeacherName,
    out: Path,
    become: Annotated[Kind, typer.Option("--as")] = "demonstrations",
    split: str | None = None,
    count: options.PositiveOrNone = None,
    cache: Cache = None,
    overwrite: options.ReplaceDataset = False,
    as_json: options.Json = False,
    asking: AskingOptions,
    sampling: SamplingOptions,
    server: ServerOptions,
) -> None:
    """Write a teacher's answers to prompts as demonstrations, or as candidates for ranking.

    A killed command continues when it is repeated: replies are cached on disk, and none is paid for twice.

    Args:
        prompts (DATASET): A dataset of any kind; its prompts are answered.
        out: Output dataset.
        become: Demonstrations for SFT, or candidates for ranking.
        split: train, eval or test; all by default.
        count: Number of prompts, from the first on; all by default.
    """
    n, cue = asking.n or (4 if become == "candidates" else 1), asking.cue if asking.rationales else None
    found = answer_pattern(asking.pattern or ("the-answer-is" if asking.rationales else None))
    data = open_dataset(prompts)
    _check(data, become, n, asking.check, found)
    check_new(out, overwrite)
    with open_teacher(teacher, sampling, server, cache or Path(f"{out}.replies")) as opened:
        kind = "demonstration" if become == "demonstrations" else "proposal"
        facts: dict[str, Any] = {"teacher": opened.facts(), "answers": n}
        facts |= {"cue": cue} if cue else {}
        with Derivation(out, kind, [data], facts, overwrite=overwrite) as made:
            made.origin["parents"] += opened.parents()
            chosen = distinct(data.records() if split is None else chosen_records(data, split), count)
            asked = [_asked(one, cue, asking.system) for one in chosen]
            writer = _Writer(made, data, opened.name, found, asking.check, become)
            for record, question, replies in zip(chosen, asked, opened.answers(asked, n)):
                writer.add(record, question, replies)
            for reject in data.rejects:
                made.rejects(reject)
            if not made.count:
                remedy = "Try a few prompts with --count 5, and another teacher, --pattern or --max-new-tokens."
                raise UserError(f"{out}: not made: the teacher gave no usable answer", made.rejects.in_words(), remedy)
            tokens = _tokens(opened)
            made.origin["tokens"] = tokens
        summary = {"out": str(out), "written": made.count, "rejected": made.rejects.count}
        summary |= {"reasons": made.rejects.reasons, "tokens": tokens, "usage": opened.usage.as_dict()}
        if prices := server.given().keys() & {"price_input", "price_output"}:
            config = server.config(teacher)
            summary["cost"] = config.cost(opened.usage.prompt_tokens, opened.usage.completion_tokens)
            summary["cost_in_all"] = config.cost(tokens["prompt"], tokens["completion"])
    _show(summary, made, bool(prices))
    if as_json:
        print_json(summary)


def _check(data: Dataset, become: Kind, n: int, check: bool, pattern: AnswerPattern | None) -> None:
    """Refuse what can be refused before the teacher is asked."""
    if become == "candidates" and n < 2:
        raise UserError("--as candidates: needs at least two answers per prompt", remedy="Give --n 4.")
    if check and data.kind != "demonstration":
        raise UserError(
            f"--check: compares with the answers of demonstrations, and {data.path} contains {data.kind}s",
            remedy="Leave out --check, or name a dataset of demonstrations.",
        )
    if check and pattern is None:
        raise UserError(
            "--check: needs a pattern that finds the answer in a text", remedy="Give --pattern, or --rationales."
        )


def _asked(record: Any, cue: str | None, system: str | None) -> Prompt:
    """The prompt as the teacher reads it. The cue is not part of the record."""
    messages = record.messages
    if cue is not None:
        messages = (*messages[:-1], Message("user", f"{messages[-1].content}\n\n{cue}"))
    return with_system(Prompt(messages, record.source, record.group, record.split), system)


@dataclass(frozen=True)
class _Writer:
    """Turns the replies to a prompt into records and rejects."""

    made: Derivation
    data: Dataset
    name: str
    pattern: AnswerPattern | None
    check: bool
    become: Kind

    def add(self, record: Any, asked: Prompt, replies: list[Reply | Failure]) -> None:
        texts: list[str] = []
        for reply in replies:
            text, bad = "" if isinstance(reply, Failure) else reply.text, self._fault(record, asked, reply, texts)
            if bad is None:
                texts.append(text.strip())
            else:
                self._reject(record, bad, text)
        about = (record.messages, record.source, record.group, record.split)
        if self.become == "demonstrations":
            for text in texts:
                self.made.write(Demonstration(*about, answer=text, author=MODEL_AUTHOR + self.name))
        elif len(texts) > 1:
            self.made.write(Proposal(*about, tuple(Candidate(text, self.name, "model") for text in texts)))
        elif texts:
            self._reject(record, BadRecord("only one answer is left to rank", remedy="Raise --n."), texts[0])

    def _fault(self, record: Any, asked: Prompt, reply: Reply | Failure, earlier: list[str]) -> BadRecord | None:
        if isinstance(reply, Failure):
            return BadRecord(
                reply.reason, reply.detail, "Start the command again with --overwrite; it asks only for these."
            )
        bad = fault(reply.text, reply.finish_reason, reply.refusal, asked.messages[-1].content, earlier)
        if bad is not None or self.pattern is None:
            return bad
        given = self.pattern(reply.text)
        if given is None:
            return BadRecord(
                "no answer is found in the text", f"pattern {self.pattern.pattern}", "Change --pattern or --cue."
            )
        if self.check:
            right = self.pattern(record.answer) or record.answer
            if normalised(given, "number") != normalised(right, "number"):
                return BadRecord("another answer than the demonstration's", f"{given!r}, not {right!r}", "Raise --n.")
        return None

    def _reject(self, record: Any, bad: BadRecord, text: str) -> None:
        """Reject a reply, with its prompt's position in the dataset."""
        raw = json.dumps({**to_dict(record), "reply": text}, ensure_ascii=False)
        file, line = record.read_at or (self.data.path, 0)
        self.made.rejects(Reject.of(file, line, bad, raw))


def _tokens(teacher: Teacher) -> dict[str, int]:
    """Tokens of all replies, cached or new, so that a resumed command writes the same manifest."""
    usage = teacher.usage
    return {
        "prompt": usage.prompt_tokens + usage.cached_prompt_tokens,
        "completion": usage.completion_tokens + usage.cached_completion_tokens,
    }


def _show(summary: dict[str, Any], made: Derivation, priced: bool) -> None:
    """Print the rejects, the tokens and the cost."""
    print_reasons(made.rejects.reasons, made.rejects.first)
    usage, tokens = summary["usage"], summary["tokens"]
    say(
        f"{usage['requests']:,} new replies, {usage['cached']:,} from the cache, {usage['retries']:,} retries; "
        f"{tokens['prompt']:,} prompt tokens, {tokens['completion']:,} completion tokens"
        + (f", {usage['uncounted']:,} replies without counts" if usage["uncounted"] else "")
    )
    if priced:
        say(f"cost {summary['cost']:.4g} now, {summary['cost_in_all']:.4g} with the replies from the cache")
    say(f"distilled {summary['written']:,} records -> {summary['out']}; rejected {summary['rejected']:,} replies")
