"""`rlhf sample`: answers to prompts, to read or as JSON lines; with a reward, the best of n."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.rule import Rule
from rich.text import Text

from rlhf.cli import options, task_options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.core.command_line import command_line
from rlhf.core.console import format_number, out, print_json, say, table
from rlhf.core.errors import UserError, blame
from rlhf.core.files import check_writable
from rlhf.data.schema import MODEL_AUTHOR, Demonstration, Message, Prompt
from rlhf.data.selection import chosen_prompts, train_demonstrations, with_system
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter, check_new
from rlhf.prompting.ways import check_way, read_prompting

if TYPE_CHECKING:  # imports torch
    from rlhf.inference.best_of import BestOf
    from rlhf.inference.sampling import Sampled
    from rlhf.inference.scorer import CompletionScorer
    from rlhf.inference.task_adapters import TaskAdapters


ROUTES = ("group", "source")
"""Fields of a record that may name its task."""


@with_sampling
def command(
    context: typer.Context,
    model: options.Model,
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p")] = None,
    dataset: Path | None = None,
    split: options.Split = None,
    limit: options.Limit = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1)] = 1,
    best_of: Annotated[int | None, typer.Option(min=2)] = None,
    demonstrations: Path | None = None,
    curve: Path | None = None,
    with_: Annotated[list[str] | None, typer.Option("--with")] = None,
    reward: options.Reward = None,
    system: options.System = None,
    prompting: str | None = None,
    labels: task_options.Labels = None,
    pattern: task_options.Pattern = None,
    adapter: list[str] | None = None,
    route: str | None = None,
    output: options.Out = None,
    as_json: options.JsonLines = False,
    sampling: SamplingOptions,
) -> None:
    """Print a model's answers to prompts. With --reward, answers are scored, and only the best is shown.

    Args:
        prompt: A user message; may be repeated.
        dataset: Answer the prompts of this dataset.
        n: Number of answers to each prompt.
        best_of: Keep the best of this many answers by --reward, and print the best-of-n curve.
        demonstrations (DATASET): With --best-of: also write the best answers as demonstrations for SFT.
        curve (FILE): With --best-of: draw its curve to this .svg or .png file; or write it to a .json file, which `rlhf
            report` draws if it is in a PPO run's folder.
        with_ (RUN): With --curve: also draw a PPO run with the same reward; may be repeated.
        prompting (WAY|FILE|{...}): How prompts are made: few-shot, cloze, chain-of-thought, a YAML file, or '{name:
            few-shot, shots: 8}'.
        adapter (TASK=RUN): Answer a task's prompts with this adapter on MODEL; may be repeated.
        route (FIELD): The field that names the task: group or source.
        output: Also write the answers to this JSON-lines file.
        as_json: Print only JSON lines, one per answer.
    """
    check_writable(output, "--out")
    if dataset is None:
        options.refuse_given(context, ["split", "limit"], "is for --dataset")
    n = _answers(n, best_of, reward, demonstrations)
    tell = (lambda *_: None) if as_json else say
    compared = _compared(curve, best_of, with_)
    prompts = [with_system(found, system) for found in _prompts(prompt, dataset, split, limit)]
    paths = adapter_paths(adapter, route)
    if prompting or labels or pattern:
        if paths:
            raise UserError("--adapter and --prompting cannot be combined", remedy="Leave one of them out.")
        _sample_prompted(model, prompts, prompting, labels, pattern, dataset, (n, reward), sampling, output, as_json)
        return
    params, policy = sampling.params(model), sampling.open(model)
    from rlhf.inference.sampling import accepted, sample  # imports torch
    from rlhf.inference.scorer import open_scorer
    from rlhf.inference.task_adapters import TaskAdapters

    routed = None
    if paths:
        routed = TaskAdapters(policy, paths)
        prompts, policy = routed.route(prompts, route), routed.routed_policy
    scorer = open_scorer(reward, policy) if reward else None
    prompts = accepted(policy, prompts, scorer.own_chats if scorer else ())
    prompt_limit = policy.prompt_limit(params, scorer.limit if scorer else None)
    started, tokens = time.monotonic(), 0
    kept: list[dict[str, Any]] = []
    scores: list[list[float]] = []
    for samples in sample(policy, prompts, params, sampling.seed, n, prompt_limit, routed):
        rows = _rows(samples, scorer, routed)
        tokens += sum(row["tokens"] for row in rows)
        if not as_json:
            _show(rows)
        if best_of:
            scores.append([row["score"] for row in rows])
            rows = [row for row in rows if row["best"]]
        kept += rows
        for row in rows if as_json else ():
            print_json(row)
    if output is not None:
        options.write_rows(output, kept)
        tell(f"Answers: {output}")
    seconds = time.monotonic() - started
    tell(f"{len(prompts) * n:,} answers, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s", "dim")
    if demonstrations is not None:
        count = _write_demonstrations(demonstrations, prompts, kept, model)
        tell(f"{demonstrations}: {count:,} demonstrations")
    if best_of:
        from rlhf.inference.best_of import best_of_curve, draw_curve, write_curve  # imports numpy

        points = best_of_curve(scores)
        if not as_json:
            _show_curve(points, len(scores))
        if curve is not None:
            if curve.suffix == ".json":
                facts = {"policy": model, "reward": reward, "prompts": len(scores), "seed": sampling.seed}
                write_curve(curve, points, facts | {"sampling": asdict(params)})
            else:
                draw_curve(curve, points, compared)
            tell(f"Curve: {curve}")


def _answers(n: int, best_of: int | None, reward: str | None, demonstrations: Path | None) -> int:
    """The number of answers to each prompt.

    Raises:
        UserError: Options are missing, or exclude each other.
    """
    if best_of is None:
        if demonstrations is not None:
            raise UserError(
                "--demonstrations: needs the best of several answers", remedy="Give --best-of N and --reward RUN too."
            )
        return n
    if n != 1:
        raise UserError("--n and --best-of cannot be combined", remedy="Leave --n out.")
    if reward is None:
        raise UserError("--best-of: needs a reward", remedy="Give --reward RUN or module:function.")
    if demonstrations is not None:
        check_new(demonstrations, False, "Name another one for --demonstrations, or delete this one.")
    return best_of


def _compared(curve: Path | None, best_of: int | None, runs: list[str] | None) -> dict[str, list[tuple[float, float]]]:
    """The evaluations of the runs that are drawn with the curve.

    Raises:
        UserError: Options are missing, a file cannot be written, or a run has no evaluations.
    """
    if curve is None and runs:
        raise UserError("--with: needs a plot", remedy="Give --curve FILE.svg too.")
    if curve is None:
        return {}
    if best_of is None:
        raise UserError("--curve: needs the scores of several answers", remedy="Give --best-of N and --reward RUN too.")
    if curve.suffix not in (".svg", ".png", ".json"):
        raise UserError(f"--curve {curve}: is neither an .svg nor a .png nor a .json file")
    if curve.suffix == ".json" and runs:
        raise UserError("--with: needs a plot", remedy="Give --curve FILE.svg, or leave --with out.")
    check_writable(curve, "--curve")
    from rlhf.inference.best_of import evaluations_of  # imports numpy

    return {run: evaluations_of(run) for run in runs or ()}


def _write_demonstrations(path: Path, prompts: list[Prompt], best: list[dict[str, Any]], model: str) -> int:
    """Write the best answers, without empty ones, as a dataset for another round of SFT; returns their number."""
    by_prompt = {prompt.prompt_id: prompt for prompt in prompts}
    with DatasetWriter(path, "demonstration", {"command": command_line(), "policy": model}) as writer:
        for row in best:
            if row["answer"].strip():
                prompt = by_prompt[row["prompt_id"]]
                about, author = (prompt.messages, prompt.source, prompt.group, prompt.split), MODEL_AUTHOR + model
                writer.write(Demonstration(*about, answer=row["answer"].strip(), author=author))
        return writer.count


def _show_curve(points: Sequence[BestOf], prompts: int) -> None:
    rows = [(point.n, point.kl, point.score, point.low, point.high) for point in points]
    title = f"Score of the best of n answers, mean over {prompts:,} prompts; KL in nats, as a PPO run's eval/kl"
    table(title, ("n", "KL to the policy", "score", "95% low", "95% high"), rows)


def _sample_prompted(
    model: str, questions: list[Prompt], spec: str | None, labels: str | None, pattern: str | None,
    dataset: Path | None, other: tuple[int, str | None], sampling: SamplingOptions, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Answers to questions with a way of prompting, printed with the pattern that found them."""
    if spec is None:
        raise UserError(
            "--labels and --pattern are for --prompting", remedy="Give --prompting zero-shot, for instance."
        )
    if other != (1, None):
        raise UserError("--n and --reward are not for --prompting", remedy="Use `samples` of chain-of-thought.")
    way, rules = read_prompting(spec), task_options.answer_rules(labels, pattern)
    check_way(way, rules.labels, sampling.temperature)
    params = sampling.params(model)
    examples = list(train_demonstrations(dataset)) if way.count and dataset is not None else []
    from rlhf.prompting.masked import open_prompted  # imports torch
    from rlhf.prompting.run import Prompter, generation_params

    opened = open_prompted(model, sampling.chat_template, sampling.trust_remote_code)
    prompter = Prompter(opened, way, rules, sampling.seed, examples)
    generation = generation_params(params, sampling.temperature, way, prompter.builder.layout)
    answered = prompter.answer(questions, generation)
    rows = [
        {"prompt_id": question.prompt_id, "messages": question.chat, "way": way.title, "shots": way.count, **row}
        for question, row in zip(questions, answered.rows) if row is not None
    ]  # fmt: skip
    if output is not None:
        options.write_rows(output, rows)
    for row in rows:
        (print_json if as_json else _show_prompted)(row)
    if not as_json:
        fit = f", {answered.left_out:,} examples left out" if answered.left_out else ""
        found = f", answer: {rules.pattern.take} match of {rules.pattern.pattern}" if rules.pattern else ""
        say(
            f"{way.title}: {len(rows):,} answers, {answered.prompt_tokens:,.0f} tokens a prompt{fit}{found}",
            style="dim",
        )


