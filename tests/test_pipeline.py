"""The pipeline: which stages it runs, skips, continues and refuses; three real stages and the export; rounds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from rows import jsonl

from data_tools.annotate.rounds import Round
from rlhf.cli import entry
from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.config.load import check_config, dump_config
from rlhf.core.errors import UserError
from rlhf.data.jsonl import to_dict
from rlhf.data.schema import SCHEMA_VERSION
from rlhf.data.store import open_dataset
from stages import pipeline, pipeline_steps

REPOSITORY = Path(__file__).resolve().parents[1]

DRY_RUN = pipeline.StartOptions(dry_run=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with datasets, a model, the three configs and the pipeline's."""
    monkeypatch.chdir(tmp_path)
    tiny.write_demonstrations(tmp_path / "demos", 12, 4)
    tiny.write_rankings(tmp_path / "rankings", 12, 4)
    batch = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    configs = {
        "sft": {
            "run": "runs/sft",
            "model": {"path": "base"},
            "data": {"train": "demos"},
            "batch": batch,
            "eval": {"samples": 1},
        },
        "reward": {"run": "runs/reward", "model": {"path": "runs/sft"}, "data": {"train": "rankings"}, "batch": batch},
        "ppo": {
            "run": "runs/ppo",
            "model": {"path": "runs/sft"},
            "data": {"prompts": "rankings", "max_prompt_tokens": 64},
            "reward": {"name": "model", "path": "runs/reward"},
            "updates": 2,
            "rollout": {"prompts_per_update": 4, "max_new_tokens": 8},
            "batch": {"epochs": 1, "minibatches": 1},
            "eval": {"prompts": 2},
        },
    }
    for stage, values in configs.items():
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(values), "utf-8")
    files = {stage: f"{stage}.yaml" for stage in configs}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"name": "toy", **files, "export": "out"}), "utf-8")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}", "utf-8")
    return tmp_path


def pretend(place: Path, stage: str, status: str = "complete", **values: object) -> None:
    """A run of the stage, as it would have left its run.json and config.yaml."""
    _, steps = pipeline_steps.read_pipeline("all.yaml", [])
    config = next(step.config for step in steps if step.stage == stage)
    (place / config.run / "model").mkdir(parents=True)
    (place / config.run / "model" / "config.json").write_text("{}", "utf-8")
    info = {"stage": stage, "status": status, "schema_version": SCHEMA_VERSION, "model_fingerprint": stage, **values}
    (place / config.run / "run.json").write_text(json.dumps(info), "utf-8")
    (place / config.run / "config.yaml").write_text(dump_config(config), "utf-8")


def states(overrides: tuple[str, ...] = ()) -> list[str]:
    return [step.state() for step in pipeline_steps.read_pipeline("all.yaml", overrides)[1]]


def test_overrides_go_to_the_stage_that_they_name(place):
    config, steps = pipeline_steps.read_pipeline("all.yaml", ["name=other", "ppo.updates=7", "sft.batch.max_steps=3"])
    assert config.name == "other"
    assert [step.overrides for step in steps] == [["batch.max_steps=3"], [], ["updates=7"]]
    assert steps[2].config.updates == 7


def test_an_override_for_a_stage_that_the_pipeline_lacks_is_refused(place):
    (place / "two.yaml").write_text("name: two\nsft: sft.yaml\n", "utf-8")
    with pytest.raises(UserError, match="has no ppo stage"):
        pipeline_steps.read_pipeline("two.yaml", ["ppo.updates=7"])


def test_complete_runs_are_skipped_and_interrupted_ones_continued(place):
    assert states() == ["new", "new", "new"]
    pretend(place, "sft")
    pretend(place, "reward", "running", parents=[{"path": "runs/sft", "fingerprint": "sft"}])
    assert states() == ["complete", "interrupted", "new"]


def test_a_run_with_another_config_is_refused_with_the_keys_that_differ(place):
    pretend(place, "sft")
    with pytest.raises(UserError, match="seed: was 0, now 5"):
        states(("sft.seed=5",))


def test_a_run_whose_parent_has_another_result_by_now_is_refused(place):
    pretend(place, "sft")
    pretend(place, "reward", parents=[{"path": "runs/sft", "fingerprint": "an earlier one"}])
    with pytest.raises(UserError, match="was trained from an earlier result of runs/sft"):
        states()


def test_the_dry_run_takes_runs_to_come_as_given_and_shows_every_plan(place, capsys):
    pipeline.run("all.yaml", start=DRY_RUN)
    text = capsys.readouterr().out
    assert all(f"Preflight: {stage}" in text for stage in ("sft", "reward", "ppo"))
    assert "to come: reward run" in text
    assert not (place / "runs").exists()


def pretend_all(place: Path, **statuses: str) -> None:
    """Runs of all three stages, complete unless `statuses` says otherwise."""
    sft = {"path": "runs/sft", "fingerprint": "sft"}
    parents = {"sft": [], "reward": [sft], "ppo": [sft, {"path": "runs/reward", "fingerprint": "reward"}]}
    for stage, found in parents.items():
        pretend(place, stage, statuses.get(stage, "complete"), parents=found)


@pytest.mark.parametrize("stages", [("sft",), ("sft", "reward")])
def test_a_pipeline_killed_in_a_stage_passes_its_checks_again(place, stages, capsys):
    for stage in stages:
        pretend(place, stage, "running" if stage == stages[-1] else "complete")
    pipeline.run("all.yaml", start=DRY_RUN)
    text = capsys.readouterr().out
    assert "no complete checkpoint yet: starts from the beginning" in text
    assert f"to come: {stages[-1]} run" in text


def test_the_dry_run_of_a_complete_pipeline_says_that_it_is_complete(place, capsys):
    pretend_all(place)
    pipeline.run("all.yaml", start=DRY_RUN)
    assert capsys.readouterr().out.count("already complete") == 3


