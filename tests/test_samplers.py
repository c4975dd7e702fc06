"""Samplers other than `hf`: what they report and refuse, and PPO with log-probs that differ from the trainer's."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
from logged import lines, updates
from ppo_runs import config
from transformers import AutoModelForCausalLM, Lfm2Config

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.schema import Message
from rlhf.models.attention import PACKED, switch
from rlhf.models.load import load_policy
from rlhf.ppo.losses import Importance
from rlhf.rollout.samplers import continuous_batching, hf
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import SamplingParams
from rlhf.tuning.merging import merged_weights
from rlhf.tuning.methods import TUNING
from stages.ppo import PPO, run

CONTINUOUS = {"name": "transformers", "page_size": 8}


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(path=tiny.llama()), tiny.llama())


@pytest.fixture(scope="module")
def questions(chat):
    return [chat.prompt((Message("user", tiny.question(i)),)) for i in range(6)]


SEEDS = [stream_seed(0, i) for i in range(6)]


# ---- continuous batching


def test_the_same_call_gives_the_same_answers_and_other_seeds_give_others(policy, chat, questions):
    first, second = (
        continuous_batching(policy, questions, SEEDS, SamplingParams(8, batch_size=2), chat) for _ in range(2)
    )
    assert first == second
    assert first != continuous_batching(policy, questions, SEEDS[::-1], SamplingParams(8, batch_size=2), chat)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_reported_log_probs_are_the_models_at_the_sampling_temperature(temperature, policy, chat, questions):
    answers = continuous_batching(policy, questions, SEEDS, SamplingParams(20, temperature=temperature), chat)
    for prompt, answer in zip(questions, answers):
        logits = policy(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("narrowed", [{"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}])
def test_no_log_probs_are_reported_of_a_narrowed_distribution(narrowed, policy, chat, questions):
    answers = continuous_batching(policy, questions, SEEDS, SamplingParams(5, **narrowed), chat)
    assert all(answer.logprobs is None for answer in answers)


def test_top_k_of_one_is_greedy(policy, chat, questions):
    likeliest = continuous_batching(policy, questions, SEEDS, SamplingParams(12, top_k=1), chat)
    assert [a.ids for a in likeliest] == [
        a.ids for a in hf(policy, questions, SEEDS, SamplingParams(12, top_k=1), chat)
    ]


def test_an_adapter_takes_part(chat, questions):
    tuned = TUNING.pick("lora")(load_policy(ModelConfig(path=tiny.llama()), tiny.llama()), chat, "causal")
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    greedy = SamplingParams(16, temperature=0)
    answers = continuous_batching(tuned, questions, SEEDS, greedy, chat)
    assert answers == hf(tuned, questions, SEEDS, greedy, chat)
    with tuned.disable_adapter():
        assert answers != hf(tuned, questions, SEEDS, greedy, chat)


def test_a_model_with_packed_attention_samples_as_it_did(chat, questions):
    policy = load_policy(ModelConfig(path=tiny.llama()), tiny.llama())
    greedy = SamplingParams(8, temperature=0)
    expected = hf(policy, questions, SEEDS, greedy, chat)
    switch(policy, "sdpa", PACKED)
    assert hf(policy, questions, SEEDS, greedy, chat) == expected
    assert continuous_batching(policy, questions, SEEDS, greedy, chat) == expected
    assert policy.config._attn_implementation == PACKED


def test_the_model_and_the_random_numbers_are_left_as_they_were(chat, questions):
    model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama()).train()
    model.set_attn_implementation("eager")
    before = torch.get_rng_state()
    continuous_batching(model, questions, SEEDS, SamplingParams(4), chat)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("option", [{"stop": ("a",)}, {"min_new_tokens": 2}])
def test_options_that_it_cannot_follow_are_refused(option, policy, chat, questions, tmp_path, prompts):
    (name,) = option
    with pytest.raises(UserError, match=name):
        continuous_batching(policy, questions, SEEDS, SamplingParams(5, **option), chat)
    with pytest.raises(UserError, match=f"does not support {name}"):
        config(tmp_path, prompts, rollout__sampler="transformers", **{f"rollout__{name}": next(iter(option.values()))})


def test_a_model_that_transformers_cannot_page_is_refused(chat):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    layers = ["conv", "full_attention"]
    model = AutoModelForCausalLM.from_config(Lfm2Config(vocab_size=64, layer_types=layers, **shape))
    with pytest.raises(UserError, match="lfm2 models"):
        continuous_batching(model, [[1, 2]], [0], SamplingParams(3), chat)


# ---- importance weights in PPO


@pytest.mark.slow
def test_a_run_logs_how_far_the_samplers_log_probs_lie_from_the_trainers(tmp_path, prompts):
    run(config(tmp_path / "run", prompts, rollout__sampler=CONTINUOUS, rollout__temperature=0.7))
    for line in updates(tmp_path / "run"):
        assert 0 < line["rollout/sampler_gap_mean"] <= line["rollout/sampler_gap_max"] < 1e-4
        assert line["rollout/importance_truncated"] == 0
        assert line["policy/first_ratio_min"] == line["policy/first_ratio_max"] == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"rollout__sampler": CONTINUOUS, "rollout__max_importance_weight": None}, marks=pytest.mark.slow),
    ],
)
def test_without_log_probs_or_weights_nothing_is_weighed(changes, tmp_path, prompts):
    run(config(tmp_path / "run", prompts, **changes))
    assert not any("rollout/importance_truncated" in line for line in updates(tmp_path / "run"))


def test_each_tokens_policy_loss_is_multiplied_by_its_weight(tmp_path, prompts):
    stage = PPO(config(tmp_path / "run", prompts, batch__minibatches=1, batch__epochs=1), False, False)
    rollout = stage.rollout(stage.draw_prompts(0))
    minibatches = stage.minibatches(rollout, 0)
    experience = stage.scorer.score(rollout, minibatches.epochs[0])
    mask = rollout.response_mask
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    nothing = torch.zeros(())
    weighed = dataclasses.replace(experience, importance=Importance(weights, nothing, nothing, nothing))
    advantages = stage.config.advantage(experience.scores[:, None] * mask, experience.values, mask, None)
    figures = stage.learner.learn(weighed, advantages, minibatches, 0, 0.0)
    expected = -(advantages.advantages * weights).sum() / mask.sum()  # the ratio is 1
    assert figures["loss/policy"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_with_continuous_batching_equals_the_uninterrupted_one(tmp_path, prompts):
    run(config(tmp_path / "whole", prompts, rollout__sampler=CONTINUOUS))
    stage = PPO(config(tmp_path / "cut", prompts, rollout__sampler=CONTINUOUS), False, False)
    stage.reporter.update(1, stage.update(0))
    stage.done = 1
    stage.save()
    run(config(tmp_path / "cut", prompts, rollout__sampler=CONTINUOUS), resume=True)
    whole = [line for line in lines(tmp_path / "whole") if "eval/scores" not in line]
    cut = [line for line in lines(tmp_path / "cut") if "eval/scores" not in line]
    assert json.dumps(cut) == json.dumps(whole)


def test_weights_of_a_narrowed_distribution_are_refused(tmp_path, prompts):
    changes = {"rollout__sampler": "transformers", "rollout__top_p": 0.9}
    with pytest.raises(UserError, match="max_importance_weight: null"):
        config(tmp_path, prompts, **changes)
    config(tmp_path, prompts, **changes, rollout__max_importance_weight=None)


# ---- vLLM: what can be seen without it


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_weights_that_are_sent_are_the_merged_ones_and_the_live_ones_stay(tuning, chat):
    model = TUNING.pick(tuning)(load_policy(ModelConfig(path=tiny.llama()), tiny.llama()), chat, "causal")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        sent = dict(merged_weights(model))
    expected = tiny.merged_state(model)
    assert set(sent) == set(expected)
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
