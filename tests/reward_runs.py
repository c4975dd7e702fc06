"""Short runs of the reward stage on the tiny models, and what they logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from rlhf.config.load import check_config
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.encode_records import EncodingCounts, encode_ranking
from rlhf.data.store import open_dataset
from rlhf.reward.config import RewardConfig


def config(path: Path, data: str | dict[str, str], **values: Any) -> RewardConfig:
    """A short run on the tiny Llama: 5 steps of 8 rankings of a dataset, or of what `data` says; one evaluation."""
    data = {"train": data} if isinstance(data, str) else data
    base = {"run": str(path / "run"), "model": {"path": tiny.llama()}, "data": data, "eval": {"every": 5}}
    base |= {"batch": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 5}, "optimizer": {"lr": 3e-3}}
    return check_config(RewardConfig, base | values, "test")


def steps(rows: list[dict[str, Any]], *names: str) -> torch.Tensor:
    """[steps, names] of the training lines."""
    return torch.tensor([[row[name] for name in names] for row in rows if "train/loss" in row])


def encoded(data: str, chat: ChatTokenizer, split: str = "eval") -> list[dict[str, Any]]:
    """The rows of a dataset's split."""
    rows = [encode_ranking(record, chat, 128, EncodingCounts()) for record in open_dataset(data).records(split)]
    return [row for row in rows if row is not None]
