"""How far a policy is from a reference: the KL of whole answers, estimated from answers that the policy sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.core.console import track
from rlhf.core.errors import UserError
from rlhf.inference.policy import Policy
from rlhf.inference.sampling import Sampled
from rlhf.models.logprobs import token_logprobs
from rlhf.ppo.kl import k1, k3
from rlhf.rollout.types import SamplingParams

MICRO_BATCH = 8


def check_reference(policy: Policy, reference: Policy, params: SamplingParams) -> None:
    """Refuse a reference that gives no KL.

    Raises:
        UserError: It reads other tokens, or answers are not sampled at random.
    """
    if policy.chat.fingerprints()["tokenizer"] != reference.chat.fingerprints()["tokenizer"]:
        raise UserError(
            f"--reference {reference.path}: its tokenizer is not that of {policy.path}",
            "The KL compares the probabilities of the same tokens.",
            "Name the model that training started from, such as the SFT run.",
        )
    check_random(params.temperature)


def check_random(temperature: float) -> None:
    """Refuse greedy answers as an estimate of the KL.

    Raises:
        UserError: The temperature is 0.
    """
    if temperature == 0:
        raise UserError(
            "--reference: greedy answers (--temperature 0) give no estimate of the KL",
            "The KL is a mean over answers that the policy samples at random.",
            "Leave --temperature out, or give the one of training.",
        )


def sequence_kl(
    policy: Policy, reference: Policy, samples: Sequence[Sampled], temperature: float
) -> tuple[list[float], list[float]]:
    """Two estimates of KL(policy || reference) for each answer: the sums over its tokens of k1 and of k3.

    Both are unbiased: given the tokens before it, each token's term has the KL of the next token as its mean (see
    `rlhf.ppo.kl`). k1 is `eval/kl` of PPO; k3 is never negative and mostly varies less.

    Args:
        policy: The model that sampled.
        reference: A model with the same tokenizer.
        samples: What it sampled.
        temperature: Logits of both are divided by it, as in PPO. Top-k and top-p do not enter.

    Returns:
        k1 and k3 of each answer, nats.
    """
    order = sorted(range(len(samples)), key=lambda at: len(samples[at].prompt_ids) + len(samples[at].completion.ids))
    first, third = [0.0] * len(samples), [0.0] * len(samples)
    for start in track(range(0, len(order), MICRO_BATCH), f"KL to {reference.path}", unit="batches"):
        places = order[start : start + MICRO_BATCH]
        batch = [samples[at] for at in places]
        ids, mask = policy.chat.pad([one.prompt_ids + one.completion.ids for one in batch], policy.model.device)
        ends = torch.tensor([[len(one.prompt_ids), len(one.prompt_ids) + len(one.completion.ids)] for one in batch])
        at = torch.arange(ids.shape[1])
        answer = ((at >= ends[:, :1]) & (at < ends[:, 1:])).to(ids.device)
        with torch.no_grad():
            mine, theirs = (
                token_logprobs(one.model, ids, mask, answer, temperature)[0].double() for one in (policy, reference)
            )
        sizes = [len(one.completion.ids) for one in batch]
        for place, short, positive in zip(places, k1(mine, theirs).split(sizes), k3(mine, theirs).split(sizes)):
            first[place], third[place] = float(short.sum()), float(positive.sum())
    return first, third
