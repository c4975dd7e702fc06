"""The pipeline: which stages it runs, skips, continues and refuses; three real stages and the export."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from pipeline_configs import DRY_RUN, rlhf, write_place

from rlhf.cli import entry
from rlhf.config.load import dump_config
from rlhf.core.errors import UserError
from rlhf.data.schema import SCHEMA_VERSION
from rlhf.data.store import open_dataset
from stages import pipeline, pipeline_steps


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with datasets, a model, the three configs and the pipeline's."""
    monkeypatch.chdir(tmp_path)
    return write_place(tmp_path)


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
