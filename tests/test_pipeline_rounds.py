"""Rounds of a pipeline: answers are proposed, people rank them, and the next training reads all rankings."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from pipeline_configs import DRY_RUN, rlhf, write_place
from rows import jsonl

from data_tools.annotate.rounds import Round
from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.jsonl import to_dict
from rlhf.data.store import open_dataset
from stages import pipeline, pipeline_steps


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with datasets, a model, the three configs and the pipeline's."""
    monkeypatch.chdir(tmp_path)
    return write_place(tmp_path)


ROUNDS = {"count": 2, "folder": "data/round-{round}", "prompts": "prompts", "size": 4, "k": 3, "max_new_tokens": 8}


def with_rounds(place: Path, **changes: object) -> None:
    """Give the pipeline rounds, and prompts for them."""
    values = yaml.safe_load((place / "all.yaml").read_text("utf-8"))
    values["rounds"] = ROUNDS | changes
    (place / "all.yaml").write_text(yaml.safe_dump(values), "utf-8")
    tiny.write_demonstrations(place / "prompts", 12, 4)  # split as the rankings are


def without_rankings(place: Path) -> None:
    """Nobody has ranked anything yet."""
    values = yaml.safe_load((place / "reward.yaml").read_text("utf-8"))
    (place / "reward.yaml").write_text(yaml.safe_dump(values | {"data": {"train": []}}), "utf-8")


@pytest.mark.parametrize(
    ("prompts", "rankings", "leaks"),
    [
        ({"prompt": "A?"}, {"split": "eval"}, True),
        ({"prompt": "A?", "split": "train"}, {"split": "eval"}, True),
        ({"prompt": "A?", "split": "eval"}, {"split": "train"}, True),
        ({"prompt": "A?", "split": "eval"}, {"split": "eval"}, False),
        ({"prompt": "A?"}, {}, False),
        ({"prompt": "B?"}, {"split": "eval"}, False),
        ({"prompt": "A?", "split": "test"}, {"split": "train"}, False),
    ],
)
def test_prompts_in_another_split_than_in_the_rankings_are_refused_before_people_rank(place, prompts, rankings, leaks):
    base = [{"prompt": "A?", "candidates": ["B", "C"], "ranks": [1, 2], **rankings}]
    base += [{"prompt": "X?", "candidates": ["B", "C"], "ranks": [1, 2], "split": "train"}]
    jsonl(place / "base.jsonl", base)
    jsonl(place / "prompts.jsonl", [prompts])
    with_rounds(place, prompts="prompts.jsonl")
    words = ["reward.data.train=base.jsonl"]
    with pytest.raises(UserError, match="1 prompts of prompts") if leaks else contextlib.nullcontext():
        pipeline.run("all.yaml", words, DRY_RUN)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"folder": "data/round"}, "every round needs its own; put {round} into 'data/round'"),
        ({"k": 1}, "rounds.k: Input should be greater than or equal to 2"),
        ({"siez": 3}, "rounds.siez: unknown key; did you mean 'size'?"),
        ({"prompts": "nowhere"}, "rounds.prompts: nowhere: there is no dataset"),
    ],
)
def test_faults_of_the_rounds_are_found_before_the_first_stage(place, changes, fault):
    with_rounds(place, **changes)
    with pytest.raises(UserError, match=re.escape(fault)):
        pipeline.run("all.yaml")
    assert not (place / "runs").exists()


def test_the_rounds_in_the_documentation_are_a_pipelines():
    (block,) = re.findall(r"```yaml\n(.*?)```", (tiny.REPOSITORY / "docs" / "rounds.md").read_text("utf-8"), re.DOTALL)
    config = check_config(PipelineConfig, yaml.safe_load(block), "docs/rounds.md")
    assert config.rounds is not None and config.rounds.count == 3


def test_rounds_need_a_reward_stage_and_a_policy(place):
    (place / "two.yaml").write_text(yaml.safe_dump({"name": "two", "sft": "sft.yaml", "rounds": ROUNDS}), "utf-8")
    with pytest.raises(UserError, match="rounds: needs a reward stage"):
        pipeline_steps.read_pipeline("two.yaml", [])


def test_rounds_whose_rankings_would_never_reach_the_policy_are_refused(place):
    with_rounds(place)
    reward = "ppo.reward={name: function, function: 'math:log'}"
    with pytest.raises(UserError, match="the reward of PPO does not name the run runs/reward"):
        pipeline.run("all.yaml", [reward, "ppo.critic.init=policy"])


def test_a_round_trains_runs_of_its_own_on_the_rankings_of_all_rounds(place):
    with_rounds(place)
    _, steps = pipeline_steps.read_pipeline("all.yaml", ["reward.seed=5"])
    rounds = [Round(n, Path(f"data/round-{n}")) for n in (1, 2)]
    reward, ppo = (pipeline_steps.in_round(step, steps, rounds) for step in steps[1:])
    assert reward.config.run == "runs/reward-round-2" and reward.config.seed == 5
    assert reward.config.data.train == ["rankings", "data/round-1/collected", "data/round-2/collected"]
    assert (ppo.config.run, ppo.config.reward_model) == ("runs/ppo-round-2", "runs/reward-round-2")
    assert ppo.config.model.path == "runs/sft", "each round starts from the same policy"


