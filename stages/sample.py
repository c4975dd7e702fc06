"""`rlhf sample`: answers to prompts, to read or as JSON lines; with a reward, the best of n."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.rule import Rule
from rich.text import Text

from rlhf.cli import options
from rlhf.core.console import format_number, out, printable, say
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord, Message, Prompt
from rlhf.data.selection import chosen_prompts, with_system
from rlhf.data.store import open_dataset
from rlhf.inference.policy import open_policy, sampling_for
from rlhf.inference.sampling import Sampled, sample
from rlhf.inference.scorer import Scorer, open_scorer


def command(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a model folder, or a hub name.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A user message; may be repeated.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="Answer the prompts of this dataset.")] = None,
    split: options.Split = None,
    limit: options.Limit = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Answers to each prompt.")] = 1,
    reward: options.Reward = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    system: options.System = None,
    chat_template: options.ChatTemplate = "auto",
    output: Annotated[Path | None, typer.Option("--out", help="Also write the answers as JSON lines here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one an answer, and nothing else.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Print a model's answers to prompts. With --reward, answers are scored, and of several the best is shown."""
    options.check_writable(output, "--out")
    prompts = [with_system(found, system) for found in _prompts(prompt, dataset, split, limit)]
    sampling = sampling_for(
        model, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens, stop=stop,
    )  # fmt: skip
    policy = open_policy(model, chat_template, trust_remote_code)
    scorer = open_scorer(reward, policy) if reward else None
    room = policy.room(sampling, scorer.limit if scorer else None)
    started, tokens, lines = time.monotonic(), 0, []
    for answers in sample(policy, prompts, sampling, seed, n, room):
        rows = [_row(answer, index) for index, answer in enumerate(answers)]
        if scorer is not None:
            _add_scores(rows, answers, scorer)
        tokens += sum(row["tokens"] for row in rows)
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
        for row in rows if as_json else ():
            options.print_json(row)
        if not as_json:
            _show(answers[0].prompt, rows)
    if output is not None:
        options.write_whole(output, "".join(line + "\n" for line in lines))
    if not as_json:
        seconds = time.monotonic() - started
        say(f"{len(lines):,} answers, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s", style="dim")


def _prompts(texts: list[str] | None, dataset: Path | None, split: str | None, limit: int | None) -> list[Prompt]:
    if bool(texts) == (dataset is not None):
        raise UserError("give prompts", "One of --prompt and --dataset is needed, not both.")
    if dataset is not None:
        return chosen_prompts(open_dataset(dataset), split, limit)
    try:
        return [Prompt((Message("user", text),)) for text in texts or ()]
    except BadRecord as fault:
        raise UserError(f"--prompt: {fault}") from None


def _row(answer: Sampled, index: int) -> dict[str, Any]:
    row = {"prompt_id": answer.prompt.prompt_id, "messages": answer.prompt.chat, "sample": index}
    return row | {"answer": answer.text, "ended": answer.answer.ended, "tokens": len(answer.answer.ids)}


def _add_scores(rows: list[dict[str, Any]], answers: list[Sampled], scorer: Scorer) -> None:
    scores = scorer(answers)
    best = scores.index(max(scores))
    for index, (row, score) in enumerate(zip(rows, scores)):
        row |= {"score": score, "best": index == best}


def _show(prompt: Prompt, rows: list[dict[str, Any]]) -> None:
    """The prompt and its answers, or the best of them where there are scores."""
    console = out()
    console.print(Rule(style="dim"))
    for message in prompt.messages:
        console.print(Text(f"{message.role}: ", "bold cyan"), end="")
        console.print(printable(message.content), markup=False)
    scored = [row["score"] for row in rows if "score" in row]
    for row in rows if len(scored) < 2 else (row for row in rows if row["best"]):
        console.print(Text("answer: ", "bold green"), end="")
        console.print(printable(row["answer"].strip()), markup=False)
        console.print(Text(" · ".join(_facts(row, scored)), "dim"))


def _facts(row: dict[str, Any], scores: list[float]) -> Iterator[str]:
    yield f"{row['tokens']} tokens" + ("" if row["ended"] else ", cut off")
    if scores:
        yield f"score {format_number(row['score'])}"
    if len(scores) > 1:
        yield f"best of {len(scores)}, whose mean is {format_number(sum(scores) / len(scores))}"
