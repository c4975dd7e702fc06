"""Models that cannot be used, and what the refusal says to do."""

from __future__ import annotations

import json
import shutil

import ppo_runs
import pytest
import tiny
import transformers

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.inference.policy import open_policy
from rlhf.inference.sampling import complete
from rlhf.models.load import load_policy
from rlhf.models.scalar import load_scalar
from stages import ppo


def test_a_classifier_with_two_labels_is_no_reward_model(tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny.llama(), num_labels=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a classifier with 2 labels"):
        load_scalar(ModelConfig(path=str(tmp_path)), str(tmp_path))


def test_a_model_folder_whose_adapter_config_points_elsewhere_is_refused(tmp_path):
    folder = shutil.copytree(tiny.llama(), tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other/x"}))
    for load in (load_policy, load_scalar):
        with pytest.raises(UserError, match="holds a model and an adapter") as refused:
            load(ModelConfig(path=str(folder)), str(folder))
        assert "Remove adapter_config.json" in str(refused.value.remedy)


RWKV = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "context_length": 128,
    "attention_hidden_size": 32,
}


def test_a_family_without_a_cache_of_transformers_is_refused_by_ppo_before_its_weights_are_loaded(demos, tmp_path):
    path = str(tmp_path / "without-weights")
    shutil.copytree(tiny.of_family("rwkv", RWKV), path, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="RwkvForCausalLM cannot be sampled from") as refused:
        ppo.run(ppo_runs.config(tmp_path / "ppo", demos, model={"path": path}))
    assert "SFT, reward model and export work" in str(refused.value.remedy)
    assert not (tmp_path / "ppo").exists()


def test_a_family_without_a_cache_of_transformers_is_refused_by_the_sampler():
    policy = open_policy(tiny.of_family("rwkv", RWKV))
    with pytest.raises(UserError, match="RwkvForCausalLM cannot be sampled from"):
        complete(policy, ["Hello."], max_new_tokens=4)
