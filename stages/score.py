"""`rlhf score`: a reward model's scores of answers, to read or as JSON lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf.cli import options
from rlhf.core.console import format_number, print_json, printable, say, table, warn
from rlhf.core.errors import UserError
from rlhf.core.files import check_writable
from rlhf.data.schema import Demonstration, Prompt, Proposal, Ranking
from rlhf.data.selection import as_prompt, chosen_records, with_system
from rlhf.data.store import open_dataset

if TYPE_CHECKING:  # imports torch
    from rlhf.inference.reward_model import EnsembleScorer

RECORDS_AT_ONCE = 1_000
Group = tuple[Prompt, list[dict[str, Any]]]
"""A prompt, and a row with `answer` (in a ranking also its `rank`) for each of its answers."""


def command(
    context: typer.Context,
    model: str,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p")] = None,
    answer: Annotated[list[str] | None, typer.Option("--answer", "-a")] = None,
    dataset: Path | None = None,
    split: options.Split = None,
    limit: options.Limit = None,
    system: options.System = None,
    output: options.Out = None,
    as_json: options.JsonLines = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Score answers with a reward model or an ensemble of them, as PPO does.

    Args:
        model (RUN|MODEL|{...}): A reward model, or '{name: ensemble, models: [RUN, RUN]}'.
        prompt: A user message.
        answer: An answer to it; may be repeated.
        dataset: Score the answers of demonstrations, proposals or rankings.
        output: Also write the scores to this JSON-lines file.
        as_json: Print only JSON lines, one per answer.
    """
    check_writable(output, "--out")
    groups = _groups(context, prompt, answer, dataset, split, limit)
    from rlhf.inference.reward_model import open_ensemble  # imports torch

    reward = open_ensemble(model, trust_remote_code)
    scored: list[dict[str, Any]] = []
    while chunk := [(with_system(one, system), rows) for one, rows in islice(groups, RECORDS_AT_ONCE)]:
        for row in _scored(reward, chunk):
            scored.append(row)
            if as_json:
                print_json(row)
            elif dataset is None:
                spread = f" +- {format_number(row['disagreement'])}" if row.get("disagreement") is not None else ""
                say(f"{format_number(row['score']):>10}{spread}  {printable(row['answer'])}")
    if output is not None:
        options.write_rows(output, scored)
        if not as_json:
            say(f"Scores: {output}")
    scores = [row["score"] for row in scored if row["score"] is not None]
    spreads = [row["disagreement"] for row in scored if row.get("disagreement") is not None]
    if skipped := len(scored) - len(scores):
        warn(f"{skipped:,} answers do not fit in the {reward.limit:,} tokens of {model}, or are refused: no score")
    if not as_json and dataset is not None and scores:
        spread = statistics.pstdev(scores)
        columns = ["answers", "mean", "standard deviation", "lowest", "highest"]
        row = [len(scores), statistics.fmean(scores), spread, min(scores), max(scores)]
        if spreads:
            columns, row = [*columns, "disagreement"], [*row, statistics.fmean(spreads)]
        table(f"Scores of {model}", columns, [row])


def _groups(
    context: typer.Context, prompt: str | None, answers: list[str] | None, dataset: Path | None, split: str | None,
    limit: int | None,
) -> Iterator[Group]:  # fmt: skip
    """The answers to score; options are checked before the first group.

    Raises:
        UserError: Neither --dataset nor --prompt with --answer, both, or a dataset without answers.
    """
    if (prompt is None) == (dataset is None) or (prompt is None) != (not answers):
        raise UserError("no answers to score", remedy="Give --dataset, or --prompt and at least one --answer.")
    if dataset is None:
        options.refuse_given(context, ["split", "limit"], "is for --dataset")
        return iter([(as_prompt(prompt or ""), [{"answer": answer} for answer in answers or ()])])
    data = open_dataset(dataset)
    if data.kind == "prompt":
        raise UserError(f"{dataset}: holds prompts without answers", remedy="Use `rlhf sample --reward` to write some.")
    return ((record, list(_answers(record))) for record in chosen_records(data, split, limit))


def _answers(record: Prompt) -> Iterator[dict[str, Any]]:
    if isinstance(record, Demonstration):
        yield {"answer": record.answer}
    if isinstance(record, Proposal):
        for index, candidate in enumerate(record.candidates):
            rank = {"rank": record.ranks[index]} if isinstance(record, Ranking) else {}
            yield {"answer": candidate.text, **rank}


def _scored(reward: EnsembleScorer, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    pairs = [(prompt, row) for prompt, rows in groups for row in rows]
    found = reward.score_answers([prompt for prompt, _ in pairs], [row["answer"] for _, row in pairs])
    for (prompt, row), one in zip(pairs, found):
        yield {"prompt_id": prompt.prompt_id, "messages": prompt.chat, **row, **one}
