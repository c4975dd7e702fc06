"""Metrics of a policy on held-out data: loss on demonstrations, scores and KL of its own answers, comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from rlhf.core.errors import UserError
from rlhf.data.encode_records import EncodingCounts, best_response, encode_demonstration
from rlhf.data.schema import Prompt
from rlhf.evaluation.estimates import clustered_mean
from rlhf.inference.policy import Policy, sequence_logprobs
from rlhf.inference.sampling import Sampled, accepted, sample
from rlhf.inference.scorer import open_scorer
from rlhf.judging.judge import Judge
from rlhf.judging.prompt import TO_BE_READABLE
from rlhf.judging.texts import text_metrics
from rlhf.judging.win_rate import win_rates
from rlhf.ppo.kl import k1, k3
from rlhf.rollout.types import SamplingParams


@dataclass(frozen=True)
class Losses:
    """The loss of a policy on the answers of records, at temperature 1."""

    sums: Sequence[float | None]
    """Negative log-likelihood in nats of each record's assistant tokens, ends of turns included; None for a record that
    does not fit or that the chat template refuses."""
    tokens: Sequence[int]
    """How many tokens that are; 0 for a record without a loss."""

    def metrics(self) -> dict[str, Any]:
        """`loss`: mean over all tokens, nats, with `loss_low` and `loss_high`; `perplexity`: its exponential; `tokens`,
        `records`, and `skipped`: records without a loss."""
        found = _token_mean([one for one in self.sums if one is not None], [n for n in self.tokens if n])
        return {
            "loss": found["value"], "loss_low": found["low"], "loss_high": found["high"],
            "perplexity": math.exp(found["value"]), "tokens": found["count"], "records": found["prompts"],
            "skipped": len(self.sums) - found["prompts"],
        }  # fmt: skip

    def minus(self, other: Losses) -> dict[str, Any] | None:
        """The mean difference of the losses in nats a token, as `rlhf.evaluation.estimates.clustered_mean` gives it,
        over records that both could read; None where they read them as different tokens.

        Above 0 the first explains the answers worse; against the model that alignment started from, this is the
        alignment tax.
        """
        both = [
            (a - b, n, m) for a, b, n, m in zip(self.sums, other.sums, self.tokens, other.tokens)
            if a is not None and b is not None
        ]  # fmt: skip
        if not both or any(n != m for _, n, m in both):
            return None
        return _token_mean([gap for gap, _, _ in both], [n for _, n, _ in both])


def _token_mean(sums: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """The mean over tokens, with its interval over records."""
    values = np.repeat(np.divide(sums, tokens), tokens)
    return clustered_mean(values, np.repeat(np.arange(len(tokens)), tokens))


def demonstration_losses(policy: Policy, records: Sequence[Any]) -> Losses:
    """The losses of a policy on the answers of demonstrations, or on the best answers of rankings.

    Raises:
        UserError: No record fits.
    """
    counts = EncodingCounts()
    found = [encode_demonstration(record, policy.chat, policy.limit, counts) for record in records]
    counts.report_refused("records")
    rows = {at: (row["input_ids"], [label != -100 for label in row["labels"]]) for at, row in enumerate(found) if row}
    if not rows:
        reasons = "; ".join(f"{count:,} skipped: {reason}" for reason, count in counts.skipped.items())
        raise UserError(f"no answer fits in the {policy.limit:,} tokens of {policy.path}", reasons)
    logprobs = sequence_logprobs(policy.model, policy.chat, list(rows.values()), 1.0, f"perplexity of {policy.path}")
    each = dict(zip(rows, logprobs))
    places = range(len(records))
    return Losses(
        [-float(each[at].sum()) if at in each else None for at in places], [len(each.get(at, ())) for at in places]
    )


@dataclass(frozen=True)
class PolicyAnswers:
    """Answers to prompts, those of a policy or of a dataset: [prompt][answer]; none to a prompt that was refused."""

    prompts: Sequence[Prompt]
    texts: list[list[str]]
    scores: list[list[float]]
    """By the reward, higher is better; all empty without one."""
    kls: list[list[float]]
    """The estimate k1 of each answer's KL to the reference, nats; all empty without one."""


