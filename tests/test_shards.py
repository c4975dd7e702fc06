"""A model that is written file by file is the model that transformers writes at once."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.config.base import ModelConfig
from rlhf.models.load import load_policy
from rlhf.tuning import shards
from rlhf.tuning.methods import TUNING

EXPERTS = {
    **tiny.SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16
}  # fmt: skip


def weights_in(folder):
    return {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("size", [20_000, 10**9], ids=["many files", "one file"])
@pytest.mark.parametrize("family", ["tied", "untied", "experts", "joined"])
def test_the_folder_is_that_of_save_pretrained(family, size, tuning, tmp_path, monkeypatch):
    path = {
        "tied": tiny.llama, "untied": lambda: tiny.of_family("llama", tiny.SMALL),
        "experts": lambda: tiny.of_family("qwen3_moe", EXPERTS),
        "joined": lambda: tiny.of_family("hrm_text", tiny.SMALL),  # queries, keys, values are one tensor of the file
    }[family]()  # fmt: skip
    model = TUNING.pick(tuning)(load_policy(ModelConfig(path=path), path), None, "causal")
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    base = model.get_base_model() if tuning == "lora" else model
    base.save_pretrained(tmp_path / "theirs", state_dict=tiny.merged_state(model))
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    shards.save_weights(tmp_path / "ours", model)
    ours, theirs = weights_in(tmp_path / "ours"), weights_in(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    files = sorted(file.name for file in (tmp_path / "ours").glob("model*"))
    if size > 20_000:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys() and len(files) > 4
        largest = max(weight.nbytes for weight in (*base.parameters(), *ours.values()))
        sizes = [sum(w.nbytes for w in load_file(f).values()) for f in (tmp_path / "ours").glob("*.safetensors")]
        assert max(sizes) <= max(size, largest) and sum(sizes) == index["metadata"]["total_size"]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
