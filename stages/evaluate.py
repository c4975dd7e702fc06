"""`rlhf evaluate`: a policy on demonstrations and by a reward, alone or against another; a reward model on rankings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf.cli import options
from rlhf.config.base import ModelConfig
from rlhf.core.console import say, table, track, warn
from rlhf.core.errors import UserError
from rlhf.core.intervals import Z_95
from rlhf.core.lazy import lazy
from rlhf.data.chat import load_tokenizer
from rlhf.data.encode import Counts, encode_demonstration, encode_ranking
from rlhf.data.selection import chosen_prompts, chosen_records, with_system
from rlhf.data.store import Dataset, open_dataset
from rlhf.inference.policy import Policy, model_kind, open_policy, quiet, sampling_for
from rlhf.inference.sampling import sample
from rlhf.inference.scorer import open_scorer
from rlhf.reward.agreement import Agreement
from rlhf.reward.metrics import accuracy_interval, metric_rows, reward_metrics
from rlhf.rollout.types import SamplingParams
from rlhf.runs.run import resolve_model_path

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = lazy("numpy"), lazy("torch")

MICRO_BATCH = 8
BATCH_TOKENS = 16384
"""Most tokens of rankings in one forward pass, padding included."""


def command(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a model folder, or a hub name.")],
    dataset: Annotated[
        Path,
        typer.Option(help="A policy: demonstrations, rankings (their best answers), or prompts. A reward: rankings."),
    ],
    split: options.Split = None,
    limit: options.Limit = None,
    reward: options.Reward = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN|MODEL", help="Another policy; says how often MODEL's answer is better.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Answers to each prompt, with --reward.")] = 1,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    system: options.System = None,
    chat_template: options.ChatTemplate = "auto",
    output: Annotated[Path | None, typer.Option("--out", help="Write the figures here, as JSON.")] = None,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure a model on held-out data."""
    options.check_writable(output, "--out")
    data = open_dataset(dataset)
    result: dict[str, Any] = {"model": model, "dataset": str(dataset), "fingerprint": data.fingerprint, "split": split}
    if model_kind(model, trust_remote_code) == "reward":
        if reward or against:
            raise UserError(f"{model}: is a reward model; --reward and --against are for policies")
        result |= _evaluate_reward(model, data, split, limit, trust_remote_code)
    else:
        _check_task(data, reward, against, trust_remote_code)
        sampling = sampling_for(
            model, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens, stop=stop,
        )  # fmt: skip
        task = Task(data, split, limit, reward, n, sampling, seed, system, chat_template, trust_remote_code)
        result |= _evaluate_policies(model, against, task)
    if output is not None:
        options.write_whole(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        options.print_json(result)


# ---- policies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What policies are measured on, the same for each of them."""

    data: Dataset
    split: str | None
    limit: int | None
    reward: str | None
    n: int
    sampling: SamplingParams
    seed: int
    system: str | None
    chat_template: str
    trust_remote_code: bool


def _check_task(data: Dataset, reward: str | None, against: str | None, trust_remote_code: bool) -> None:
    if data.kind == "prompt" and not reward:
        raise UserError(
            f"{data.path}: prompts alone give nothing to measure a policy by",
            remedy="Score its answers with --reward, or name a dataset of demonstrations or rankings.",
        )
    if against and model_kind(against, trust_remote_code) == "reward":
        raise UserError(f"--against {against}: a reward model gives no answers", remedy="Name an SFT or PPO run.")


def _evaluate_policies(model: str, against: str | None, task: Task) -> dict[str, Any]:
    """Figures of one policy or two, shown and returned."""
    figures, scores, text = _measure(model, task)
    result: dict[str, Any] = {"policy": figures}
    if task.reward:
        result |= {"reward": task.reward, "seed": task.seed, "sampling": asdict(task.sampling)}
    columns = [figures]
    if against is not None:
        other, other_scores, other_text = _measure(against, task)
        columns.append(other)
        result["against"] = {"model": against, **other}
        if text != other_text:
            warn("the two have different tokenizers or chat templates: loss and perplexity are not comparable")
        if scores:
            result["comparison"] = _compare(scores, other_scores)
    rows = [(label, *[column[key] for column in columns]) for key, label in LABELS.items() if key in figures]
    table(f"Held-out: {task.data.path}", ["", model, *([against] if against else [])], rows)
    if "comparison" in result:
        _show_comparison(result["comparison"], model, str(against))
    return result


LABELS = {
    "records": "answers in the data",
    "loss": "loss, nats a token",
    "perplexity": "perplexity",
    "prompts": "prompts",
    "score": "mean score",
    "score_low": "  95% interval, low",
    "score_high": "  95% interval, high",
    "answer_tokens": "answer length, tokens",
    "eos_rate": "answers that ended",
}


def _measure(path: str, task: Task) -> tuple[dict[str, Any], list[list[float]], dict[str, str]]:
    """A policy's figures, its scores ([prompt][answer], empty without a reward) and its text fingerprints."""
    policy = open_policy(path, task.chat_template, task.trust_remote_code)
    figures: dict[str, Any] = {}
    scores: list[list[float]] = []
    if task.data.kind != "prompt":
        figures |= demonstration_loss(policy, list(chosen_records(task.data, task.split, task.limit)))
    if task.reward:
        found, scores = _sampled_figures(policy, task)
        figures |= found
    return figures, scores, policy.chat.fingerprints()


def demonstration_loss(policy: Policy, records: Sequence[Any]) -> dict[str, Any]:
    """How likely a policy finds the answers of demonstrations, or the best answers of rankings.

    Returns:
        `loss`: mean negative log-likelihood in nats over all assistant tokens of all records, ends of turns included
        (temperature 1); `perplexity`: its exponential; `tokens`, `records`, and `set_aside`: records that do not fit.

    Raises:
        UserError: No record fits.
    """
    counts = Counts()
    found = [encode_demonstration(record, policy.chat, policy.limit, counts) for record in records]
    rows = sorted((row for row in found if row is not None), key=lambda row: row["length"])
    if not rows:
        raise UserError(f"no answer fits in the {policy.limit:,} tokens of {policy.path}")
    total, tokens = 0.0, 0
    for start in track(range(0, len(rows), MICRO_BATCH), f"perplexity of {policy.path}", unit="batches"):
        batch = rows[start : start + MICRO_BATCH]
        ids, mask = policy.chat.pad([row["input_ids"] for row in batch], policy.model.device)
        width = ids.shape[1]
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in batch])
        total += _negative_log_likelihood(policy, ids, mask, labels.to(ids.device))
        tokens += int((labels != -100).sum())
    loss = total / tokens
    return {
        "loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "records": len(rows),
        "set_aside": len(records) - len(rows),
    }  # fmt: skip


