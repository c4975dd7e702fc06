"""`rlhf doctor` by figures: every check finds its fault, and nothing in healthy metrics."""

from __future__ import annotations

import json
import math
import re

import pytest
import tiny
from typer.testing import CliRunner

from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import load_stage_config
from rlhf.core.errors import UserError
from rlhf.doctor.diagnosis import Watch, diagnose, examine
from rlhf.doctor.evidence import Evidence, Series, read_evidence
from rlhf.doctor.findings import CHECKS
from rlhf.runs.run import read_run
from stages.cli import app

STEPS = 20
CONFIG = {
    "updates": STEPS,
    "rollout": {"max_new_tokens": 64, "min_new_tokens": 0, "ahead": 0},
    "optimizer": {"max_grad_norm": 1.0},
    "critic": {"warmup_updates": 0},
    "advantage": {"name": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True},
    "tuning": "full",
}


def line(first, last):
    """A straight line over the steps."""
    return [first + (last - first) * step / (STEPS - 1) for step in range(STEPS)]


HEALTHY = {
    "ppo": {
        "objective/scores": line(0.1, 2.0),
        "objective/scores_std": line(1.0, 0.8),
        "objective/kl": line(0.0, 6.0),
        "objective/kl_k3": line(0.0, 7.0),
        "objective/entropy": line(2.0, 1.2),
        "rollout/response_length": line(30, 35),
        "rollout/eos_rate": line(0.9, 0.95),
        "policy/approx_kl": line(0.01, 0.001),
        "policy/clipfrac": line(0.08, 0.01),
        "policy/ratio_min": line(0.5, 0.8),
        "policy/ratio_max": line(1.9, 1.3),
        "objective/advantages_mean": line(0.0, 0.0),
        "objective/advantages_std": line(1.0, 1.0),
        "optimizer/lr": line(1e-6, 5e-8),
        "optimizer/steps": line(16, 16),
        "policy/first_ratio_min": line(1.0, 1.0),
        "policy/first_ratio_max": line(1.0, 1.0),
        "val/explained_variance": line(-0.5, 0.6),
        "val/clipfrac": line(0.3, 0.1),
        "optimizer/grad_norm": line(2.0, 1.0),
        "memory/peak_gb": line(1.0, 1.05),
        "time/learn": line(1.0, 1.2),
    },
    "sft": {
        "train/loss": line(3.0, 1.5),
        "eval/loss": line(3.0, 1.7),
        "optimizer/grad_norm": line(2.0, 1.0),
    },
    "reward": {
        "train/loss": line(1.5, 0.9),
        "eval/loss": line(1.5, 1.0),
        "eval/accuracy": line(0.5, 0.72),
        "eval/log_loss": line(0.69, 0.58),
        "eval/ceiling": line(0.8, 0.8),
        "optimizer/grad_norm": line(2.0, 1.0),
    },
}