def adapter_paths(words: list[str] | None, route: str | None) -> dict[str, str]:
    """Task -> run or folder, from the values TASK=PATH of --adapter.

    Raises:
        UserError: A value is not of that form, a task is named twice, or it is ambiguous which adapter answers.
    """
    paths: dict[str, str] = {}
    for word in words or ():
        task, equals, path = word.partition("=")
        if not equals or not task or not path:
            raise UserError(f"--adapter {word!r}: expected TASK=PATH", remedy="PATH is a run, a folder, or `none`.")
        if task in paths:
            raise UserError(f"--adapter {word!r}: the task {task} is named twice")
        paths[task] = path
    if route is not None and route not in ROUTES:
        raise UserError(f"--route {route}: is none of {', '.join(ROUTES)}", "Records have these fields.")
    if len(paths) > 1 and route is None:
        raise UserError("--adapter: there are several tasks", remedy="Say which field names the task: --route group.")
    if route is not None and not paths:
        raise UserError("--route: there is no --adapter to choose")
    return paths


def _prompts(texts: list[str] | None, dataset: Path | None, split: str | None, limit: int | None) -> list[Prompt]:
    if bool(texts) == (dataset is not None):
        raise UserError("give prompts", "One of --prompt and --dataset is needed, not both.")
    if dataset is not None:
        return chosen_prompts(open_dataset(dataset), split, limit)
    with blame("--prompt"):
        return [Prompt((Message("user", text),)) for text in texts or ()]


