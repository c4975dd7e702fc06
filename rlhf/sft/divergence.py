"""How far a student's next-token distributions are from its teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.models.forward import causal_lm, head_logits
from rlhf.sft.config import Divergence


def divergence(student: Tensor, teacher: Tensor, kind: Divergence, beta: float, temperature: float) -> Tensor:
    """The divergence of two next-token distributions, q = softmax(student / T) and p = softmax(teacher / T).

    `forward-kl` is KL(p || q), `reverse-kl` is KL(q || p), and `jsd` the generalised Jensen-Shannon divergence
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2024, arXiv:2306.13649,
    equation 1). It is not multiplied by T^2.

    Args:
        student: float32 [n, V] logits; the only argument with a gradient.
        teacher: float32 [n, V] logits.
        kind: Which divergence.
        beta: The teacher's weight in the mixture of `jsd`, between 0 and 1.
        temperature: T, which divides both logits.

    Returns:
        float32 [n], nats.
    """
    q = torch.log_softmax(student / temperature, -1)
    p = torch.log_softmax(teacher / temperature, -1)
    if kind == "forward-kl":
        return _kl(p, q)
    if kind == "reverse-kl":
        return _kl(q, p)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [n] of log-probs [n, V]."""
    return (p.exp() * (p - q)).sum(-1)


class StudentPredictions(NamedTuple):
    """What a student predicts for chosen tokens, row by row."""

    divergences: Tensor
    """float32 [n], nats."""
    logprobs: Tensor
    """float32 [n], nats, of the target tokens."""
    entropies: Tensor
    """float32 [n], nats; without gradient."""
    top1: Tensor
    """bool [n], whether the token is the most likely one."""


def student_predictions(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_logits: Callable[[Tensor], Tensor],
    measure: Callable[[Tensor, Tensor], Tensor],
    tokens: int,
    chunks: int,
) -> StudentPredictions:
    """Predictions of a student and their divergence from its teacher's; logits exist for a chunk of tokens at a time.

    Args:
        model: The student, a causal LM or PEFT's wrapper around one.
        hidden: [n, H] its hidden states.
        targets: int64 [n], the tokens that follow.
        teacher_hidden: [n, H'] hidden states of the teacher at the same positions.
        teacher_logits: Hidden states of the teacher -> its logits.
        measure: Logits of student and teacher -> divergences.
        tokens: Number of ids of the tokenizer; rows of the heads beyond them are ignored.
        chunks: Number of chunks of the heads; see `head_chunks`.
    """
    lm = causal_lm(model)

    def part(states: Tensor, wanted: Tensor, teacher_states: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = teacher_logits(teacher_states)[:, :tokens]
        student = head_logits(lm, states)[:, :tokens]
        logprobs = torch.log_softmax(student, -1)
        chosen = logprobs.gather(-1, wanted[:, None]).squeeze(-1)
        with torch.no_grad():
            entropies, is_top1 = -(logprobs.exp() * logprobs).sum(-1), chosen == logprobs.amax(-1)
        return measure(student, teacher), chosen, entropies, is_top1

    parts = []
    split = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), teacher_hidden.tensor_split(chunks))
    for rows in split:
        if torch.is_grad_enabled():  # the backward pass computes the chunk's logits again instead of keeping them
            parts.append(checkpoint(part, *rows, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(part(*rows))
    return StudentPredictions(*(torch.cat(column) for column in zip(*parts)))
