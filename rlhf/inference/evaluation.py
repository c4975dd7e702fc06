"""Metrics of a policy on held-out data: loss on demonstrations, scores of its own completions, comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf.core.console import track
from rlhf.core.errors import UserError
from rlhf.core.intervals import Z_95
from rlhf.data.encode_records import EncodingCounts, encode_demonstration
from rlhf.data.schema import Prompt
from rlhf.inference.policy import Policy
from rlhf.inference.sampling import accepted, sample
from rlhf.inference.scorer import open_scorer
from rlhf.models.logprobs import token_logprobs
from rlhf.reward.metrics import accuracy_interval
from rlhf.rollout.types import SamplingParams

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


def sampled_metrics(
    policy: Policy, prompts: Sequence[Prompt], reward: str, params: SamplingParams, seed: int, n: int
) -> tuple[dict[str, Any], list[list[float]]]:
    """Mean score of `n` completions of each prompt, with their lengths.

    Returns:
        The metrics, and the scores as [prompt][completion]; none of a prompt that the chat template refuses.
    """
    scorer = open_scorer(reward, policy)
    found: dict[str, list[float]] = {}
    lengths, ended = [], []
    usable = accepted(policy, prompts, scorer.own_chats)
    for samples in sample(policy, usable, params, seed, n, policy.prompt_limit(params, scorer.limit)):
        found[samples[0].prompt.prompt_id] = scorer(samples)
        lengths += [len(one.completion.ids) for one in samples]
        ended += [one.completion.ended for one in samples]
    scores = [found.get(prompt.prompt_id, []) for prompt in prompts]
    means = np.array(list(found.values())).mean(1)
    half = Z_95 * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    metrics = {
        "prompts": len(usable), "refused": len(prompts) - len(usable), "answers": len(lengths),
        "score": float(means.mean()),
        "score_low": float(means.mean()) - half if len(means) > 1 else None,
        "score_high": float(means.mean()) + half if len(means) > 1 else None,
        "answer_tokens": sum(lengths) / len(lengths), "eos_rate": sum(ended) / len(ended),
    }  # fmt: skip
    return metrics, scores


def compare_scores(scores: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How often the first policy's completion scores higher than the other's for the same prompt; a tie counts half.

    Args:
        scores: [prompt][completion] of the first policy.
        others: The same for the other policy; completion k is compared with completion k. Prompts that one
            of the two refused are left out.

    Returns:
        `win_rate` with its 95% interval (Wilson's, see `accuracy_interval`), and the counts.
    """
    both = [(mine, theirs) for mine, theirs in zip(scores, others) if mine and theirs]
    if not both:
        raise UserError("no prompt can be used with both policies: each was refused by one of their chat templates")
    gap = np.array([mine for mine, _ in both]) - np.array([theirs for _, theirs in both])
    credit = np.where(gap == 0, 0.5, gap > 0)
    low, high = accuracy_interval(credit.sum(1), np.full(len(gap), gap.shape[1])) or (None, None)
    return {
        "win_rate": float(credit.mean()), "interval": [low, high], "wins": int((gap > 0).sum()),
        "ties": int((gap == 0).sum()), "losses": int((gap < 0).sum()), "mean_difference": float(gap.mean()),
    }  # fmt: skip
