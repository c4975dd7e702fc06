"""Mixtures of experts: routers without noise, and all stages, full and with LoRA."""

from __future__ import annotations

import pytest
import reward_runs
import sft_runs
import tiny
import torch
import transformers
from logged import updates
from ppo_runs import config

from rlhf.config.base import ModelConfig
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.models.load import load_policy
from rlhf.tuning.merging import adapters_merged, merged_weights
from rlhf.tuning.methods import TUNING
from stages import ppo, reward

LOCAL = {**tiny.SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "phimoe": LOCAL,
    "mixtral": {**LOCAL, "router_jitter_noise": 0.1, "output_router_logits": True},
    "qwen3_moe": {
        **tiny.SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True,
    },
    "gpt_oss": {
        **LOCAL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
        "output_router_logits": True,
    },
}  # fmt: skip


def folder(family: str) -> str:
    """A random model of the family, with the tokenizer of `tiny`."""
    return tiny.of_family(family, FAMILIES[family])


@pytest.mark.parametrize("family", ["phimoe", "mixtral"])
def test_a_router_draws_no_noise_in_training_mode(family):
    policy = load_policy(ModelConfig(path=folder(family)), folder(family)).train()
    ids = torch.randint(3, 320, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (policy(ids).logits for _ in range(2))
        assert first.equal(second)
        torch.testing.assert_close(first, policy.eval()(ids).logits)


def test_merged_weights_of_experts_give_the_logits_of_the_adapter():
    path = folder("mixtral")
    policy = TUNING.pick("lora")(load_policy(ModelConfig(path=path), path), None, "causal").eval()
    draw = torch.Generator().manual_seed(0)
    adapters = {name: p for name, p in policy.named_parameters() if "lora_" in name}
    assert {part for part in ("q_proj", "experts") for name in adapters if part in name} == {"q_proj", "experts"}
    for parameter in adapters.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    ids = torch.randint(3, 320, (4, 20), generator=draw)
    plain = load_policy(ModelConfig(path=path), path).eval()
    with torch.no_grad():
        expected = policy(ids).logits
        with adapters_merged(policy):
            torch.testing.assert_close(policy(ids).logits, expected, rtol=0, atol=1e-4)
        assert (expected - plain(ids).logits).abs().max() > 0.1
        plain.load_state_dict(dict(merged_weights(policy)))
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-4)
        assert policy(ids).logits.equal(expected)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages_run_and_plain_transformers_loads_the_export(family, tuning, demos, rankings, tmp_path):
    batch = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    settings = sft_runs.settings(demos, tmp_path / "sft", model={"path": folder(family)}, batch=batch, tuning=tuning)
    sft = str(sft_runs.run(settings))
    made = reward_runs.config(tmp_path, rankings, model={"path": sft}, batch=batch, tuning=tuning)
    reward.run(made)
    values = {"model__path": sft, "reward": {"name": "model", "path": made.run}, "critic__init": "reward", "updates": 1}
    values |= {"tuning": tuning, "critic__tuning": tuning, "gradient_checkpointing": True}
    ppo.run(config(tmp_path / "ppo", demos, **values))
    first = updates(tmp_path / "ppo")[0]
    assert first["policy/first_ratio_min"] == first["policy/first_ratio_max"] == 1
    export(str(tmp_path / "ppo"), tmp_path / "out", EXPORTERS.pick("hf"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = load_policy(ModelConfig(path=str(tmp_path / "ppo")), str(tmp_path / "ppo/model")).eval()
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask).logits for model in (plain, again))
    torch.testing.assert_close(found, expected)
