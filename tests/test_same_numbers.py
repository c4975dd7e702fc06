"""Equals stay equal, however they are computed: in bfloat16 as in float32, frozen or trained, kept or recomputed."""

from __future__ import annotations

import ppo_runs
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.models.forward import head_logprobs, is_frozen_product, token_logprobs
from rlhf.models.load import load_policy
from rlhf.models.vocabulary import mask_unknown_ids
from rlhf.ppo.config import PPOOptimizerConfig
from rlhf.training.engine import make_engine
from stages.ppo import PPO

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    "tied": LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "opt": OPTConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, max_position_embeddings=32,
        word_embed_proj_dim=32, dropout=0.1, attention_dropout=0.1,
    ),
}  # fmt: skip
IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def load(folder):
    return load_policy(ModelConfig(path=folder), folder)


def engine_over(model):
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    return make_engine(model, groups, PPOOptimizerConfig(), "bfloat16", None)


def test_a_frozen_copy_gives_the_very_logits_of_the_model_in_training(folder):
    engine = engine_over(load(folder))
    frozen = engine.freeze(load(folder))
    with torch.no_grad():
        found, expected = frozen(IDS).logits, engine.forward(IDS).logits
        exact = engine.module(IDS).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, exact), "the computation is in bfloat16"
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_kl_is_exactly_zero_and_the_ratio_one_before_anything_was_learned(tmp_path, prompts):
    stage = PPO(ppo_runs.config(tmp_path / "run", prompts, precision="bfloat16"), resume=False, overwrite=False)
    figures = stage.update(0)
    assert figures["objective/kl"] == figures["objective/kl_k3"] == 0.0
    assert figures["policy/first_ratio_min"] == figures["policy/first_ratio_max"] == 1.0
    assert stage.update(1)["objective/kl_k3"] > 0


def test_a_rollout_rounds_frozen_weights_once_and_gives_them_back(tmp_path, prompts, monkeypatch):
    tuning = {"name": "lora", "rank": 4}
    answers = []
    for rounds in (True, False):
        if not rounds:
            monkeypatch.setattr("rlhf.training.engine.cast_frozen_linears_", lambda module, dtype, tied=False: [])
        c = ppo_runs.config(tmp_path / str(rounds), prompts, precision="bfloat16", tuning=tuning)
        stage, seen = PPO(c, resume=False, overwrite=False), set()
        base = stage.models.engine.module.policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer
        base.register_forward_pre_hook(lambda layer, _, seen=seen: seen.add(layer.weight.dtype))
        weight = base.weight
        answers.append(stage.rollout(stage.draw_prompts(0)).completions)
        assert seen == {torch.bfloat16 if rounds else torch.float32}
        assert base.weight is weight and weight.dtype == torch.float32
    assert answers[0] == answers[1]


def test_dropout_is_off_wherever_a_family_keeps_it(folder):
    model = load(folder).train()
    first = model(IDS).logits
    assert torch.equal(first, model(IDS).logits)


@pytest.mark.parametrize("key", ["tuning", "critic__tuning"])
def test_dropout_in_adapters_is_refused_in_ppo(key, tmp_path):
    with pytest.raises(UserError, match=r"tuning\.dropout: PPO's ratio"):
        ppo_runs.config(tmp_path / "run", "prompts", **{key: {"name": "lora", "dropout": 0.1}})


def test_recomputed_activations_change_no_number(tmp_path, prompts):
    passes, weights = [], []
    for recompute in (False, True):
        c = ppo_runs.config(tmp_path / str(recompute), prompts, gradient_checkpointing=recompute)
        stage, seen = PPO(c, resume=False, overwrite=False), []
        layers = (
            stage.models.engine.module.policy.model.layers[0],
            stage.models.engine.module.critic.model.model.layers[0],
        )
        for layer in layers:
            layer.self_attn.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        figures = stage.update(0)
        assert figures["policy/first_ratio_min"] == figures["policy/first_ratio_max"] == 1.0
        passes.append(sum(seen))
        weights.append([p.detach().clone() for p in stage.models.engine.module.parameters()])
    assert passes[1] == 2 * passes[0]
    for kept, recomputed in zip(*weights):
        torch.testing.assert_close(kept, recomputed, atol=1e-5, rtol=1e-5)


def test_a_gradient_that_overflows_the_norm_is_not_finite():
    module = nn.Linear(4, 4)
    engine = engine_over(module)
    engine.backward(module.weight.sum() * 1e30, last=True)  # clipped by its norm, infinity, it would become nothing
    assert engine.step(1.0) is None