def _negative_log_likelihood(policy: Policy, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> float:
    """Summed over the tokens whose label is not -100, nats."""
    from rlhf.models.logprobs import token_logprobs

    wanted = labels != -100
    with torch.no_grad():
        if policy.prompt_learning:  # only PEFT's own forward puts the learned tokens in front
            return float(policy.model(input_ids=ids, attention_mask=mask, labels=labels).loss) * int(wanted.sum())
        return -float(token_logprobs(policy.model, ids, mask, wanted, temperature=1.0)[0].double().sum())


def _sampled_figures(policy: Policy, task: Task) -> tuple[dict[str, Any], list[list[float]]]:
    """What the reward says of a policy's answers, and each score."""
    assert task.reward is not None
    scorer = open_scorer(task.reward, policy)
    prompts = [with_system(prompt, task.system) for prompt in chosen_prompts(task.data, task.split, task.limit)]
    room = policy.room(task.sampling, scorer.limit)
    scores, lengths, ended = [], [], []
    for answers in sample(policy, prompts, task.sampling, task.seed, task.n, room):
        scores.append(scorer(answers))
        lengths += [len(a.answer.ids) for a in answers]
        ended += [a.answer.ended for a in answers]
    means = np.array(scores).mean(1)
    half = Z_95 * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    figures = {
        "prompts": len(prompts), "answers": len(lengths), "score": float(means.mean()),
        "score_low": float(means.mean()) - half if len(means) > 1 else None,
        "score_high": float(means.mean()) + half if len(means) > 1 else None,
        "answer_tokens": sum(lengths) / len(lengths), "eos_rate": sum(ended) / len(ended),
    }  # fmt: skip
    return figures, scores


def _compare(scores: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How often the first policy's answer scores higher than the other's to the same prompt; a tie counts half.

    Args:
        scores: [prompt][answer] of the first policy.
        others: The same of the other; answer k is compared with answer k.

    Returns:
        `win_rate` with its 95% interval (Wilson's, see `accuracy_interval`), and the counts.
    """
    gap = np.array(scores) - np.array(others)
    credit = np.where(gap == 0, 0.5, gap > 0)
    low, high = accuracy_interval(credit.sum(1), np.full(len(gap), gap.shape[1])) or (None, None)
    return {
        "win_rate": float(credit.mean()), "interval": [low, high], "wins": int((gap > 0).sum()),
        "ties": int((gap == 0).sum()), "losses": int((gap < 0).sum()), "mean_difference": float(gap.mean()),
    }  # fmt: skip


def _show_comparison(found: dict[str, Any], model: str, against: str) -> None:
    low, high = found["interval"]
    say(f"{model} wins over {against}: {found['win_rate']:.1%} (95% Wilson interval {low:.1%} to {high:.1%})")
    say(f"{found['wins']} wins, {found['ties']} ties, {found['losses']} losses; a tie counts half")


# ---- reward models -----------------------------------------------------------------------------------------------


def _evaluate_reward(
    model: str, data: Dataset, split: str | None, limit: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Agreement of a reward model with rankings, shown and returned."""
    if data.kind != "ranking":
        raise UserError(f"{data.path}: holds {data.kind}s; a reward model is measured on rankings")
    from rlhf import distributed
    from rlhf.models.load import compute_dtype, load_hf_config, sequence_limit
    from rlhf.models.scalar import load_scalar
    from rlhf.reward.scoring import score_rankings

    quiet()
    folder = resolve_model_path(model)
    config = ModelConfig(path=model, trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, folder)
    longest = sequence_limit(config, load_hf_config(config, folder))
    scalar = load_scalar(config, folder, head="trained").to(distributed.device(), compute_dtype("auto"))
    counts = Counts()
    found = [encode_ranking(r, chat, longest, counts) for r in chosen_records(data, split, limit)]
    rows = [row for row in found if row is not None]
    if not rows:
        raise UserError(f"no ranking fits in the {longest:,} tokens of {model}")
    counts.kept = len(rows)
    counts.report("rankings")
    people = Agreement.of([data])
    metrics = reward_metrics(score_rankings(scalar, chat, rows, BATCH_TOKENS, bar=True))
    metrics |= people.figures() if people else {}
    for part in metric_rows(metrics):
        table(*part)
    if people:
        say(people.beside(metrics["accuracy"]))
    return {"rankings": len(rows), "set_aside": dict(counts.aside), "metrics": metrics}
