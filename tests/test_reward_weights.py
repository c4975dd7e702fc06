"""A ranking's weight in the reward stage: one of weight w counts as w rankings, however the batch is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logged import lines as metrics_of
from reward_runs import config, encoded, steps
from torch.nn import functional as F

from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.writer import DatasetWriter
from rlhf.models.scalar import load_scalar
from rlhf.reward.collator import RankingCollator
from rlhf.reward.config import RewardConfig
from rlhf.runs.run import read_run
from stages import reward

WEIGHTS = (1.0, 3.0, 2.0)


def ranking(number: int, weight: float = 1.0, split: str = "train") -> Ranking:
    texts = [tiny.answer(number, length) for length in (2, 0, 1)]
    return Ranking(
        (Message("user", tiny.question(number)),), split=split, candidates=tuple(map(Candidate, texts)),
        ranks=(1, 2, 3) if number % 2 else (2, 1, 1), weight=weight,
    )  # fmt: skip


def write(path: Path, rankings: list[Ranking]) -> str:
    with DatasetWriter(path, "ranking", overwrite=True) as writer:
        for item in rankings:
            writer.write(item)
    return str(path)


def weighted(split: str = "train", start: int = 0) -> list[Ranking]:
    """Twelve rankings of weights 1, 3, 2, 1, ...: 24 in all."""
    return [ranking(start + i, WEIGHTS[i % 3], split) for i in range(12)]


def copied(rankings: list[Ranking]) -> list[Ranking]:
    """Each as often as it weighs, with weight 1."""
    return [replace(item, weight=1.0) for item in rankings for _ in range(int(item.weight))]


def trained(path: Path, rankings: list[Ranking], micro: int = 4, **values: Any) -> tuple[RewardConfig, list[dict]]:
    """One step over all training rankings together, and what it logged."""
    count = sum(item.split == "train" for item in rankings)
    batch = {"batch_size": count, "micro_batch_size": micro, "max_steps": 1}
    made = config(path, write(path / "data", rankings), batch=batch, normalize="none", **values)
    reward.run(made)
    return made, metrics_of(made.run)


def test_a_batch_holds_the_weights_or_ones() -> None:
    chat = load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())
    rows = [{"prompt": [1], "candidates": [[3], [4]], "ranks": [1, 2], "ratings": [None] * 2, "weight": 0.25}] * 2
    assert RankingCollator(chat)(rows).rankings.weights.tolist() == [0.25, 0.25]
    assert RankingCollator(chat, weighted=False)(rows).rankings.weights.tolist() == [1, 1]
    assert RankingCollator(chat)(rows).rankings.weights.dtype == torch.float32


def test_the_loss_is_the_weighted_mean_by_plain_transformers(tmp_path: Path) -> None:
    made, rows = trained(tmp_path, weighted(), seed=5)
    chat = load_tokenizer(made.model, tiny.llama())
    torch.manual_seed(5)
    model = load_scalar(made.model, tiny.llama()).model.eval()
    total = 0.0
    for row in encoded(str(tmp_path / "data"), chat, "train"):
        with torch.no_grad():
            a, b, c = (model(torch.tensor([row["prompt"] + answer])).logits[0, 0] for answer in row["candidates"])
        gaps = [a - b, a - c, b - c] if row["ranks"] == [1, 2, 3] else [b - a, c - a]
        total += row["weight"] * float(sum(-F.logsigmoid(gap) for gap in gaps)) / len(gaps)
    assert rows[0]["train/loss"] == pytest.approx(total / 24, rel=1e-5)


@pytest.mark.parametrize(
    "values", [{}, {"center_rewards_coefficient": 0.3}, {"loss": "davidson"}], ids=["plain", "centred", "ties"]
)
def test_a_ranking_of_weight_w_counts_as_w_rankings(values: dict[str, Any], tmp_path: Path) -> None:
    """In the loss, in the gradient, and in the held-out loss after it."""
    data = weighted() + weighted("eval", 100)
    once, many = trained(tmp_path / "once", data, **values)[1], trained(tmp_path / "many", copied(data), **values)[1]
    torch.testing.assert_close(
        steps(once, "train/loss", "optimizer/grad_norm"),
        steps(many, "train/loss", "optimizer/grad_norm"),
        rtol=1e-4,
        atol=1e-6,
    )
    assert once[-1]["eval/loss"] == pytest.approx(many[-1]["eval/loss"], rel=1e-5)
    plain = trained(tmp_path / "plain", [replace(item, weight=1.0) for item in data], **values)[1]
    assert abs(plain[0]["train/loss"] / once[0]["train/loss"] - 1) > 1e-3  # the weights do matter in this data


def test_the_size_of_all_weights_does_not_matter(tmp_path: Path) -> None:
    """Weights that sum to less than 1 too: nothing is divided by a count."""
    rows = []
    for scale in (1.0, 1 / 1024):
        data = [replace(item, weight=item.weight * scale) for item in weighted()]
        rows.append(trained(tmp_path / str(scale), data)[1])
    torch.testing.assert_close(
        steps(rows[0], "train/loss", "optimizer/grad_norm"), steps(rows[1], "train/loss", "optimizer/grad_norm")
    )


def test_accumulated_micro_batches_give_the_weighted_mean_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = trained(tmp_path / "whole", weighted(), micro=12)[1], trained(tmp_path / "parts", weighted(), 1)[1]
    torch.testing.assert_close(
        steps(whole, "train/loss", "optimizer/grad_norm"),
        steps(parts, "train/loss", "optimizer/grad_norm"),
        rtol=2e-4,
        atol=1e-5,
    )


def test_ignored_weights_train_the_very_model_that_weights_of_1_do(tmp_path: Path) -> None:
    ones = [replace(item, weight=1.0) for item in weighted() + weighted("eval", 100)]
    heavy = weighted() + weighted("eval", 100)
    runs = []
    for name, weights, data in (("ones", "use", ones), ("ignored", "ignore", heavy)):
        made = config(tmp_path / name, {"train": write(tmp_path / name / "data", data), "weights": weights})
        reward.run(made)
        runs.append((metrics_of(made.run), read_run(made.run)["model_fingerprint"]))
    assert runs[0] == runs[1]


def test_accuracy_is_over_rankings_as_they_are(tmp_path: Path) -> None:
    data = weighted() + weighted("eval", 100)
    first = read_run(trained(tmp_path / "a", data, optimizer={"lr": 1e-12})[0].run)
    light = [replace(item, weight=1.0) if item.split == "eval" else item for item in data]
    second = read_run(trained(tmp_path / "b", light, optimizer={"lr": 1e-12})[0].run)
    for name in ("accuracy", "log_loss", "calibration_error"):
        assert first["metrics"][name] == pytest.approx(second["metrics"][name], rel=1e-5)
