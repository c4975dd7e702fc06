"""Reward functions of users: what they may return, and the one error for everything else."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy
import pytest
import torch
from ppo_runs import config

from rlhf.core.errors import UserError
from rlhf.reward.functions import call_reward_function, import_function
from rlhf.reward.sources import REWARDS
from stages.ppo import run

PROMPT = [{"role": "user", "content": "What is two and two?"}]


def score(value, seconds=100.0):
    """The score from a reward function that returns `value`, or calls it."""
    call = lambda messages, answer: value() if callable(value) else value  # noqa: E731
    return call_reward_function(call, "toy:f", [(PROMPT, "Four.")], seconds)[0]


NUMBERS = [(3, 3.0), (3.5, 3.5), (True, 1.0), (Fraction(1, 2), 0.5), (numpy.float32(2.5), 2.5), (numpy.int64(4), 4.0)]
NUMBERS += [(numpy.array([1.5]), 1.5), (torch.tensor(2.0), 2.0), (torch.tensor([[7]]), 7.0)]


@pytest.mark.parametrize(("value", "expected"), NUMBERS, ids=repr)
def test_one_number_of_any_type_is_a_score(value, expected):
    assert score(value) == expected


OTHERS = ["3.5", None, [1.0], {"score": 1.0}, torch.zeros(3), numpy.zeros(2), 1j, b"1", object()]


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_anything_but_one_number_is_refused_with_prompt_and_answer(value):
    with pytest.raises(UserError, match=rf"toy:f returned .*\({type(value).__name__}\), not one number") as caught:
        score(value)
    assert "two and two?" in caught.value.why and "Four." in caught.value.why and caught.value.remedy


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), torch.tensor(float("inf")), 1e39, 10**400], ids=repr)
def test_a_number_that_float32_cannot_hold_is_refused(value):
    with pytest.raises(UserError, match="not a finite number"):
        score(value)


def test_an_exception_is_reported_with_its_place_in_the_function():
    with pytest.raises(UserError) as caught:
        score(lambda: {}["grade"])
    assert re.search(rf"raised KeyError: 'grade' at {re.escape(__file__)}:\d+", caught.value.what)
    assert "Four." in caught.value.why


def test_a_function_that_exits_does_not_end_the_run_silently():
    with pytest.raises(UserError, match="raised SystemExit"):
        score(lambda: sys.exit(0))


def test_ctrl_c_in_a_function_is_not_its_fault():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def stubborn():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(600)


def backtracking():
    return re.match(r"(a+)+$", "a" * 60 + "b")


def assert_goes_on(outer):
    """The timer around a call (pytest may have one) is neither stopped nor started again."""
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert interval == outer[1] and left <= outer[0] and (left > 0) == (outer[0] > 0)


@pytest.mark.parametrize("hang", [threading.Event().wait, stubborn, backtracking, lambda: [1 for _ in iter(int, 1)]])
def test_a_function_that_hangs_is_interrupted_after_its_time_limit(hang):
    outer = signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(UserError, match=r"toy:f did not return within 0.05 s at .*:\d+") as caught:
        score(hang, seconds=0.05)
    assert "timeout_seconds" in caught.value.remedy and "Four." in caught.value.why
    assert_goes_on(outer)


def several(function, answers, seconds):
    return call_reward_function(function, "toy:f", [(PROMPT, answer) for answer in answers], seconds)


def test_each_completion_has_the_whole_time_limit(capfd):
    def slow(messages, answer):
        time.sleep(0.2)
        return len(answer)

    assert several(slow, ["a", "bb", "ccc"], seconds=0.5) == [1.0, 2.0, 3.0]
    assert in_a_thread(lambda: several(slow, ["a", "bb", "ccc"], seconds=0.5)) == [1.0, 2.0, 3.0]
    assert "goes on" not in capfd.readouterr().err


def test_a_function_that_leaves_its_own_handler_of_the_alarm_is_still_interrupted():
    def function(messages, answer):
        if answer == "quick":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        else:
            time.sleep(5)
        return 1.0

    with pytest.raises(UserError, match=r"did not return within 0\.2 s") as caught:
        several(function, ["quick", "slow"], seconds=0.2)
    assert "answer: 'slow'" in caught.value.why


@pytest.mark.parametrize(
    ("fails", "fault"),
    [(lambda: time.sleep(600), "did not return within 0.2 s"), (lambda: 1 / 0, "raised"), (lambda: None, "returned")],
)
def test_the_first_completion_that_fails_is_named_and_no_other_is_scored_after_it(fails, fault):
    asked = []

    def function(messages, answer):
        asked.append(answer)
        return fails() if answer == "bad" else 1.0

    with pytest.raises(UserError, match=fault) as caught:
        several(function, ["good", "bad", "never"], seconds=0.2)
    assert "answer: 'bad'" in caught.value.why and asked == ["good", "bad"]


def test_the_signal_handler_and_timer_are_as_before_a_call():
    before, outer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert score(1.0) == 1.0
    assert signal.getsignal(signal.SIGALRM) is before
    assert_goes_on(outer)


def in_a_thread(call):
    """What a call in another thread returns or raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_call_that_cannot_be_interrupted_outside_of_the_main_thread_is_warned_of(capfd):
    assert in_a_thread(lambda: score(lambda: time.sleep(0.3) or 2.0, seconds=0.05)) == 2.0
    assert "a time limit of 0.05 s goes on" in " ".join(capfd.readouterr().err.split())


def test_a_call_in_time_is_not_warned_of_outside_of_the_main_thread(capfd):
    assert in_a_thread(lambda: score(2.0, seconds=0.2)) == 2.0
    time.sleep(0.4)
    assert "goes on" not in capfd.readouterr().err


def test_a_function_cannot_change_the_prompt():
    def change(messages, answer):
        messages[0]["content"] = "changed"
        messages.append({})
        return 0.0

    prompt = [dict(PROMPT[0])]
    call_reward_function(change, "toy:f", [(prompt, "Four.")], 100.0)
    assert prompt == PROMPT


@pytest.mark.parametrize("body", ["1 / 0", "def f(:", "import no_such_package"])
def test_a_module_that_cannot_be_imported_is_an_error_of_the_config(tmp_path, monkeypatch, body):
    (tmp_path / "broken_rewards.py").write_text(body, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="broken_rewards:f' cannot be imported: "):
        import_function("broken_rewards:f")


@pytest.mark.parametrize("seconds", [0, -1, "soon", None])
def test_the_time_limit_is_a_number_above_zero(seconds):
    with pytest.raises(ValueError, match="timeout_seconds"):
        REWARDS.pick({"name": "function", "function": "ppo_rewards:one", "timeout_seconds": seconds})


@pytest.mark.parametrize(
    ("name", "fault"), [("broken", "not a finite number"), ("hangs", "did not return within 0.2 s")]
)
def test_ppo_stops_with_prompt_and_answer_where_a_reward_function_fails(tmp_path, prompts, name, fault):
    reward = {"name": "function", "function": f"ppo_rewards:{name}", "timeout_seconds": 0.2}
    with pytest.raises(UserError, match=rf"(?s)ppo_rewards:{name} .*{fault}.*Prompt: .*answer: "):
        run(config(tmp_path / "run", prompts, reward=reward))
