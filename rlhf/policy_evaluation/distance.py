"""How far a policy is from a reference: the KL of whole answers, estimated from answers that the policy sampled."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.core.errors import UserError
from rlhf.inference.policy import Policy, sequence_logprobs
from rlhf.inference.sampling import Sampled
from rlhf.ppo.kl import k1, k3
from rlhf.rollout.types import SamplingParams


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
    if params.temperature == 0:
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
    rows = [
        (one.prompt_ids + one.completion.ids, [False] * len(one.prompt_ids) + [True] * len(one.completion.ids))
        for one in samples
    ]
    mine, theirs = (
        sequence_logprobs(one.model, policy.chat, rows, temperature, f"log-probs by {one.path}")
        for one in (policy, reference)
    )
    first, third = ([float(kl(*pair).sum()) for pair in zip(mine, theirs)] for kl in (k1, k3))
    return first, third
