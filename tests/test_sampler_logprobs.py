"""Log-probs that the sampler `hf` reports, and PPO that takes them in place of a scoring pass of the policy."""

from __future__ import annotations

from functools import partial

import ppo_runs
import pytest
import tiny
import torch

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.models.forward import token_logprobs
from rlhf.models.load import load_policy
from rlhf.rollout.samplers import hf
from rlhf.rollout.types import SamplingParams
from stages.ppo import PPO

PATHS = {"llama": tiny.llama, "t5": partial(tiny.encoder_decoder, "t5")}
PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13], [14] * 9]


def loaded(kind):
    """The model and its tokenizer."""
    settings = ModelConfig(path=PATHS[kind]())
    return load_policy(settings, settings.path).eval(), load_tokenizer(settings, settings.path)


def recomputed(model, prompt, answer, temperature):
    ids = torch.tensor([prompt + answer])
    wanted = torch.arange(ids.shape[1])[None] >= len(prompt)
    return token_logprobs(model, ids, torch.ones_like(ids), wanted, temperature)[0].tolist()


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3, "min_new_tokens": 5}, {"top_p": 0.5}, {"batch_size": 2}]
)
def test_they_are_those_of_a_forward_pass_under_the_whole_distribution(kind, options):
    model, chat = loaded(kind)
    sampling = SamplingParams(8, logprobs=True, **options)
    found = hf(model, PROMPTS, range(len(PROMPTS)), sampling, chat)
    for prompt, answer in zip(PROMPTS, found):
        expected = recomputed(model, prompt, answer.ids, sampling.temperature)
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_they_are_reported_on_request_alone_and_change_no_token():
    model, chat = loaded("llama")
    plain, with_logprobs = (
        hf(model, PROMPTS, range(5), SamplingParams(8, logprobs=wanted), chat) for wanted in (False, True)
    )
    assert [one.ids for one in plain] == [one.ids for one in with_logprobs]
    assert all(one.logprobs is None for one in plain)


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_ppo_takes_them_in_place_of_a_pass_of_the_policy(advantage, tmp_path, demos):
    metrics, passes = [], []
    for source in ("recompute", "sampler"):
        changes = {"advantage": advantage, "rollout__samples_per_prompt": 2, "score__policy": source}
        stage = PPO(ppo_runs.config(tmp_path / source, demos, **changes), resume=False, overwrite=False)
        calls = []
        body = stage.models.policy.model
        body.register_forward_hook(lambda module, *_, calls=calls: calls.append(torch.is_grad_enabled()))
        metrics.append(stage.update(0))
        passes.append(len(calls))
    recompute, sampler = metrics
    assert passes[1] < passes[0]
    assert sampler["policy/first_ratio_min"] == pytest.approx(1, abs=1e-4)
    assert sampler["policy/first_ratio_max"] == pytest.approx(1, abs=1e-4)
    for name in ("objective/kl", "objective/rlhf_reward", "loss/policy", "policy/approx_kl", "optimizer/grad_norm"):
        assert sampler[name] == pytest.approx(recompute[name], abs=1e-4), name
    assert sampler["objective/entropy"] == pytest.approx(recompute["objective/entropy"], rel=0.1)


def test_a_shared_base_gives_values_without_the_policy(tmp_path, demos):
    lora = {"name": "lora", "rank": 2}
    changes = {"model__sharing": "shared", "tuning": lora, "critic__tuning": lora, "critic__init": "policy"}
    stage = PPO(ppo_runs.config(tmp_path / "run", demos, **changes), resume=False, overwrite=False)
    rollout = stage.rollout(stage.draw_prompts(0))
    batch = stage.minibatches(rollout, 0).epochs[0][0].micro_batches()[0]
    with torch.no_grad():
        whole, without = (stage.models.token_scores(batch, 1.0, policy=policy) for policy in (True, False))
    assert without.logprobs is None and torch.equal(without.values, whole.values)
    assert torch.equal(without.ref_logprobs, whole.ref_logprobs)


def test_a_sampler_that_reports_none_for_these_options_is_refused(tmp_path):
    with pytest.raises(UserError, match="the sampler 'transformers' reports no log-probs"):
        ppo_runs.config(
            tmp_path, "demos", score__policy="sampler", rollout__sampler="transformers", rollout__top_k=5,
            rollout__max_importance_weight=None,
        )  # fmt: skip
