"""Layers that alternate between dense and banded attention, in all stages, on texts longer than the band."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from transformers import AutoConfig

import stages.ppo
import stages.reward
import stages.sft
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.inference.model_checks import LENGTHS, packing
from rlhf.models.isolation import windows
from rlhf.models.load import quiet
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.sft.config import SFTConfig

WINDOW = 8
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neo": {  # GPT-3's pattern: dense and locally banded layers in turn (Brown et al. 2020, section 2.1)
        "vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gemma2": tiny.SMALL | LAYERS,
    "gemma3_text": tiny.SMALL | LAYERS,
    "gpt_oss": tiny.SMALL | LAYERS | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "mistral": tiny.SMALL | {"sliding_window": WINDOW},
}  # fmt: skip
NEVER_PACKED = ("gpt_oss",)  # its attention on a CPU, `eager`, does not separate packed sequences
BATCH = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 2}
quiet()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages_train_beyond_the_window_and_packing_changes_nothing(tmp_path, family):
    path = tiny.of_family(family, FAMILIES[family])
    base = {"model": {"path": path, "max_length": 128}}
    demos, rankings = tiny.write_demonstrations(tmp_path / "d", 8), tiny.write_rankings(tmp_path / "r", 8)
    runs = {stage: str(tmp_path / stage) for stage in ("sft", "reward", "ppo")}
    supervised = base | {"batch": BATCH, "optimizer": {"lr": 1e-3}}
    stages.sft.run(check_config(SFTConfig, supervised | {"run": runs["sft"], "data": {"train": demos}}, "test"))
    model = {"model": {"path": runs["sft"]}}
    reward = supervised | model | {"run": runs["reward"], "data": {"train": rankings}}
    stages.reward.run(check_config(RewardConfig, reward, "test"))
    values = model | {"run": runs["ppo"], "data": {"prompts": rankings}, "updates": 1, "batch": {"minibatches": 1}}
    values |= {"reward": {"name": "model", "path": runs["reward"]}}
    values |= {"rollout": {"prompts_per_update": 4, "max_new_tokens": 2 * WINDOW}}
    stages.ppo.run(check_config(PPOConfig, values, "test"))
    logged = (tmp_path / "ppo" / "metrics.jsonl").read_text("utf-8").splitlines()
    (update,) = [row for row in map(json.loads, logged) if "policy/first_ratio_min" in row]
    assert update["policy/first_ratio_min"] == update["policy/first_ratio_max"] == 1.0
    assert windows(AutoConfig.from_pretrained(path)) == [WINDOW] and max(LENGTHS) > WINDOW
    if family in NEVER_PACKED:
        with pytest.raises(UserError, match="attend to each other"):
            packing(runs["ppo"], runs["reward"])
    else:
        assert "differ by at most" in packing(runs["ppo"], runs["reward"])