def test_log_probs_and_gradients_do_not_depend_on_the_parts_that_the_head_works_in(folder):
    wanted = torch.arange(12).expand(3, 12) >= 4
    results = []
    for chunks in (1, 5):
        model, calls = load(folder), []
        model.get_output_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        logprobs, entropies, _ = token_logprobs(model, IDS, torch.ones_like(IDS), wanted, 0.7, chunks)
        (logprobs.sum() + entropies.square().sum()).backward()
        assert len(calls) == 2 * chunks - 1  # the backward pass computes all parts but the last again
        results.append([logprobs, entropies, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, many in zip(*results):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_log_probs_entropies_and_gradients_are_those_of_full_logits(temperature, entropy, folder):
    wanted = torch.arange(12).expand(3, 12) >= 4
    weights = torch.linspace(-1, 1, int(wanted.sum()), dtype=torch.float64)
    results = []
    for written_out in (False, True):
        model = load(folder).double()
        if written_out:
            logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, :-1].double()
            every = (logits / temperature).log_softmax(-1)[wanted[:, 1:]]
            logprobs = every.gather(-1, IDS[:, 1:][wanted[:, 1:]][:, None]).squeeze(-1)
            entropies = torch.distributions.Categorical(logits=every).entropy()
        else:
            logprobs, entropies, _ = token_logprobs(model, IDS, torch.ones_like(IDS), wanted, temperature)
        loss = (weights * logprobs).sum()
        (loss + entropy * (weights * entropies).sum() if entropy else loss).backward()
        results.append([logprobs, entropies, *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_a_frozen_head_gives_the_log_probs_of_a_trained_one_and_its_gradients(precision, entropy, folder):
    model = load(folder).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    model.get_output_embeddings().weight.data.mul_(10)
    mask_unknown_ids(model, 60)
    states = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    weights = torch.linspace(-1, 1, 9)
    results = []
    for frozen in (False, True):
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        assert is_frozen_product(model) == frozen
        hidden = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            logprobs, entropies, _ = head_logprobs(model, hidden, IDS.flatten()[:9].clamp(max=59), 0.7, chunks=4)
        loss = (weights * logprobs).sum()
        (loss + entropy * (weights * entropies).sum() if entropy else loss).backward()
        results.append((logprobs, entropies, hidden.grad))
    for expected, found in zip(results[0][:2], results[1][:2]):
        assert torch.equal(found, expected), "a policy and its reference would differ before anything was learned"
    tolerance = 1e-6 if precision == "float32" else 0.01
    assert results[0][2].abs().max() > 0.1
    torch.testing.assert_close(results[1][2], results[0][2], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize("option", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_head_whose_logits_are_changed_is_not_a_product_alone(option, folder):
    model = load(folder).requires_grad_(False)
    assert is_frozen_product(model)
    model.config.update({option: 8.0})
    assert not is_frozen_product(model)


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_a_rollout_rounds_a_frozen_head_once_and_leaves_its_embedding(folder):
    model = load(folder).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    engine = make_engine(
        model, [{"params": [model.model.norm.weight], "lr": 0.1}], PPOOptimizerConfig(), "bfloat16", None
    )
    with torch.no_grad():
        expected = engine.forward(IDS).logits
        with engine.gathered(model):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.model.embed_tokens.weight.dtype == torch.float32
            found = model(IDS).logits
    assert torch.equal(found, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_entropy_has_a_gradient_where_its_bonus_has_a_weight(tmp_path, prompts):
    """The figure is the same without one; the bonus makes the policy's entropy grow."""
    nothing = {"name": "function", "function": "ppo_rewards:nothing"}
    found = {}
    for coef in (0.0, 10.0):
        changes = {"loss__entropy_coef": coef, "reward": nothing, "kl__controller": {"name": "fixed", "coef": 0.0}}
        stage = PPO(ppo_runs.config(tmp_path / str(coef), prompts, **changes), resume=False, overwrite=False)
        found[coef] = [stage.update(number) for number in range(2)]
    assert found[0.0][0]["objective/entropy"] == found[10.0][0]["objective/entropy"]
    assert found[0.0][0]["policy/entropy"] > 0
    assert found[10.0][0]["policy/entropy"] > found[0.0][0]["policy/entropy"]
    assert found[10.0][1]["objective/entropy"] > found[0.0][1]["objective/entropy"]