def test_a_complete_pipeline_can_be_overwritten(place, capsys):
    pretend_all(place)
    pipeline.run("all.yaml", start=pipeline.StartOptions(dry_run=True, overwrite=True))
    text = capsys.readouterr().out
    assert text.count("the existing run is deleted first") == 3 and "to come: reward run" in text


def test_a_fault_of_the_last_stage_is_found_before_the_first_one_starts(place):
    with pytest.raises(UserError, match="nowhere: there is no dataset"):
        pipeline.run("all.yaml", ["ppo.data.prompts=nowhere"])
    assert not (place / "runs").exists()


def test_a_complete_run_whose_dataset_changed_is_refused(place):
    pretend_all(place)
    data = open_dataset(place / "demos")
    info = json.loads((place / "runs/sft/run.json").read_text("utf-8"))
    info["data"] = [{"path": "demos", "kind": "demonstration", "fingerprint": data.fingerprint}]
    (place / "runs/sft/run.json").write_text(json.dumps(info), "utf-8")
    assert states()[0] == "complete"
    with pytest.raises(UserError, match="the dataset demos changed since"):
        shutil.rmtree(place / "demos")
        tiny.write_demonstrations(place / "demos", 13, 4)
        states()


@pytest.mark.parametrize("given", ["sft", "reward", "ppo", "all"])
@pytest.mark.parametrize("wanted", ["sft", "reward", "ppo", "pipeline"])
def test_a_config_of_another_stage_is_recognised(given, wanted, place):
    values = yaml.safe_load((place / "reward.yaml").read_text("utf-8"))
    (place / "reward.yaml").write_text(yaml.safe_dump({**values, "normalize": "none"}), "utf-8")
    values = yaml.safe_load((place / "sft.yaml").read_text("utf-8"))
    (place / "sft.yaml").write_text(yaml.safe_dump({**values, "eval": {"samples": 1}}), "utf-8")
    name = "pipeline" if given == "all" else given
    if name == wanted:
        entry.refuse_other_stage(wanted, f"{given}.yaml")
        return
    said = rf"{given}\.yaml: is a config of {name}, not of {wanted}\n.*rlhf {name}"
    with pytest.raises(UserError, match=said):
        if wanted == "pipeline":
            pipeline_steps.read_pipeline(f"{given}.yaml", [])
        else:
            entry.prepare(wanted, f"{given}.yaml", dry_run=True)


def test_without_resume_a_run_that_is_there_is_refused(place):
    pretend(place, "sft")
    with pytest.raises(UserError, match="already holds a run"):
        pipeline.run("all.yaml", start=pipeline.StartOptions(resume=False))


def test_an_export_folder_that_holds_something_else_is_refused_at_once(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("x", "utf-8")
    with pytest.raises(UserError, match="is not an export"):
        pipeline.run("all.yaml", start=DRY_RUN)


def rlhf(place: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stages.cli", *words]
    return subprocess.run(
        command, cwd=place, env=environment, input=stdin, capture_output=True, text=True, timeout=1100
    )


def kill_when(place: Path, moment: Callable[[], bool], *words: str) -> None:
    """Start a command and kill it, with its child, as soon as `moment` is true."""
    command = tiny.start_command(place, *words)
    while not moment():
        assert command.poll() is None, f"ended with {command.poll()} before the moment came: {command.text}"
        time.sleep(0.01)
    command.kill()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_command_runs_all_stages_skips_what_is_complete_and_goes_on_after_a_kill_in_each_stage(place):
    steps = ("sft.batch.max_steps=10", "reward.batch.max_steps=10", "ppo.updates=10")  # a while after a checkpoint
    saved = tuple(f"{stage}.checkpoints.every=1" for stage in ("sft", "reward", "ppo"))
    words = ("pipeline", "--config", "all.yaml", f"sft.model.path={tiny.llama()}", *steps, *saved)
    done = tiny.command(place, *words)
    assert done.returncode == 0, done.stdout
    assert (place / "out" / "model.safetensors").is_file()
    summary = done.stdout[done.stdout.rindex("Pipeline toy") :]
    assert summary.count("done") == 4 and "kl" in summary
    before = json.loads((place / "runs/ppo/run.json").read_text("utf-8"))

    again = tiny.command(place, *words)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("complete already") == 3

    kill_when(place, lambda: not (place / "runs/sft/run.json").exists(), *words, "--overwrite")
    assert not (place / "runs/ppo/run.json").exists()
    shutil.rmtree(place / "out")  # from here on as if nothing had ever run
    kill_when(place, (place / "runs" / "sft" / "run.json").exists, *words)
    for stage in ("sft", "reward", "ppo"):
        kill_when(place, (place / "runs" / stage / "checkpoints").exists, *words)
    done = rlhf(place, *words)  # as a user starts it, with stages in a Python of their own
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("complete already") == 2 and (place / "out" / "model.safetensors").is_file()
    after = json.loads((place / "runs/ppo/run.json").read_text("utf-8"))
    assert after["metrics"] == before["metrics"] and after["model_fingerprint"] == before["model_fingerprint"]


@pytest.mark.slow
def test_a_stage_that_fails_stops_the_pipeline_and_says_how_to_go_on(place):
    done = tiny.command(place, "pipeline", "--config", "all.yaml")  # base/ holds no model that could be loaded
    assert done.returncode == 2
    assert "the pipeline stopped: sft ended with exit status 2" in done.stdout and "Traceback" not in done.stdout
    assert not (place / "runs" / "reward").exists()


# ---- rounds ------------------------------------------------------------------------------------------------------

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
    (block,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "rounds.md").read_text("utf-8"), re.DOTALL)
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
