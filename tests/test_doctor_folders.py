"""The doctor of run folders: damage, answers, parents, the command, the page."""

from __future__ import annotations

import json
import math

import pytest
import tiny
from doctor_logs import HEALTHY, STEPS, names
from typer.testing import CliRunner

from rlhf.core.errors import UserError
from rlhf.doctor.diagnosis import diagnose
from rlhf.doctor.evidence import read_evidence
from rlhf.doctor.findings import CHECKS
from rlhf.runs.run import read_run
from stages.cli import app

TORN = '{"step": 21, "obj'


def run_folder(path, status="complete", end="", **info):
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"stage": "ppo", "status": status, **info}))
    (path / "config.yaml").write_text("updates: 20\nrollout: {max_new_tokens: 64}\n")
    rows = [{"step": i + 1, **{name: values[i] for name, values in HEALTHY["ppo"].items()}} for i in range(STEPS)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def samples(path, answers):
    rows = [
        {"step": 20, "messages": [{"role": "user", "content": f"q {i}"}], "answer": answer}
        for i, answer in enumerate(answers)
    ]
    (path / "samples.jsonl").write_text('{"step": 0, "answer": "old"}\n' + "".join(json.dumps(r) + "\n" for r in rows))


def test_a_healthy_folder_is_not_accused(tmp_path):
    run = run_folder(tmp_path / "run")
    samples(run, [f"answer {i} with words of its own" for i in range(8)])
    assert names(diagnose(read_evidence(run))) == []


def test_a_torn_last_line_is_damage_of_a_complete_run_alone(tmp_path):
    assert names(diagnose(read_evidence(run_folder(tmp_path / "crashed", status="running", end=TORN)))) == ["stopped"]
    [finding] = diagnose(read_evidence(run_folder(tmp_path / "complete", end=TORN)))
    assert finding.name == "damaged-log"
    assert finding.what == "metrics.jsonl line 21 is cut off, although the run is complete"


def test_damaged_lines_of_the_logs_and_a_complete_run_without_metrics_are_found(tmp_path):
    run = run_folder(tmp_path / "run")
    samples(run, [f"answer {i} with words of its own" for i in range(8)])
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows[3:6] = ["[1, 2]\n", '{"loss": 1}\n', rows[5][:40] + "\n"]
    (run / "metrics.jsonl").write_text("".join(rows))
    with (run / "samples.jsonl").open("a") as file:
        file.write("[" * 5000 + "\n")
    [finding] = diagnose(read_evidence(run))
    without = "has no step: its `step` is not a finite number"
    lines = [f"metrics.jsonl line {at} {without}" for at in (4, 5)] + ["metrics.jsonl line 6 cannot be read"]
    assert (finding.name, finding.what) == ("damaged-log", "; ".join([*lines, "and 1 more"]))
    (run / "metrics.jsonl").write_text("")
    (run / "samples.jsonl").unlink()
    [finding] = diagnose(read_evidence(run))
    assert finding.name == "damaged-log" and "metrics.jsonl holds no metrics" in finding.what


def test_values_of_the_wrong_type_are_named_in_every_log(tmp_path):
    digits = "9" * 400
    end = f'{{"step": 20, "eval/scores": "1.5", "eval/kl": null, "eval/eos_rate": true, "eval/huge": {digits}}}\n'
    run = run_folder(tmp_path / "run", end=end)
    (run / "samples.jsonl").write_text('{"step": 20, "answer": ["a"], "score": "high"}\n')
    (run / "events.jsonl").write_text('{"step": 20, "event": "guard", "rule": 1, "what": "", "action": ""}\n')
    found = read_evidence(run)
    assert found.damage == [
        'metrics.jsonl line 21: eval/scores is "1.5", not a number',
        "metrics.jsonl line 21: eval/kl is null, not a number",
        "metrics.jsonl line 21: eval/eos_rate is true, not a number",
        "samples.jsonl line 1: answer is no text",
        'samples.jsonl line 1: score is "high", not a number',
        "events.jsonl line 1: rule is no text",
    ]
    assert not found["eval/scores"] and math.isinf(found["eval/huge"].last)


def test_a_log_that_ends_before_its_run_did_is_damaged(tmp_path):
    run = run_folder(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:-3]))
    [finding] = diagnose(read_evidence(run))
    assert finding.what == "the run is complete, but metrics.jsonl ends at step 17 of 20"
    ended = run_folder(tmp_path / "ended", ended_by="gold-falls", step=10)
    (ended / "metrics.jsonl").write_text("".join(rows[:-3]))
    assert names(diagnose(read_evidence(ended))) == []


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    good = run_folder(tmp_path / "good")
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path / "absent"), str(good)])
    assert shown.exit_code == 2 and "absent: no such folder" in shown.stderr
    assert f"Runs nearby: {good}" in shown.stderr
    assert f"{good}: ppo, complete" in shown.stdout


