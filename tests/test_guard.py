"""The guard by figures: its signals, rules, actions and state, and Gao's forms; in PPO: test_guard_runs.py."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.guard.actions import ACTIONS, ActionEffect
from rlhf.guard.config import GuardConfig
from rlhf.guard.guard import Guard
from rlhf.guard.observers import outside_range, repetition
from rlhf.guard.overoptimization import features, fit, peak_of
from rlhf.guard.rules import RULES, History

# ---- signals


def test_scores_outside_a_range_are_counted():
    assert outside_range(torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5]), -1.0, 1.0) == pytest.approx(0.4)


def test_repeated_phrases_by_hand():
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # five phrases, the last one is the first
    assert repetition([[1] * 8, [1, 2, 3]]) == pytest.approx(4 / 5)
    assert repetition([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 0.0  # others' phrases do not count
    assert repetition([[1, 2]]) == 0.0


# ---- rules

STEPS = 12
QUIET = {
    "objective/scores": [0.0] * 6 + [2.0] * 6,
    "objective/scores_std": [1.0] * STEPS,
    "objective/gold_reward": [0.0] * 6 + [2.0] * 6,
    "objective/entropy": [2.0] * 6 + [1.0] * 6,
    "objective/disagreement": [0.2] * STEPS,
    "rollout/response_length": [20.0] * 6 + [30.0] * 6,
    "guard/outside_range": [0.02] * 6 + [0.3] * 6,
    "guard/repetition": [0.05] * STEPS,
    "guard/watch_score": [0.0] * 6 + [1.8] * 6,
    "guard/disagreement": [0.2] * 6 + [0.25] * 6,
    "guard/perturbation_effect": [-0.3] * 6 + [0.1] * 6,
}
LOUD = {
    "gold-falls": {"objective/gold_reward": [0.0] * 3 + [2.0] * 3 + [0.8] * 6},
    "disagreement": {"guard/disagreement": [0.2] * 6 + [0.4] * 6},
    "watch-lags": {"guard/watch_score": [0.0] * 6 + [0.9] * 6},
    "score-range": {"guard/outside_range": [0.02] * 6 + [0.6] * 6},
    "length": {"rollout/response_length": [20.0] * 6 + [41.0] * 6},
    "entropy": {"objective/entropy": [2.0] * 6 + [0.4] * 6},
    "repetition": {"guard/repetition": [0.05] * 6 + [0.3] * 6},
    "perturbation": {"guard/perturbation_effect": [-0.6] * 6 + [0.0] * 6},
}


def observed(guard, series, first=1):
    found = []
    for step in range(first, STEPS + 1):
        found += guard.observe(step, {name: values[step - 1] for name, values in series.items()})
    return found


def guard(**values):
    return Guard(GuardConfig.model_validate({"baseline": 3, "window": 2, "patience": 2, **values}))


def test_healthy_metrics_raise_no_alarm():
    assert observed(guard(), QUIET) == []


@pytest.mark.parametrize("name", [row.name for row in RULES])
def test_each_rule_speaks_once_of_what_it_watches(name):
    [alarm] = observed(guard(), QUIET | LOUD[name])
    assert alarm.rule == name and alarm.action == "warn"
    assert any(character.isdigit() for character in alarm.what)
    assert alarm.step == alarm.since + 1 <= 9


@pytest.mark.parametrize("name", [row.name for row in RULES])
def test_rules_without_their_metric_are_silent(name):
    history = History(3, 2)
    assert RULES.pick(name)(history) is None


def test_what_holds_for_less_than_the_patience_is_no_alarm():
    blip = QUIET | {"guard/repetition": [0.05] * 6 + [0.5] + [0.05] * 5}
    assert observed(guard(patience=3), blip) == []
    assert [alarm.step for alarm in observed(guard(patience=2), blip)] == [8]


def test_a_rule_compares_with_the_first_updates_and_options_change_it():
    strict = guard(rules=[{"name": "length", "ratio": 1.4}])
    [alarm] = observed(strict, QUIET)
    assert alarm.what == "completions went from 20 to 30 tokens while the score rose"


def test_an_ensemble_that_disagrees_from_the_outset_is_named_before_the_baseline_is_complete():
    [alarm] = observed(guard(baseline=10), QUIET | {"guard/disagreement": [0.6] * STEPS})
    assert (alarm.rule, alarm.since, alarm.step) == ("disagreement", 2, 3)
    assert alarm.what == "the ensemble's members disagree by 0.6; the scores differ by 1 at the start"


def test_the_gold_reward_may_fall_by_half_of_its_gain():
    nearly = QUIET | {"objective/gold_reward": [0.0] * 3 + [2.0] * 3 + [1.0] * 6}
    assert observed(guard(), nearly) == []


@pytest.mark.parametrize(
    ("effects", "fired", "now"),
    [
        ((-1.4, -0.5, -0.5, -0.5, -0.1, -0.3), 9, "-0.15"),  # means of two: grown by at most 0.45, then by 0.55
        ((-0.1, 0.3, 0.3, 0.5, 0.5, 0.5), 7, "0.2"),  # at most 0.15, then 0.2
        ((0.3, 0.3, 0.0, 0.3, -1.0, 0.3), None, ""),
    ],
)
def test_perturbations_must_raise_the_scores_by_0_2_deviations_or_by_0_5_more_than_first(effects, fired, now):
    measured, found = guard(rules=["perturbation"], patience=1), []
    for step, effect in zip(range(1, 12, 2), effects):  # the scores' deviation is 2
        found += measured.observe(step, {"objective/scores_std": 2.0, "guard/perturbation_effect": effect})
        found += measured.observe(step + 1, {"objective/scores_std": 2.0})
    assert [alarm.step for alarm in found] == ([] if fired is None else [fired])
    for alarm in found:
        assert alarm.what == (
            f"changes that should not matter move the scores by {now} standard deviations;"
            f" by {effects[0] / 2:.3g} at the first measurement"
        )


# ---- actions


def test_actions_by_hand():
    assert ACTIONS.pick("warn")() == ActionEffect()
    assert ACTIONS.pick({"name": "raise-kl", "factor": 3.0})() == ActionEffect(kl=3.0)
    assert ACTIONS.pick({"name": "lower-lr", "factor": 0.1})() == ActionEffect(lr=0.1)
    assert ACTIONS.pick("stop")() == ActionEffect(end="last") and ACTIONS.pick("best-checkpoint")() == ActionEffect(
        end="best"
    )


def test_an_action_that_may_repeat_does_so_after_the_cooldown():
    loud = QUIET | LOUD["repetition"]
    one = guard(action="raise-kl", cooldown=2)
    assert [alarm.step for alarm in observed(one, loud)] == [9, 11]
    assert one.kl_factor == 4.0 and one.lr_factor == 1.0
    other = guard(action="warn", actions={"repetition": {"name": "lower-lr", "factor": 0.5}}, cooldown=100)
    assert [alarm.action for alarm in observed(other, loud)] == ["lower-lr"] and other.lr_factor == 0.5


def test_the_best_checkpoint_has_the_highest_gold_reward_or_is_from_before_the_first_sign():
    with_gold = guard(rules=[])
    golds = [0.0, 1.0, 3.0, 3.0, 1.0, 0.0]
    best = []
    for step, gold in enumerate(golds, 1):
        with_gold.observe(step, {"objective/gold_reward": gold})
        best.append(with_gold.note_checkpoint(step))
    assert best == [1, 2, 3, 4, 4, 4]  # means of two updates: 0, 0.5, 2, 3, 2, 0.5
    without = guard(action="best-checkpoint")
    series = {name: values for name, values in (QUIET | LOUD["repetition"]).items() if "gold" not in name}
    kept = []
    for step in range(1, 10):
        without.observe(step, {name: values[step - 1] for name, values in series.items()})
        kept.append(without.note_checkpoint(step))
    assert kept == [1, 2, 3, 4, 5, 6, 7, 7, 7] and without.end is not None and without.end.since == 8


def test_a_guard_continues_exactly_from_its_state():
    series = QUIET | LOUD["repetition"] | LOUD["gold-falls"]
    settings = {"action": "raise-kl", "cooldown": 3}
    whole = guard(**settings)
    expected = [alarm for alarm in observed(whole, series) if alarm.step > 7]
    cut = guard(**settings)
    for step in range(1, 8):
        cut.observe(step, {name: values[step - 1] for name, values in series.items()})
        cut.note_checkpoint(step)
    again = guard(**settings)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert again.state_dict() == cut.state_dict()
    assert observed(again, series, first=8) == expected and again.kl_factor == whole.kl_factor > 2


def test_a_state_does_not_grow_with_the_run():
    one = guard()
    for step in range(1, 500):
        one.observe(step, {name: values[step % STEPS] for name, values in QUIET.items()})
    assert all(len(values) <= 3 for values in one.history.first.values())
    assert all(len(values) <= 2 for values in one.history.recent.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rules": ["repitition"]}, "repetition"),
        ({"rules": [{"name": "length", "ratio": 0.5}]}, "greater than 1"),
        ({"action": "halt"}, "unknown guard action"),
        ({"actions": {"length": "halt"}}, "unknown guard action"),
        ({"patience": 0}, "patience"),
    ],
)
def test_wrong_settings_are_named(values, words):
    with pytest.raises((ValueError, ValidationError), match=words):
        GuardConfig.model_validate(values)


# ---- Gao's forms


def test_the_forms_by_hand():
    rl = features(np.array([0.0, 1.0, math.e]), "rl") @ np.array([1.0, 2.0, 0.5])
    assert rl == pytest.approx([1.0, 3.0, 1 + math.e * 1.5])
    best = features(np.array([0.0, 2.0]), "best-of-n") @ np.array([0.0, 2.0, 0.5])
    assert best == pytest.approx([0.0, 2.0])


def test_peaks_by_hand():
    place, height = peak_of(2.0, 1.0, "rl")
    assert place == pytest.approx(math.e) and height == pytest.approx(math.e)  # e (2 - log e) = e
    assert peak_of(2.0, 0.5, "best-of-n") == pytest.approx((2.0, 2.0))  # 2 (2 - 0.5 * 2) = 2
    assert peak_of(1.0, 0.0, "rl") == (math.inf, math.inf)
    assert peak_of(-1.0, 0.5, "best-of-n") == (0.0, 0.0)


@pytest.mark.parametrize(("form", "alpha", "beta"), [("rl", 1.5, 0.9), ("best-of-n", 2.0, 0.4)])
def test_known_parameters_are_recovered_with_intervals_that_hold_them(form, alpha, beta):
    distance = np.linspace(0, 4, 60)
    exact = features(distance, form) @ np.array([0.3, alpha, beta])
    found = fit(distance, exact, form)
    assert (found.start.value, found.alpha.value, found.beta.value) == pytest.approx((0.3, alpha, beta))
    assert found.peak.value == pytest.approx(peak_of(alpha, beta, form)[0])
    assert found.peak_gold.value == pytest.approx(0.3 + peak_of(alpha, beta, form)[1])
    assert found.explained == pytest.approx(1.0) and found.falls == 1.0 and found.furthest == 4.0
    assert found(distance) == pytest.approx(exact)
    noisy = fit(distance, exact + np.random.default_rng(1).normal(0, 0.1, 60), form)
    for value, true in ((noisy.alpha, alpha), (noisy.beta, beta), (noisy.peak, peak_of(alpha, beta, form)[0])):
        assert value.low < true < value.high and value.high - value.low < 1.5


def test_a_gold_reward_that_only_rises_has_no_peak():
    distance = np.linspace(0, 3, 20)
    found = fit(distance, distance**2)
    assert found.beta.value < 0 and found.peak.value == math.inf and found.falls == 0.0


def test_too_few_points_give_no_fit():
    assert fit(np.arange(4.0), np.arange(4.0)) is None
    assert fit(np.ones(9), np.arange(9.0)) is None
