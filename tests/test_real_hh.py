"""Real human pairs through every command that a user would type: import, split, three stages, export, sample."""

from __future__ import annotations

import json

import pytest
import tiny

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

SHORT = {
    "sft": ["batch.max_steps=4", "eval.every=4", "checkpoints.every=2", "data.max_eval_records=32"],
    "reward": ["batch.max_steps=4", "eval.every=4", "checkpoints.every=2", "data.max_eval_records=100"],
    "ppo": ["updates=2", "rollout.prompts_per_update=16", "eval.every=2", "eval.prompts=8"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder: configs and ../shared are found as from the repository root."""
    folder = tmp_path_factory.mktemp("hh") / "main"
    folder.mkdir()
    (folder / "configs").symlink_to(tiny.REPOSITORY / "configs")
    (folder.parent / "shared").symlink_to(tiny.REPOSITORY.parent / "shared")
    return folder


def rlhf(place, *words):
    done = tiny.command(place, *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_three_stages_from_human_pairs_to_an_exported_policy(shared, place, record_property):
    source = "../shared/data/preferences/hh_harmless_base_test.jsonl.gz"
    told = json.loads(
        rlhf(place, "data", "import", "hh-rlhf", source, "--out", "datasets/hh-all", "--json").splitlines()[-1]
    )
    assert told["read"] == 2312 == told["written"] + told["rejected"]
    assert told["rejected"] == sum(told["reasons"].values()) == 4
    rlhf(place, "data", "split", "datasets/hh-all", "--by", "prompt", "--out", "datasets/hh")
    for stage, words in SHORT.items():
        rlhf(place, stage, "--config", f"configs/hh-stories260k/{stage}.yaml", *words)
    rlhf(place, "export", "runs/hh-stories260k/ppo", "--out", "exports/hh")
    said = rlhf(place, "sample", "exports/hh", "--prompt", "How do I make tea?", "--max-new-tokens", "16", "--json")
    assert json.loads(said.splitlines()[-1])["answer"]
    judged = json.loads((place / "runs/hh-stories260k/reward/reward_metrics.json").read_text())
    policy = json.loads((place / "runs/hh-stories260k/ppo/run.json").read_text())["metrics"]
    record_property(
        "figures",
        f"HH harmless: {told['written']} of {told['read']} pairs, rejected: {told['reasons']}; held-out pair accuracy "
        f"{judged['accuracy']:.3f} (longer wins: {judged['longer_accuracy']:.3f}); score "
        f"{policy['eval/scores_at_start']:.2f} -> {policy['eval/scores']:.2f} in two short updates",
    )
    assert judged["pairs"] > 50