def test_a_reward_model_inside_a_sum_is_the_rounds_own_too(place):
    values = yaml.safe_load((place / "ppo.yaml").read_text("utf-8"))
    terms = [{"name": "model", "path": "runs/reward", "weight": 0.5}, {"name": "function", "function": "math:log"}]
    values["reward"] = {"name": "sum", "terms": terms}
    (place / "ppo.yaml").write_text(yaml.safe_dump(values), "utf-8")
    _, steps = pipeline_steps.read_pipeline("all.yaml", [])
    ppo = pipeline_steps.in_round(steps[2], steps, [Round(1, Path("r1"))])
    assert ppo.config.reward.options["terms"] == [{**terms[0], "path": "runs/reward-round-1"}, terms[1]]


def test_the_newest_policies_answer_and_without_any_the_model_that_ppo_starts_from(place):
    _, steps = pipeline_steps.read_pipeline("all.yaml", [])
    assert pipeline_steps.policies(steps, steps) == ["runs/ppo", "runs/sft"]
    assert pipeline_steps.policies(steps, steps[:1]) == ["runs/sft"]
    assert pipeline_steps.policies(steps, []) == ["runs/sft"], "ppo.model.path"


def test_without_any_rankings_the_first_training_is_instruction_tuning_alone(place, capsys):
    without_rankings(place)
    with pytest.raises(UserError, match="no record to train on"):
        pipeline.run("all.yaml", start=DRY_RUN)
    with_rounds(place)
    pipeline.run("all.yaml", start=DRY_RUN)
    text = capsys.readouterr().out
    assert "Preflight: sft" in text and "Preflight: reward" not in text and "sft trained" in text


def rank_here(place: Path, turn: int, rankings: int) -> None:
    """Somebody ranks so many of a round's proposals at the terminal."""
    words = ("data", "rank", f"data/round-{turn}/candidates", "--annotator", "anna")
    done = rlhf(place, *words, stdin="2 > 1 = 3\n3 2 1\n" * (rankings // 2) + "q\n")
    assert done.returncode == 0 and "ranked" in done.stdout, done.stdout + done.stderr


def count(path: Path) -> int:
    return json.loads((path / "manifest.json").read_text("utf-8"))["count"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_rounds_from_no_rankings_at_all_wait_for_people_and_end_with_the_export(place):
    without_rankings(place)
    with_rounds(place, min_rankings=4)
    model = f"sft.model.path={tiny.llama()}"
    words = ("pipeline", "--config", "all.yaml", model)

    waits = tiny.command(place, *words)
    assert waits.returncode == pipeline.WAITING, waits.stdout
    assert "Round 1 of 2 waits for people: 0 of 4 rankings have arrived in data/round-1/rankings*" in waits.stdout
    assert "rlhf data rank data/round-1/candidates --annotator NAME" in waits.stdout
    assert f"rlhf pipeline --config all.yaml {model}" in waits.stdout
    assert not (place / "runs" / "reward").exists()
    proposed = list(open_dataset(place / "data/round-1/candidates", "proposal").records())
    assert len(proposed) == 4 and {len(p.candidates) for p in proposed} == {3}

    rank_here(place, 1, 2)
    assert "2 of 4 rankings" in tiny.command(place, *words).stdout
    rank_here(place, 1, 2)
    waits = tiny.command(place, *words)
    assert waits.returncode == pipeline.WAITING and "Round 2 of 2" in waits.stdout, waits.stdout
    assert "complete already" in waits.stdout and (place / "runs/ppo-round-1/model").is_dir()
    first = {p.prompt_id for p in proposed}
    second = list(open_dataset(place / "data/round-2/candidates", "proposal").records())
    assert not first & {p.prompt_id for p in second}
    assert {"runs/ppo-round-1", "runs/sft"} == {
        c.author for p in second for c in p.candidates if c.author_kind == "model"
    }

    late = open_dataset(place / "data/round-1/rankings-anna.jsonl", "ranking")
    with open(place / "data/round-1/rankings-late.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(to_dict(replace(r, annotator="late"))) + "\n" for r in late.records())
    done = tiny.command(place, *words)  # four late ones of the first round are enough for the second
    assert done.returncode == 0, done.stdout
    assert (place / "out" / "model.safetensors").is_file() and "from runs/ppo-round-2" in done.stdout
    assert [count(place / f"data/round-{n}/collected") for n in (1, 2)] == [4, 4]
    data = json.loads((place / "runs/reward-round-2/run.json").read_text("utf-8"))["data"]
    assert [d["path"] for d in data] == ["data/round-1/collected", "data/round-2/collected"]
    origin = json.loads((place / "data/round-1/collected/manifest.json").read_text("utf-8"))["origin"]
    parents = [parent["path"] for parent in origin["parents"]]
    assert parents == ["data/round-1/candidates", "data/round-1/rankings-anna.jsonl"]

    again = tiny.command(place, *words)
    assert again.returncode == 0 and again.stdout.count("complete already") == 5, again.stdout
