"""What DPO computes from the log-probs of answers: implicit rewards, the SFT term, and the metrics that TRL logs.

Pure functions: tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.reward.losses import RankingBatch

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
"""Names of `pair_metrics`, as in TRL."""


def implicit_rewards(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """beta x log(pi(y|x) / pi_ref(y|x)), [N], from log-probs [N] in nats (Rafailov 2023, arXiv:2305.18290, eq. 5).

    The term beta log Z(x) is the same for all answers to a prompt, so it cancels in every loss that compares them.
    """
    return beta * (logprobs - reference)


def sft_loss(logprobs: Tensor, tokens: Tensor, rankings: RankingBatch) -> Tensor:
    """Negative log-likelihood of the best answer in nats per token, [B]; the mean of several that share rank 1.

    Args:
        logprobs: [N], summed over the tokens of each answer.
        tokens: int64 [N].
        rankings: B rankings.
    """
    best = rankings.ranks == 1
    per_token = torch.where(best, -logprobs / tokens.clamp(min=1), 0.0)
    member = _members(rankings, logprobs.dtype)
    return member @ per_token / (member @ best.to(logprobs.dtype)).clamp(min=1)


def pair_metrics(rewards: Tensor, logprobs: Tensor, rankings: RankingBatch) -> Tensor:
    """`METRICS` of each ranking, float32 [6, B]: means over its pairs of a better (chosen) and a worse answer.

    Equal rewards are half an accurate pair. If all answers are tied, each is both chosen and rejected.

    Args:
        rewards: Implicit rewards [N].
        logprobs: [N].
        rankings: B rankings.
    """
    member = _members(rankings, torch.float32)
    same = member.T @ member > 0
    better = same & (rankings.ranks[:, None] < rankings.ranks[None])
    strict = (member @ better.float()).sum(1) > 0
    pairs = torch.where(strict[rankings.ranking][:, None], better, same).float()
    rewards, logprobs = rewards.detach().float(), logprobs.detach().float()
    gaps = rewards[:, None] - rewards[None]
    right = (gaps > 0).float() + 0.5 * (gaps == 0).float()
    first, second = pairs.sum(1), pairs.sum(0)
    per_answer = torch.stack((
        first * rewards, second * rewards, (pairs * right).sum(1), (pairs * gaps).sum(1),
        first * logprobs, second * logprobs,
    ))  # fmt: skip
    return (per_answer @ member.T) / (member @ first).clamp(min=1)


def _members(rankings: RankingBatch, dtype: torch.dtype) -> Tensor:
    """[B, N], 1 where the answer belongs to the ranking."""
    count = int(rankings.ranking.max()) + 1 if rankings.weights is None else len(rankings.weights)
    index = torch.arange(count, device=rankings.ranking.device)
    return (index[:, None] == rankings.ranking[None]).to(dtype)
