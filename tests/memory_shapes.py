"""Models without weights, and configs whose memory is predicted."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import check_config

SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 64}
SHAPE |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def shape(folder: Path, layers: int = 2, **more: object) -> str:
    """A model folder that holds a config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers} | more), "utf-8")
    return str(folder)


def ppo(path: str, **more: object):
    values = {"run": "runs/x", "model": {"path": path}, "data": {"prompts": "x", "max_prompt_tokens": 32}}
    values |= {"reward": {"name": "model", "path": path}, "rollout": {"max_new_tokens": 32, "prompts_per_update": 16}}
    return check_config(STAGES["ppo"], values | more, "test")


def sft(path: str, **more: object):
    values = {"run": "runs/x", "model": {"path": path, "max_length": 64}, "data": {"train": "x"}}
    return check_config(STAGES["sft"], values | more, "test")
