"""The card of an export: its header for the hub, lineage, data and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import huggingface_hub
import pytest
import torch

from rlhf.core.files import write_json
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.export.model_card import lineage


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A finished PPO run and the reward run whose model it used."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    sft = finished.sft(folder / "sft")
    reward = finished.reward(folder / "reward", sft)
    return {"reward": reward, "ppo": finished.ppo(folder / "ppo", sft, reward, temperature=0.7)}


def exported(run: str, out: Path, **options: Any) -> Path:
    """The card of a run's export."""
    export(run, out, EXPORTERS.pick({"name": "hf"}), **options)
    return out / "README.md"


def test_the_cards_header_is_the_hubs(runs: dict[str, str], tmp_path: Path) -> None:
    cards = exported(runs["ppo"], tmp_path / "policy", license="mit"), exported(runs["reward"], tmp_path / "reward")
    policy, reward = (huggingface_hub.ModelCard.load(card).data for card in cards)
    assert (policy.license, policy.library_name, policy.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert (reward.license, reward.pipeline_tag) == ("unknown", "text-classification")
    assert "ppo" in policy.tags and "reward-model" in reward.tags
    assert policy.base_model is None, "a local folder means nothing on the hub"


def test_the_card_tells_the_lineage_with_data_metrics_and_packages(runs: dict[str, str], tmp_path: Path) -> None:
    card = exported(runs["ppo"], tmp_path / "out").read_text()
    stages = [line.split(" | ")[0] for line in card.split("## Lineage")[1].split("##")[0].splitlines() if "`" in line]
    assert stages == ["| start", "| sft", "| reward", "| ppo"]
    assert "| sft | `demos` | demonstration | `dddddddddddddddd` |" in card
    assert "| ppo | eval/scores | 0.5 |" in card and "| reward | accuracy | 0.75 |" in card
    assert f"| torch | {torch.__version__} |" in card
    assert "temperature=0.7" in finished.python_block(card) and "max_new_tokens=12" in finished.python_block(card)


def test_the_card_keeps_the_folders_above_to_itself(runs: dict[str, str], tmp_path: Path) -> None:
    card = exported(runs["ppo"], tmp_path / "out").read_text()
    assert str(Path(runs["ppo"]).parent) not in card


def test_a_hub_model_at_the_beginning_is_the_base_model(tmp_path: Path) -> None:
    run = Path(finished.sft(tmp_path / "run"))
    info = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", info | {"parents": [{"path": "HuggingFaceTB/SmolLM2-135M"}]})
    card = huggingface_hub.ModelCard.load(exported(str(run), tmp_path / "out"))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"


def test_lineage_finds_parents_that_moved_along_and_tells_of_those_that_changed(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    parent = finished.sft(tmp_path / "here" / "parent")
    finished.sft(tmp_path / "here" / "child", model=parent)
    moved = tmp_path / "there"
    (tmp_path / "here").rename(moved)
    assert [a.stage for a in lineage(moved / "child")] == [None, "sft", "sft"]
    info = json.loads((moved / "parent" / "run.json").read_text())
    write_json(moved / "parent" / "run.json", info | {"model_fingerprint": "0" * 64})
    assert [(a.stage, a.note) for a in lineage(moved / "child")] == [
        ("sft", "was trained again since"),
        ("sft", ""),
    ]
    (moved / "parent").rename(tmp_path / "elsewhere")
    assert lineage(moved / "child")[0].note == "no longer exists"
