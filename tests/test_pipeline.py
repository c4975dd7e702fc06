"""The pipeline: which stages it runs, skips, continues and refuses; three real stages and the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from rlhf.config_file import dump_config
from rlhf.errors import UserError
from rlhf.schema import SCHEMA_VERSION
from stages import pipeline

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with datasets, a model, the three configs and the pipeline's."""
    monkeypatch.chdir(tmp_path)
    tiny.write_demonstrations(tmp_path / "demos", 12, 4)
    tiny.write_rankings(tmp_path / "rankings", 12, 4)
    batch = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    configs = {
        "sft": {"run": "runs/sft", "model": {"path": "base"}, "data": {"train": "demos"}, "batch": batch, "samples": 1},
        "reward": {"run": "runs/reward", "model": {"path": "runs/sft"}, "data": {"train": "rankings"}, "batch": batch},
        "ppo": {
            "run": "runs/ppo",
            "model": {"path": "runs/sft"},
            "data": {"prompts": "rankings", "max_prompt_tokens": 64},
            "reward": {"name": "model", "path": "runs/reward"},
            "updates": 2,
            "rollout": {"prompts_per_update": 4, "max_new_tokens": 8},
            "update": {"epochs": 1, "minibatches": 1},
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
    _, steps = pipeline.read_pipeline("all.yaml", [])
    config = next(step.config for step in steps if step.stage == stage)
    (place / config.run / "model").mkdir(parents=True)
    (place / config.run / "model" / "config.json").write_text("{}", "utf-8")
    info = {"stage": stage, "status": status, "schema_version": SCHEMA_VERSION, "model_fingerprint": stage, **values}
    (place / config.run / "run.json").write_text(json.dumps(info), "utf-8")
    (place / config.run / "config.yaml").write_text(dump_config(config), "utf-8")


def states(overrides: tuple[str, ...] = ()) -> list[str]:
    return [step.state() for step in pipeline.read_pipeline("all.yaml", overrides)[1]]


def test_overrides_go_to_the_stage_that_they_name(place):
    config, steps = pipeline.read_pipeline("all.yaml", ["name=other", "ppo.updates=7", "sft.batch.max_steps=3"])
    assert config.name == "other"
    assert [step.overrides for step in steps] == [["batch.max_steps=3"], [], ["updates=7"]]
    assert steps[2].config.updates == 7


def test_an_override_for_a_stage_that_the_pipeline_lacks_is_refused(place):
    (place / "two.yaml").write_text("name: two\nsft: sft.yaml\n", "utf-8")
    with pytest.raises(UserError, match="has no ppo stage"):
        pipeline.read_pipeline("two.yaml", ["ppo.updates=7"])


def test_complete_runs_are_skipped_and_interrupted_ones_continued(place):
    assert states() == ["new", "new", "new"]
    pretend(place, "sft")
    pretend(place, "reward", "running", parents=[{"path": "runs/sft", "fingerprint": "sft"}])
    assert states() == ["complete", "interrupted", "new"]


def test_a_run_with_another_config_is_refused_with_the_lines_that_differ(place):
    pretend(place, "sft")
    with pytest.raises(UserError, match="seed: 5"):
        states(("sft.seed=5",))


def test_a_run_whose_parent_has_another_result_by_now_is_refused(place):
    pretend(place, "sft")
    pretend(place, "reward", parents=[{"path": "runs/sft", "fingerprint": "an earlier one"}])
    with pytest.raises(UserError, match="made from another result of runs/sft"):
        states()


def test_the_dry_run_takes_runs_to_come_as_given_and_shows_every_plan(place, capsys):
    pipeline.run("all.yaml", dry_run=True)
    text = capsys.readouterr().out
    assert all(f"Plan: {stage}" in text for stage in ("sft", "reward", "ppo"))
    assert "to come: reward run" in text
    assert not (place / "runs").exists()


def test_a_fault_of_the_last_stage_is_found_before_the_first_one_starts(place):
    with pytest.raises(UserError, match="nowhere: no dataset there"):
        pipeline.run("all.yaml", ["ppo.data.prompts=nowhere"])
    assert not (place / "runs").exists()


def test_without_resume_a_run_that_is_there_is_refused(place):
    pretend(place, "sft")
    with pytest.raises(UserError, match="holds a run already"):
        pipeline.run("all.yaml", resume=False)


def test_an_export_folder_that_holds_something_else_is_refused_at_once(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("x", "utf-8")
    with pytest.raises(UserError, match="is not an export"):
        pipeline.run("all.yaml", dry_run=True)


def rlhf(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stages.cli", *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_three_stages_and_the_export_run_from_one_command_and_are_skipped_the_second_time(place):
    model = f"sft.model.path={tiny.llama()}"
    done = rlhf(place, "pipeline", "--config", "all.yaml", model)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "out" / "model.safetensors").is_file()
    summary = done.stdout[done.stdout.rindex("Pipeline toy") :]
    assert summary.count("done") == 4 and "kl" in summary
    again = rlhf(place, "pipeline", "--config", "all.yaml", model)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("complete already") == 3


@pytest.mark.slow
def test_a_stage_that_fails_stops_the_pipeline_and_says_how_to_go_on(place):
    done = rlhf(place, "pipeline", "--config", "all.yaml")  # base/ holds no model that could be loaded
    assert done.returncode == 2
    assert "the pipeline stopped: sft ended with exit status 2" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "runs" / "reward").exists()
