"""Metrics of a policy on held-out data: loss on demonstrations, scores of its own completions, comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf.core.console import track
from rlhf.core.errors import UserError
from rlhf.core.intervals import Z_95
from rlhf.data.encode_records import EncodingCounts, best_response, encode_demonstration
from rlhf.data.schema import Prompt
from rlhf.inference.policy import Policy
from rlhf.inference.sampling import Sampled, accepted, sample
from rlhf.inference.scorer import open_scorer
from rlhf.judging.judge import Judge
from rlhf.judging.texts import text_metrics
from rlhf.judging.win_rate import win_rates
from rlhf.models.logprobs import token_logprobs
from rlhf.rollout.types import Completion, SamplingParams

MICRO_BATCH = 8


def demonstration_loss(policy: Policy, records: Sequence[Any]) -> dict[str, Any]:
    """The loss of a policy on the answers of demonstrations, or on the best answers of rankings.

    Returns:
        `loss`: mean negative log-likelihood in nats over all assistant tokens of all records, including ends of turns,
        at temperature 1; `perplexity`: its exponential; `tokens`, `records`, and `skipped`: records that do not fit or
        that the chat template refuses.

    Raises:
        UserError: No record fits.
    """
    counts = EncodingCounts()
    found = [encode_demonstration(record, policy.chat, policy.limit, counts) for record in records]
    counts.report_refused("records")
    rows = sorted((row for row in found if row is not None), key=lambda row: row["length"])
    if not rows:
        reasons = "; ".join(f"{count:,} skipped: {reason}" for reason, count in counts.skipped.items())
        raise UserError(f"no answer fits in the {policy.limit:,} tokens of {policy.path}", reasons)
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
        "skipped": len(records) - len(rows),
    }  # fmt: skip


def _negative_log_likelihood(policy: Policy, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> float:
    """Negative log-likelihood in nats, summed over the tokens whose label is not -100."""
    wanted = labels != -100
    with torch.no_grad():
        return -float(token_logprobs(policy.model, ids, mask, wanted, temperature=1.0)[0].double().sum())


@dataclass(frozen=True)
class Answers:
    """Answers to prompts, those of a policy or of a dataset: [prompt][answer]; none to a prompt that was refused."""

    prompts: Sequence[Prompt]
    texts: list[list[str]]
    scores: list[list[float]]
    """By the reward, higher is better; all empty without one."""


def sampled_metrics(
    policy: Policy, prompts: Sequence[Prompt], reward: str | None, params: SamplingParams, seed: int, n: int
) -> tuple[dict[str, Any], Answers]:
    """`n` completions of each prompt: their mean score (with a reward), lengths, ends, and `text_metrics`."""
    scorer = open_scorer(reward, policy) if reward else None
    texts: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    lengths, ended = [], []
    usable = accepted(policy, prompts, scorer.own_chats if scorer else ())
    room = policy.prompt_limit(params, scorer.limit if scorer else None)
    for samples in sample(policy, usable, params, seed, n, room):
        name = samples[0].prompt.prompt_id
        texts[name] = [one.text for one in samples]
        scores[name] = scorer(samples) if scorer else []
        lengths += [len(one.completion.ids) for one in samples]
        ended += [one.completion.ended for one in samples]
    metrics: dict[str, Any] = {"prompts": len(usable), "refused": len(prompts) - len(usable), "answers": len(lengths)}
    if scorer:
        means = np.array(list(scores.values())).mean(1)
        half = Z_95 * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        low, high = (float(means.mean()) + side * half if len(means) > 1 else None for side in (-1, 1))
        metrics |= {"score": float(means.mean()), "score_low": low, "score_high": high}
    metrics |= {"answer_tokens": sum(lengths) / len(lengths), "eos_rate": sum(ended) / len(ended)}
    metrics |= text_metrics(list(texts.values()))
    ids = [prompt.prompt_id for prompt in prompts]
    return metrics, Answers(prompts, [texts.get(one, []) for one in ids], [scores.get(one, []) for one in ids])


def reference_answers(policy: Policy, prompts: Sequence[Any], reward: str | None, n: int) -> Answers:
    """The answers of demonstrations, or the best ones of rankings, scored as a policy's and repeated `n` times.

    Args:
        policy: Whose tokenizer reads them.
        prompts: Demonstrations or rankings.
        reward: Scores them; see `open_scorer`.
        n: How many answers of a policy each of them is compared with.
    """
    scorer = open_scorer(reward, policy) if reward else None
    usable = {one.prompt_id for one in accepted(policy, prompts, scorer.own_chats if scorer else ())}
    texts: list[list[str]] = []
    scores: list[list[float]] = []
    for record in prompts:
        answer = best_response(record)
        if record.prompt_id not in usable:
            texts.append([])
            scores.append([])
            continue
        ids = policy.chat.prompt(record.messages)
        one = Sampled(record, ids, Completion(policy.chat.response(answer), True), answer)
        texts.append([answer] * n)
        scores.append(scorer([one]) * n if scorer else [])
    return Answers(prompts, texts, scores)


def compare_answers(mine: Answers, theirs: Answers, judge: Judge | None = None) -> dict[str, Any]:
    """How often the answers of the first win: by the scores, where a higher score wins, or by a judge.

    Answer k is compared with answer k. Prompts that one of the two refused are left out; so are pairs on which the
    judge's verdict cannot be read, which `unreadable` counts.

    Returns:
        See `win_rates`; by scores also `mean_difference`.

    Raises:
        UserError: There is nothing to compare, or the judge cannot be used.
    """
    rows = [row for row in zip(mine.prompts, mine.texts, theirs.texts, mine.scores, theirs.scores) if row[1] and row[2]]
    if not rows:
        raise UserError("no prompt can be used with both policies: each was refused by one of their chat templates")
    lengths = [[(len(one), len(other)) for one, other in zip(ours, others)] for _, ours, others, *_ in rows]
    more: dict[str, Any]
    if judge is None:
        gaps = [[one - other for one, other in zip(*row[3:])] for row in rows]
        credits = [[0.5 if gap == 0 else float(gap > 0) for gap in row] for row in gaps]
        more = {"mean_difference": float(np.mean([gap for row in gaps for gap in row]))}
    else:
        verdicts = judge.compare(
            (prompt.chat, one, other) for prompt, ours, others, *_ in rows for one, other in zip(ours, others)
        )
        judged = [[next(verdicts).credit for _ in row] for row in lengths]
        credits = [[credit for credit in row if credit is not None] for row in judged]
        lengths = [[size for size, credit in zip(*row) if credit is not None] for row in zip(lengths, judged)]
        unreadable = sum(credit is None for row in judged for credit in row)
        more = {"judge": judge.facts(), "unreadable": unreadable}
        if not any(credits):
            raise UserError("the judge gave no verdict that can be read", remedy="Look at its replies in the cache.")
    return win_rates(credits, lengths) | more
