"""`rlhf demo`: repeatable, never in the way of other folders, exact after a kill, and better by the hidden rule."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_demo

from data_tools.demo_world.rules import judge, points
from rlhf.core.errors import UserError
from rlhf.data.schema import Message, Prompt
from stages.demo import OVERRIDES, Demo

ROOT = Path(__file__).parents[1]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.cli", "demo", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )


# ---- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_demo_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = command("--out", tmp_path, "--overwrite")
    assert done.returncode == 2 and "exists and is not a demo" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_demo_of_another_seed_is_refused(tmp_path):
    (tmp_path / "demo.json").write_text('{"seed": 1, "seconds": {}}')
    with pytest.raises(UserError, match="holds a demo of seed 1, not 2") as error:
        Demo(tmp_path, 2).run()
    assert "--overwrite" in error.value.remedy


def test_a_negative_seed_is_refused():
    assert command("--seed", "-1").returncode == 2


@pytest.mark.parametrize("stage", OVERRIDES)
def test_the_configs_name_the_demos_own_folders(stage):
    """What a user reads in configs/demo is what the demo runs in its default folder."""
    import yaml

    config = yaml.safe_load((ROOT / "configs" / "demo" / f"{stage}.yaml").read_text("utf-8"))
    for key, folder in OVERRIDES[stage].items():
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == f"runs/demo/{folder}"


# ---- whole demos --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small demo that ran without interruption."""
    out = tmp_path_factory.mktemp("small") / "demo"
    made = small_demo.start(out)
    assert made.wait(600) == 0, made.text
    return out


def figures(out: Path) -> dict[str, object]:
    """A summary without what differs between two demos of one seed: times and the folder's name."""
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    return {key: value for key, value in summary.items() if key not in ("seconds", "export")}


@pytest.mark.slow
def test_a_demo_given_again_says_that_it_is_complete(small):
    before = (small / "summary.json").read_bytes()
    done = command("--out", small, "--seed", 5)
    assert done.returncode == 0 and "complete; start again with --overwrite" in done.stdout
    assert "prompts won" in done.stdout and "[1/" not in done.stdout
    assert (small / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_a_demo_killed_in_several_parts_goes_on_to_the_same_figures(small, tmp_path):
    out = tmp_path / "demo"
    for sign in ("data/prompts/manifest.json", "sft/run.json", "ppo/checkpoints/step-00000002"):
        child = small_demo.start(out)
        while not (out / sign).exists():
            assert child.poll() is None, "the demo ended before it could be killed"
            time.sleep(0.01)
        child.kill()
        assert not (out / "summary.json").exists()
    last = small_demo.start(out)
    assert last.wait(600) == 0 and "holds this demo" not in last.text, last.text
    assert figures(out) == figures(small)


@pytest.mark.slow
def test_what_was_held_out_is_in_no_training_data(small):
    from rlhf.data.store import open_dataset

    trained = {
        record.prompt_id
        for name in ("prompts", "demonstrations", "rankings")
        for record in open_dataset(small / "data" / name).records("train")
    }
    tested = {record.prompt_id for record in open_dataset(small / "data" / "prompts").records("test")}
    assert len(tested) == small_demo.SMALL.tested and not trained & tested
    assert not any(r.split == "test" for r in open_dataset(small / "data" / "demonstrations").records())


@pytest.mark.slow
def test_people_and_the_policy_wrote_the_candidates(small):
    from rlhf.data.store import open_dataset

    rankings = list(open_dataset(small / "data" / "rankings").records())
    kinds = [candidate.author_kind for ranking in rankings for candidate in ranking.candidates]
    assert 0 < kinds.count("person") < kinds.count("model")
    assert max(len(ranking.candidates) for ranking in rankings) == 4
    assert any(len(set(ranking.ranks)) < len(ranking.ranks) for ranking in rankings)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ppo_wins_by_the_hidden_rule_at_a_bounded_kl(tmp_path):
    out = Path(os.environ.get("FINISHED_DEMO", tmp_path / "demo"))  # what `make demo` has left, in CI
    if "FINISHED_DEMO" not in os.environ:
        done = command("--out", out, "--seed", 3)
        assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    compared, reward = summary["comparison"], summary["reward_model"]
    assert compared["win_rate"] >= 0.75 and compared["interval"][0] > 0.7
    assert summary["kl"] < 8
    assert 0.72 < reward["agreement"] < 0.82
    assert reward["longer_accuracy"] < reward["accuracy"] < reward["rule_accuracy"] < reward["ceiling"]
    text = (out / "summary.md").read_text("utf-8")
    assert f"{compared['win_rate']:.1%}" in text and f"rlhf chat {out}/export" in text
    assert loads_without_us(shutil.copytree(out / "export", tmp_path / "policy"))


def loads_without_us(folder: Path) -> bool:
    """Whether plain transformers, in a process that cannot import this project, gets an answer from the policy."""
    code = (
        "from transformers import pipeline; "
        f"chat = pipeline('text-generation', {str(folder)!r}); "
        "asked = [{'role': 'user', 'content': 'What does the red fox in Norway eat?'}]; "
        "print(chat(asked, max_new_tokens=48)[0]['generated_text'][-1]['content'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    return done.returncode == 0 and "fox" in done.stdout


def test_the_hidden_rule_is_a_reward_for_evaluations():
    request = Prompt((Message("user", "What does the red fox in Finland eat?"),))
    polite = "The red fox in Finland eats mice. You are welcome."
    assert points(request.chat, polite) == judge(request, polite).points
    assert points(request.chat, polite) > points(request.chat, "")