def test_a_folder_of_runs_and_a_pipeline_mean_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs/ppo")
    for stage, rest in {"ppo": "reward: {name: model, path: r}", "sft": "data: {train: d}"}.items():
        (tmp_path / f"{stage}.yaml").write_text(f"run: runs/{stage}\nmodel: {{path: m}}\n{rest}\n")
    with (tmp_path / "ppo.yaml").open("a") as file:
        file.write("data: {prompts: d}\n")
    (tmp_path / "pipeline.yaml").write_text("name: mine\nsft: sft.yaml\nppo: ppo.yaml\n")
    shown = CliRunner().invoke(app, ["doctor", "runs", "runs/ppo", "pipeline.yaml"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("runs/ppo: ppo, complete") == 1  # each run once
    assert "sft: runs/sft has not begun" in shown.stderr


def test_the_advice_for_what_is_no_run_fits_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "runs/ppo")
    (run / "model").mkdir()
    (tmp_path / "empty").mkdir()
    advice = {
        "runs": "Name a run in it: runs/ppo",
        "runs/pp": "Runs nearby: runs/ppo",
        "runs/ppo/model": "part of: runs/ppo",
        "runs/ppo/run.json": "part of: runs/ppo",
        "empty": "`rlhf runs FOLDER` lists",
    }
    for path, remedy in advice.items():
        with pytest.raises(UserError, match=path) as error:
            read_run(path)
        assert remedy in str(error.value)


def test_a_crashed_run_is_told_how_to_go_on(tmp_path):
    run = run_folder(tmp_path / "run", status="running")
    (run / "checkpoints/step-00000010").mkdir(parents=True)
    [finding] = diagnose(read_evidence(run))
    assert finding.name == "stopped" and "step 20 of 20, the last checkpoint is step-00000010" in finding.what
    assert "--resume" in finding.remedy


def test_answers_that_are_alike_or_repeat_themselves_are_found(tmp_path):
    run = run_folder(tmp_path / "alike")
    samples(run, ["yes"] * 6 + ["no", "perhaps"])
    [finding] = diagnose(read_evidence(run))
    assert finding.name == "identical-completions" and "6 of 8" in finding.what
    run = run_folder(tmp_path / "loops")
    samples(run, [f"{i} " + "so good so good " * 8 for i in range(8)])
    assert names(diagnose(read_evidence(run))) == ["repeats-itself"]


def test_parents_with_another_template_or_other_weights_are_found(tmp_path):
    parent = run_folder(tmp_path / "parent", chat_template="aaa", tokenizer="t", model_fingerprint="2")
    facts = {"parents": [{"path": str(parent), "fingerprint": "1"}], "tokenizer": "t"}
    run = run_folder(tmp_path / "run", chat_template="bbb", **facts)
    assert names(diagnose(read_evidence(run))) == ["other-template", "parent-changed"]
    gone = run_folder(tmp_path / "gone", parents=[{"path": "nowhere", "fingerprint": "1"}])
    assert names(diagnose(read_evidence(gone))) == []


def test_what_a_run_read_and_what_its_guard_said_are_judged(tmp_path):
    counts = {"kept": 100, "truncated_prompts": 12, "skipped": {}}
    run = run_folder(tmp_path / "cut")
    (run / "cache").mkdir()
    (run / "cache" / "prompts-train.json").write_text(json.dumps(counts))
    [finding] = diagnose(read_evidence(run))
    assert finding.name == "prompts-cut" and "12 of 100 prompts" in finding.what
    (run / "cache" / "prompts-train.json").write_text(json.dumps(counts | {"kept": 15, "truncated_prompts": 1}))
    config = "updates: 20\nrollout: {max_new_tokens: 64, prompts_per_update: 16}\n"
    (run / "config.yaml").write_text(config)
    [finding] = diagnose(read_evidence(run))
    assert finding.name == "data-exhausted" and "each of 15 records was used 21.3 times" in finding.what
    spoken = run_folder(tmp_path / "spoken")
    row = {"step": 7, "event": "guard", "rule": "length", "what": "twice as long", "action": "warn"}
    (spoken / "events.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + '\n{"step": 8, "ev')
    [torn, finding] = diagnose(read_evidence(spoken))
    assert torn.what == "events.jsonl line 3 is cut off, although the run is complete"
    assert finding.name == "guard-fired" and "length fired (2 times)" in finding.what


def test_parents_that_were_trained_on_another_day_are_found_where_the_template_says_the_date(tmp_path):
    old = run_folder(tmp_path / "old", template_time="2026-11-02T09:00:00")
    facts = {"parents": [{"path": str(old)}]}
    run = run_folder(tmp_path / "run", template_time="2026-11-28T23:00:00", **facts)
    [finding] = diagnose(read_evidence(run))
    assert finding.name == "clock-drift" and "2026-11-28" in finding.what and "2026-11-02" in finding.what
    same = run_folder(tmp_path / "same", template_time="2026-11-02T11:00:00", **facts)
    assert names(diagnose(read_evidence(same))) == []


def test_the_command_prints_findings_with_cause_and_remedy_or_as_json(tmp_path):
    good, bad = run_folder(tmp_path / "good"), run_folder(tmp_path / "bad", status="running")
    shown = CliRunner().invoke(app, ["doctor", str(good), str(bad)])
    assert shown.exit_code == 0
    assert f"{good}: ppo, complete, step 20 of 20: " in shown.stdout and "checks, nothing wrong" in shown.stdout
    assert "error: stopped: " in shown.stdout and "Why: " in shown.stdout and "Do:  " in shown.stdout
    lines = CliRunner().invoke(app, ["doctor", str(bad), "--json"]).stdout.splitlines()
    finding, unmade = map(json.loads, lines)
    assert finding["name"] == "stopped" and unmade["not_checked"]["sampler-gap"] == ["rollout/sampler_gap_mean"]
    assert "Not checked, because these metrics are not logged: slows-down (" in shown.stdout
    assert "sampler-gap (rollout/sampler_gap_mean)" in shown.stdout
    (bad / "metrics.jsonl").write_text("")
    shown = CliRunner().invoke(app, ["doctor", str(bad)]).stdout.splitlines()
    assert shown[-1] == "  Not checked, because metrics are not logged: 26 checks, which --json lists"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        read_evidence(tmp_path)
    run = run_folder(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read"):
        read_evidence(run)


def test_the_page_lists_every_check():
    page = (tiny.REPOSITORY / "docs" / "doctor.md").read_text("utf-8")
    for check in CHECKS:
        stages = ", ".join(check.stages) if len(check.stages) < 5 else "all"
        meaning = (check.fn.__doc__ or "").rstrip(".")
        assert f"| `{check.name}` | {check.severity} | {stages} | {meaning} |" in page
