"""`rlhf doctor` by figures: every check finds its fault, and nothing in healthy metrics."""

from __future__ import annotations

import math
import re

import pytest
import tiny
from doctor_logs import HEALTHY, STEPS, line, names

from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import load_stage_config
from rlhf.doctor.diagnosis import Watch, diagnose, examine
from rlhf.doctor.evidence import Evidence, Series
from rlhf.doctor.findings import CHECKS

CONFIG = {
    "updates": STEPS,
    "rollout": {"max_new_tokens": 64, "min_new_tokens": 0, "ahead": 0},
    "optimizer": {"max_grad_norm": 1.0},
    "critic": {"warmup_updates": 0},
    "advantage": {"name": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True},
    "tuning": "full",
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