BROKEN = {
    "first-ratio": ("ppo", {"policy/first_ratio_max": line(1.0, 1.02)}),
    "sampler-gap": ("ppo", {"rollout/sampler_gap_mean": line(0.01, 0.4)}),
    "starts-away-from-the-reference": ("ppo", {"objective/kl_k3": line(3.0, 7.0)}),
    "negative-kl": ("ppo", {"objective/kl": line(0.0, -2.0)}),
    "kl-estimators-disagree": ("ppo", {"objective/kl_k3": line(0, 90), "rollout/response_length": line(500, 500)}),
    "policy-runs-away": ("ppo", {"objective/kl": line(0, 90), "objective/kl_k3": line(0, 120)}),
    "policy-does-not-move": ("ppo", {"policy/approx_kl": line(1e-12, 1e-13)}),
    "clipping-saturated": ("ppo", {"policy/clipfrac": line(0.2, 0.5)}),
    "entropy-collapsed": ("ppo", {"objective/entropy": [*line(2.0, 0.0)[:15], *[0.01] * 5]}),
    "entropy-explodes": ("ppo", {"objective/entropy": line(2.0, 5.0)}),
    "never-ends": ("ppo", {"rollout/eos_rate": line(0.5, 0.0)}),
    "ends-at-once": ("ppo", {"rollout/response_length": line(9.0, 1.0)}),
    "length-drifts": ("ppo", {"rollout/response_length": line(20, 60)}),
    "reward-constant": ("ppo", {"objective/scores_std": line(0.0, 0.0)}),
    "reward-explodes": ("ppo", {"objective/scores": line(0.0, 900.0), "objective/scores_std": line(1.0, 90.0)}),
    "reward-falls": ("ppo", {"objective/scores": line(2.0, -3.0)}),
    "critic-useless": ("ppo", {"val/explained_variance": line(-0.5, -0.4)}),
    "value-clipping-saturated": ("ppo", {"val/clipfrac": line(0.6, 0.8)}),
    "advantage-moments": ("ppo", {"objective/advantages_std": line(1.0, 0.4)}),
    "clipping-dead": ("ppo", {"policy/ratio_min": line(0.999, 0.9999), "policy/ratio_max": line(1.001, 1.0001)}),
    "critic-stale": ("ppo", {"val/explained_variance": [*line(0.0, 0.9)[:15], *[0.1] * 5]}),
    "rate-below-bfloat16": ("ppo", {"optimizer/lr": line(1e-8, 1e-9)}, {"precision": "bfloat16"}),
    "loss-does-not-fall": ("sft", {"train/loss": line(3.0, 3.0)}),
    "loss-diverges": ("sft", {"train/loss": line(3.0, 9.0)}),
    "overfits": ("reward", {"eval/loss": [*line(1.5, 1.0)[:10], *line(1.0, 2.0)[10:]]}),
    "too-good-at-the-start": ("sft", {"train/loss": line(0.01, 0.0)}),
    "no-better-than-guessing": ("reward", {"eval/accuracy": line(0.48, 0.51)}),
    "overconfident": ("reward", {"eval/log_loss": line(0.69, 0.9)}),
    "better-than-the-annotators": ("reward", {"eval/accuracy": line(0.5, 0.97)}),
    "not-finite": ("ppo", {"loss/value": [*line(1, 1)[:-1], math.inf]}),
    "gradient-spikes": ("sft", {"optimizer/grad_norm": [1.0] * 15 + [50.0] + [1.0] * 4}),
    "gradient-always-clipped": ("sft", {"optimizer/grad_norm": line(200, 100)}),
    "memory-grows": ("ppo", {"memory/peak_gb": [*[1.0] * 10, *[1.0 + i / 10 for i in range(10)]]}),
    "slows-down": ("ppo", {"time/learn": [1.0] * 12 + [9.0] * 8}),
}


def evidence(stage, metrics, **config):
    found = Evidence(stage, CONFIG | config)
    for step in range(STEPS):
        found.add(step + 1, {name: values[step] for name, values in metrics.items()})
    return found


def names(found):
    return [finding.name for finding in found]


@pytest.mark.parametrize("stage", HEALTHY)
def test_healthy_metrics_are_not_accused(stage):
    assert names(diagnose(evidence(stage, HEALTHY[stage]), live=True)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_finds_its_fault_and_says_what_it_saw(name):
    stage, broken, *config = BROKEN[name]
    found = diagnose(evidence(stage, HEALTHY[stage] | broken, **(config[0] if config else {})), live=True)
    assert name in names(found)
    finding = found[names(found).index(name)]
    assert any(character.isdigit() for character in finding.what) and finding.cause and finding.remedy


def test_every_check_of_metrics_has_a_broken_example_here():
    assert {check.name for check in CHECKS if check.live} == set(BROKEN)


SETTING = re.compile(r"\b([a-z_]+(?:\.[a-z_]+)*)=(\{[^}]*\}|[\w.+-]*\w)")
KEY = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)+\b(?!\.?(?:jsonl?|md|yaml)\b)")
FILES = ("json", "jsonl", "md", "yaml")


