"""PPO from a real pretrained model on real story openings, by a programmatic reward: the reward rises at bounded KL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config.load import check_config
from rlhf.data.jsonl import from_dict
from rlhf.data.writer import DatasetWriter
from rlhf.ppo.config import PPOConfig
from stages.ppo import run

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


def write_openings(shared: Path, folder: Path) -> str:
    """The first eight words of each story, every tenth one held out."""
    lines = (shared / "data" / "text" / "tinystories_1000.jsonl").read_text("utf-8").splitlines()
    openings = sorted({" ".join(json.loads(line)["text"].split()[:8]) for line in lines})
    with DatasetWriter(folder / "openings", "prompt", overwrite=True) as writer:
        for i, opening in enumerate(openings):
            writer.write(
                from_dict({"prompt": opening, "source": "tinystories", "split": "train" if i % 10 else "eval"})
            )
    return str(folder / "openings")


def story_config(shared: Path, folder: Path, updates: int, rate: float = 4e-4) -> PPOConfig:
    """64 episodes of up to 64 tokens an update, 4 epochs, KL coefficient 0.05.

    Seeds differ widely in when the reward takes off: at 96 tokens and 3e-4, 0.60 was first reached at updates 11 to 22.
    """
    values = {
        "run": str(folder / "run"),
        "model": {"path": str(shared / "models" / "stories260K"), "chat_template": "plain"},
        "data": {"prompts": write_openings(shared, folder), "max_prompt_tokens": 32},
        "reward": {"name": "function", "function": "story_rewards:animal_share"},
        "critic": {"init": "policy"},
        "updates": updates,
        "rollout": {"prompts_per_update": 64, "max_new_tokens": 64, "temperature": 0.7},
        "kl": {"controller": {"name": "fixed", "coef": 0.05}},
        "batch": {"epochs": 4, "minibatches": 4},
        "optimizer": {"policy_lr": rate, "critic_lr": rate, "schedule": "linear"},
        "eval": {"every": updates, "prompts": 64},
        "checkpoints": {"every": updates},
    }
    return check_config(PPOConfig, values, "stories")


def test_the_reward_rises_clearly_within_30_updates_at_bounded_kl(shared, tmp_path, record_property):
    config = story_config(shared, tmp_path, updates=30)
    run(config)
    lines = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "objective/kl_coef" in line]
    first, last = [sum(u["objective/scores"] for u in part) / len(part) for part in (updates[:2], updates[-5:])]
    held_out = [line["eval/scores"] for line in lines if "eval/scores" in line]
    seconds = sum(u[f"time/{phase}"] for u in updates for phase in ("rollout", "score", "learn"))
    reached = [next((u["step"] for u in updates if u["objective/scores"] >= bar), None) for bar in (0.6, 0.74)]
    record_property(
        "figures",
        f"stories: share of sentences that name an animal {first:.3f} -> {last:.3f} (held out "
        f"{held_out[0]:.3f} -> {held_out[-1]:.3f}), KL {updates[-1]['objective/kl']:.1f}, {seconds:.0f} s; "
        f"0.60 and 0.74 first reached at updates {reached}",
    )
    assert first < 0.2
    assert last > 0.6
    assert held_out[-1] > held_out[0] + 0.3
    assert updates[-1]["objective/kl"] < 30