def sampled_metrics(
    policy: Policy, prompts: Sequence[Prompt], reward: str | None, params: SamplingParams, seed: int, n: int,
    reference: Policy | None = None,
) -> tuple[dict[str, Any], PolicyAnswers]:  # fmt: skip
    """`n` completions of each prompt: their mean score (with a reward), KL (with a reference), lengths, ends, and
    `text_metrics`.

    Raises:
        UserError: The reward cannot be used, or the reference has another tokenizer.
    """
    scorer = open_scorer(reward, policy) if reward else None
    usable = accepted(policy, prompts, scorer.own_chats if scorer else ())
    room = policy.prompt_limit(params, scorer.limit if scorer else None)
    if reference is not None:
        check_reference(policy, reference, params)
        room = min(room, reference.prompt_limit(params))
    groups, scores = [], []
    for samples in sample(policy, usable, params, seed, n, room):
        groups.append(samples)
        scores.append(scorer(samples) if scorer else [])
    flat = [one for samples in groups for one in samples]
    lengths = [len(one.completion.ids) for one in flat]
    metrics: dict[str, Any] = {"prompts": len(usable), "refused": len(prompts) - len(usable), "answers": len(flat)}
    if scorer:
        metrics |= _bounded("score", [score for row in scores for score in row], n)
    kls: list[list[float]] = [[] for _ in groups]
    if reference is not None:
        k1, k3 = sequence_kl(policy, reference, flat, params.temperature)
        metrics |= _bounded("kl", k1, n) | _bounded("kl_k3", k3, n) | {"kl_per_token": sum(k1) / sum(lengths)}
        kls = [k1[at : at + n] for at in range(0, len(k1), n)]
    ended = sum(one.completion.ended for one in flat)
    metrics |= {"answer_tokens": sum(lengths) / len(lengths), "eos_rate": ended / len(flat)}
    texts = [[one.text for one in samples] for samples in groups]
    metrics |= text_metrics(texts)
    place = {prompt.prompt_id: at for at, prompt in enumerate(usable)}
    places = [place.get(prompt.prompt_id) for prompt in prompts]
    columns: list[list[list[Any]]] = [texts, scores, kls]
    return metrics, PolicyAnswers(prompts, *([[] if at is None else rows[at] for at in places] for rows in columns))


def _bounded(name: str, values: Sequence[float], n: int) -> dict[str, Any]:
    """The mean of the values of all answers, `n` to each prompt, and its interval over prompts."""
    found = clustered_mean(np.array(values, dtype=float), np.arange(len(values)) // n)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def reference_answers(policy: Policy, prompts: Sequence[Any], reward: str | None, n: int) -> PolicyAnswers:
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
        texts.append([answer] * n)
        scores.append(scorer([Sampled.of(policy.chat, record, answer)]) * n if scorer else [])
    return PolicyAnswers(prompts, texts, scores, [[] for _ in texts])


def compare_answers(mine: PolicyAnswers, theirs: PolicyAnswers, judge: Judge | None = None) -> dict[str, Any]:
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
    # by prompt; without a reward the answers have no scores
    pairs = [(at, row[0].chat, *pair) for at, row in enumerate(rows) for pair in zip_longest(*row[1:])]
    more: dict[str, Any]
    if judge is None:
        gaps = [one - other for *_, one, other in pairs]
        credits: list[float | None] = [0.5 if gap == 0 else float(gap > 0) for gap in gaps]
        more = {"mean_difference": float(np.mean(gaps))}
    else:
        credits = [one.credit for one in judge.compare(pair[1:4] for pair in pairs)]
        more = {"judge": judge.facts(), "unreadable": credits.count(None)}
        if more["unreadable"] == len(pairs):
            raise UserError("the judge gave no verdict that can be read", judge.why_unreadable(), TO_BE_READABLE)
    read = [(credit, (len(ours), len(others)), at) for credit, (at, _, ours, others, *_) in zip(credits, pairs)
            if credit is not None]  # fmt: skip
    return win_rates(*zip(*read)) | more


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