def at(values, key):
    """Whether a config's values have a place of this dotted name."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


@pytest.mark.parametrize("row", CHECKS, ids=lambda row: row.name)
def test_settings_and_keys_that_a_remedy_names_are_those_of_the_configs(row):
    files = {stage: tiny.REPOSITORY / "configs" / "0.5b" / f"{stage}.yaml" for stage in row.stages}
    known = {stage: file for stage, file in files.items() if file.exists()}  # there is none for specialists
    for key, value in SETTING.findall(row.remedy):
        for stage, file in known.items():
            load_stage_config(STAGES[stage], file, [f"{key}={value}"])
    loaded = [load_stage_config(STAGES[stage], file).model_dump(mode="json") for stage, file in known.items()]
    for key in KEY.findall(SETTING.sub("", row.remedy)):
        assert key.split(".")[-1] in FILES or any(at(values, key) for values in loaded), key


def test_options_that_explain_a_figure_are_known():
    small = {"policy/first_ratio_max": line(1.0, 1.01)}
    assert names(diagnose(evidence("ppo", HEALTHY["ppo"] | small, compile=True), live=True)) == []
    fixed = {"rollout": {"max_new_tokens": 8, "min_new_tokens": 8}}
    ends = {"rollout/eos_rate": line(0.0, 0.0)}
    assert names(diagnose(evidence("ppo", HEALTHY["ppo"] | ends, **fixed), live=True)) == []
    gap = {"rollout/sampler_gap_mean": line(0.1, 0.2)}
    ahead = {"rollout": {"max_new_tokens": 64, "ahead": 1}}
    assert names(diagnose(evidence("ppo", HEALTHY["ppo"] | gap, **ahead), live=True)) == []
    late = {"policy/approx_kl": [0.0] * 10 + [0.01] * 10}
    assert names(diagnose(evidence("ppo", HEALTHY["ppo"] | late, critic={"warmup_updates": 10}), live=True)) == []


@pytest.mark.parametrize(("stage", "gone"), [(stage, name) for stage in HEALTHY for name in HEALTHY[stage]])
def test_a_metric_that_is_missing_stops_no_check_and_is_named_by_those_that_need_it(stage, gone):
    left = {name: values for name, values in HEALTHY[stage].items() if name != gone}
    found, unmade = examine(evidence(stage, left, precision="bfloat16"))
    assert "stopped" in names(found) and len(found) == 1
    assert any(gone in metrics for metrics in unmade.values())
    examine(evidence(stage, {gone: HEALTHY[stage][gone]}))  # all others are missing
    for where, broken, *config in BROKEN.values():
        if where == stage:
            diagnose(evidence(stage, left | broken, **(config[0] if config else {})))


def test_checks_that_need_no_metric_are_always_made():
    found, unmade = examine(Evidence("ppo", CONFIG, {"status": "complete"}), live=True)
    made = {check.name for check in CHECKS if check.live and "ppo" in check.stages} - set(unmade)
    assert found == [] and made == {"not-finite"}


def test_the_worst_comes_first():
    broken = BROKEN["value-clipping-saturated"][1] | BROKEN["reward-constant"][1] | BROKEN["clipping-saturated"][1]
    found = diagnose(evidence("ppo", HEALTHY["ppo"] | broken), live=True)
    assert names(found) == ["reward-constant", "clipping-saturated", "value-clipping-saturated"]


def test_a_watch_says_each_thing_once_and_nothing_that_was_known():
    said: list[str] = []
    watch = Watch(Evidence("ppo", CONFIG), said.append)
    for step in range(STEPS):
        watch.log(step + 1, {"objective/scores": 1.0, "objective/scores_std": 0.0})
    assert len(said) == 1 and said[0].startswith("error: reward-constant: all completions of an update have the same")
    Watch(watch.evidence, said.append).log(STEPS + 1, {"objective/scores": 1.0, "objective/scores_std": 0.0})
    assert len(said) == 1


def test_series_take_medians_of_the_ends():
    series = Series(list(range(7)), [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0])
    assert (series.first, series.last, series.median) == (3.0, 3.0, 3.0)
    assert series.after(0.5).values == [3.0, 4.0, 5.0, 0.0]
    assert Series([1, 2], [1.0, 3.0]).mean_and_error == (2.0, 1.0)


# ---- run folders


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
