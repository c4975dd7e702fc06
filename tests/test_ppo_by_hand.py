"""Whole updates against PPO written out a second time: padded rows, full logits, loops over tokens."""

from __future__ import annotations

import copy

import ppo_rewards
import ppo_runs
import pytest
import torch

from rlhf.rollout.streams import permutation
from stages.ppo import EPOCH, PPO

TEMPERATURE, KL, RATE, GAMMA_LAM, CLIP = 0.7, 0.05, 1e-3, 0.95, 0.2


def padded(rollout):
    """Tokens int64 [N, L], mask, and bool [N, L - 1]: where the next token is an answer's."""
    rows = [p + a.ids for p, a in zip(rollout.prompts.ids, rollout.completions)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    column, starts = torch.arange(width), torch.tensor([[len(p)] for p in rollout.prompts.ids])
    ends = torch.tensor([[len(row)] for row in rows])
    return ids, (column < ends).long(), ((column >= starts) & (column < ends))[:, 1:]


def logprobs(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def values(critic, ids, mask):
    return critic.model(input_ids=ids, attention_mask=mask).last_hidden_state @ critic.score.weight[0]


def advantages(rewards, value, wanted):
    found, last = torch.zeros_like(rewards), torch.zeros(len(rewards))
    after = torch.cat([value[:, 1:] * wanted[:, 1:], torch.zeros(len(value), 1)], dim=1)
    for t in reversed(range(rewards.shape[1])):
        last = (rewards[:, t] + after[:, t] - value[:, t] + GAMMA_LAM * last) * wanted[:, t]
        found[:, t] = last
    mean, deviation = found[wanted].mean(), found[wanted].std()
    return (found - mean) / deviation * wanted, found + value * wanted


def learn(policy, critic, reference, optimizer, batch, scores, orders):
    """The epochs of one update; `orders` are their minibatches."""
    ids, mask, wanted = batch
    with torch.no_grad():
        old, frozen, before = (
            logprobs(policy, ids, mask),
            logprobs(reference, ids, mask),
            values(critic, ids, mask)[:, :-1],
        )
    rewards = -KL * (old - frozen) * wanted
    for row, score in enumerate(scores):
        rewards[row, wanted[row].nonzero()[-1]] += score
    weights, targets = advantages(rewards, before, wanted)
    for part in orders:
        flags, w = wanted[part], weights[part]
        ratio = torch.where(flags, logprobs(policy, ids[part], mask[part]) - old[part], 0.0).exp()
        surrogate = torch.minimum(ratio * w, ratio.clamp(1 - CLIP, 1 + CLIP) * w)
        new = values(critic, ids[part], mask[part])[:, :-1]
        near = torch.clamp(new, before[part] - CLIP, before[part] + CLIP)
        errors = torch.maximum((new - targets[part]) ** 2, (near - targets[part]) ** 2)
        (-surrogate[flags].mean() + 0.5 * 0.5 * errors[flags].mean()).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_two_updates_give_the_weights_of_ppo_written_out_by_hand(tmp_path, prompts):
    changes = {"rollout__temperature": TEMPERATURE, "kl__controller": {"name": "fixed", "coef": KL}}
    config = ppo_runs.config(tmp_path / "run", prompts, **changes)
    stage = PPO(config, resume=False, overwrite=False)
    policy, critic = (
        copy.deepcopy(stage.models.engine.module.policy),
        copy.deepcopy(stage.models.engine.module.critic.model),
    )
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *critic.parameters()], lr=RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
    )
    for number in range(2):
        rollout = stage.rollout(stage.draw_prompts(number))
        scores = [ppo_rewards.letters([], stage.chat.decode(answer.ids)) for answer in rollout.completions]
        orders = [
            part
            for epoch in range(config.batch.epochs)
            for part in torch.tensor(list(permutation(len(scores), config.seed, EPOCH, number, epoch))).tensor_split(2)
        ]
        learn(policy, critic, reference, optimizer, padded(rollout), scores, orders)
        assert stage.update(number)["objective/scores"] == pytest.approx(sum(scores) / len(scores))
        for mine, theirs in (
            (stage.models.engine.module.policy, policy),
            (stage.models.engine.module.critic.model, critic),
        ):
            for found, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert torch.allclose(found, expected, atol=2e-5), "our weights are not those of the formulas"
            theirs.load_state_dict(mine.state_dict())  # AdamW makes much of rounding where gradients are next to none
    moved = max(float((a - b).abs().max()) for a, b in zip(policy.parameters(), reference.parameters()))
    assert moved > 3e-3