def _rows(samples: list[Sampled], scorer: CompletionScorer | None, routed: TaskAdapters | None) -> list[dict[str, Any]]:
    """The answers to a prompt as they are written, with the task of its adapter and with scores if there are."""
    prompt = samples[0].prompt
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": prompt.prompt_id,
            "messages": prompt.chat,
            "sample": index,
            "answer": one.text,
            "ended": one.completion.ended,
            "tokens": len(one.completion.ids),
            **({} if routed is None else {"task": routed.names[routed.task_of[prompt.prompt_id]]}),
        }
        for index, one in enumerate(samples)
    ]
    if scorer is not None:
        scores, disagreement = scorer.with_disagreement(samples)
        best = scores.index(max(scores))
        for index, row in enumerate(rows):
            row |= {} if disagreement is None else {"disagreement": disagreement[index]}
            row |= {"score": scores[index], "best": index == best}
    return rows


def _part(label: str, text: str, style: str) -> None:
    """Print a part of a conversation after a label."""
    console = out()
    console.print(Text(f"{label}: ", style), end="")
    console.print(text)


def _show_prompt(messages: list[dict[str, str]]) -> None:
    out().print(Rule(style="dim"))
    for message in messages:
        _part(message["role"], message["content"], "bold cyan")


def _show(rows: list[dict[str, Any]]) -> None:
    """Print a prompt and its answers, or the best answer if there are scores."""
    _show_prompt(rows[0]["messages"])
    scored = [row["score"] for row in rows if "score" in row]
    for row in rows if len(scored) < 2 else (row for row in rows if row["best"]):
        _part("answer", row["answer"].strip(), "bold green")
        say(" · ".join(_facts(row, scored)), "dim")


def _show_prompted(row: dict[str, Any]) -> None:
    """Print a question, what the model wrote, and the answer in it."""
    _show_prompt(row["messages"])
    for text in row.get("texts", [row["text"]] if "text" in row else []):
        _part("text", text, "cyan")
    _part("answer", "none found" if row["answer"] is None else row["answer"], "bold green")
    facts = [f"{len(row['examples'])} examples"]
    facts += [f"{row['votes']} of {len(row['answers'])} votes"] if "votes" in row else []
    facts += [f"{label} {p:.1%}" for label, p in row.get("probabilities", {}).items()]
    facts += [] if row["confidence"] is None else [f"margin {row['confidence']:.2f}"]
    say(" · ".join(facts), "dim")


def _facts(row: dict[str, Any], scores: list[float]) -> Iterator[str]:
    yield f"{row['tokens']} tokens" + ("" if row["ended"] else ", cut off")
    if scores:
        spread = f" +- {format_number(row['disagreement'])}" if "disagreement" in row else ""
        yield f"score {format_number(row['score'])}{spread}"
    if len(scores) > 1:
        yield f"best of {len(scores)}, whose mean is {format_number(sum(scores) / len(scores))}"
