"""`rlhf runs`: which runs are there, and how they are doing."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from rlhf.runs.lock import LOCK
from stages.cli import app


def write_run(path, stage, status, rows=(), **info):
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"stage": stage, "status": status, **info}))
    (path / "config.yaml").write_text("updates: 10\n" if stage == "ppo" else "seed: 0\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / LOCK).touch()


def test_runs_are_listed_with_state_and_result_wherever_they_lie(tmp_path):
    write_run(tmp_path / "a/sft", "sft", "complete", [{"step": 4, "eval/loss": 1.25}])
    rows = [{"step": 0, "eval/scores": 0.5, "eval/kl": 0.0}, {"step": 7, "eval/scores": 2.0, "eval/kl": 3.0}]
    write_run(tmp_path / "a/round-2/ppo", "ppo", "running", rows)
    write_run(tmp_path / "a/sft/checkpoints/step-1", "sft", "complete")  # not a run of its own
    write_run(tmp_path / "damaged", "sft", "complete")
    (tmp_path / "damaged/run.json").write_text("{")
    shown = CliRunner().invoke(app, ["runs", str(tmp_path), "--json"])
    assert shown.exit_code == 0, shown.output
    found = {row["run"].removeprefix(f"{tmp_path}/"): row for row in map(json.loads, shown.stdout.splitlines())}
    assert found.keys() == {"a/sft", "a/round-2/ppo"}
    assert found["a/sft"]["state"] == "complete" and found["a/sft"]["result"] == {"eval/loss": 1.25}
    ppo = found["a/round-2/ppo"]
    assert (ppo["state"], ppo["steps"], ppo["planned"], ppo["doctor"]) == ("stopped", 7, 10, ["stopped"])
    assert ppo["result"] == {"eval/scores": 2.0, "eval/kl": 3.0, "eval/scores_at_start": 0.5}
    assert "damaged" in shown.stderr
    text = CliRunner().invoke(app, ["runs", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert "7 of 10" in text and "scores" in text


def test_an_empty_folder_and_no_folder(tmp_path):
    assert "no run below" in CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout
    failed = CliRunner().invoke(app, ["runs", str(tmp_path / "absent")])
    assert failed.exit_code and "absent" in str(failed.exception)


def listed(folder):
    return {row["run"].removeprefix(f"{folder}/"): row for row in map(json.loads, rows_of(folder))}


def rows_of(folder):
    shown = CliRunner().invoke(app, ["runs", str(folder), "--json"])
    assert shown.exit_code == 0, shown.output
    return shown.stdout.splitlines()


def test_a_complete_run_keeps_its_result_when_its_log_is_torn_or_mistyped(tmp_path):
    rows = [{"step": 0, "eval/scores": 0.5, "eval/kl": 0.0}, {"step": 10, "eval/scores": "2.0", "eval/kl": 3.0}]
    metrics = {"eval/scores": 2.0, "eval/kl": 3.0, "eval/scores_at_start": 0.5}
    write_run(tmp_path / "mistyped", "ppo", "complete", rows, metrics=metrics)
    write_run(tmp_path / "torn", "ppo", "complete", rows, metrics=metrics)
    log = tmp_path / "torn/metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    for row in listed(tmp_path).values():
        assert row["result"] == metrics
        assert row["doctor"] == ["damaged-log"]


def test_the_result_is_of_the_best_checkpoint_which_became_the_model(tmp_path):
    rows = [{"step": 50, "eval/accuracy": 0.75, "eval/log_loss": 0.5}, {"step": 100, "eval/accuracy": 0.7}]
    write_run(tmp_path / "reward", "reward", "complete", rows, step=50, metrics={"accuracy": 0.75, "log_loss": 0.5})
    write_run(tmp_path / "odd", "reward", "complete", rows, metrics={"accuracy": "0.9", "log_loss": None})
    found = listed(tmp_path)
    assert found["reward"]["result"] == {"eval/accuracy": 0.75, "eval/log_loss": 0.5}
    assert found["odd"]["result"] == {"eval/accuracy": 0.7, "eval/log_loss": 0.5}  # run.json has no numbers
