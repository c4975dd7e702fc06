"""The guard in real PPO runs: what only looks on changes nothing, every action acts, and a resumed run is the same."""

from __future__ import annotations

import json

import ppo_runs
import pytest
import tiny
import torch
from guard_runs import guard
from logged import lines as metrics
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlhf.core.errors import UserError
from rlhf.guard.observers import score_range
from rlhf.reward.sources import REWARDS
from stages.cli import app
from stages.ppo import PPO, run

GOLD = {"reward": {"name": "function", "function": "guard_runs:fewer_letters"}, "every": 2}
WATCH = {"name": "function", "function": "ppo_rewards:letters"}


def config(folder, prompts, **changes):
    return ppo_runs.config(folder, prompts, **ppo_runs.SMALL | changes)


def updates(path):
    return [row for row in metrics(path) if "objective/scores" in row]


def events(path):
    file = path / "events.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path / "model").state_dict()


def test_gold_and_watch_are_logged_and_change_nothing_else(tmp_path, prompts):
    run(config(tmp_path / "plain", prompts, updates=3))
    run(config(tmp_path / "seen", prompts, updates=3, gold=GOLD, guard={"watch": WATCH}))
    own = {"objective/gold_reward", "eval/gold_reward", "guard/watch_score"}
    seen = metrics(tmp_path / "seen")
    assert [{k: v for k, v in row.items() if k not in own} for row in seen] == metrics(tmp_path / "plain")
    first, second, third = updates(tmp_path / "seen")
    assert "objective/gold_reward" in first and "objective/gold_reward" not in second
    for row in (first, third):
        assert row["objective/gold_reward"] == pytest.approx(1 - row["objective/scores"], abs=1e-6)
        assert row["guard/watch_score"] == row["objective/scores"]
    evaluations = [row for row in seen if "eval/scores" in row]
    assert all(row["eval/gold_reward"] == pytest.approx(1 - row["eval/scores"], abs=1e-6) for row in evaluations)


def test_a_gold_reward_that_is_not_finite_is_named(tmp_path, prompts):
    broken = {"reward": {"name": "function", "function": "guard_runs:not_a_number"}}
    with pytest.raises(UserError, match="guard_runs:not_a_number"):
        run(config(tmp_path / "run", prompts, gold=broken))


def test_the_coefficient_and_the_rate_change_from_the_next_update_on(tmp_path, prompts):
    settings = {"kl__controller": {"name": "fixed", "coef": 0.1}, "updates": 4}
    run(config(tmp_path / "kl", prompts, guard=guard(action={"name": "raise-kl", "factor": 3.0}), **settings))
    assert [row["objective/kl_coef"] for row in updates(tmp_path / "kl")] == pytest.approx([0.1, 0.1, 0.3, 0.9])
    lower = guard(action={"name": "lower-lr", "factor": 0.5})
    run(config(tmp_path / "lr", prompts, guard=lower, **settings | {"updates": 3}))
    assert [row["optimizer/lr"] for row in updates(tmp_path / "lr")] == pytest.approx([1e-3, 1e-3, 5e-4])
    assert [(row["step"], row["rule"], row["action"]) for row in events(tmp_path / "kl")] == [
        (step, "after-two", "raise-kl") for step in (2, 3, 4)
    ]


def test_stop_ends_the_run_with_the_present_policy(tmp_path, prompts, capsys):
    run(config(tmp_path / "run", prompts, updates=5, guard=guard(action="stop")))
    assert [row["step"] for row in updates(tmp_path / "run")] == [1, 2]
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert info["status"] == "complete" and info["step"] == 2 and info["ended_by"]["rule"] == "after-two"
    assert "guard: after-two: 2 updates, since update 2. Action: stop" in capsys.readouterr().out
    run(config(tmp_path / "run", prompts, updates=7, guard=guard(action="stop")), resume=True)
    assert [row["step"] for row in updates(tmp_path / "run")] == [1, 2]  # made longer, and ended still
    run(config(tmp_path / "short", prompts, updates=2, guard=guard(action="warn")))
    short = weights(tmp_path / "short")
    assert all(torch.equal(value, short[name]) for name, value in weights(tmp_path / "run").items())


def test_the_best_checkpoint_becomes_the_result_and_is_not_deleted_before(tmp_path, prompts):
    late = guard(action="best-checkpoint", patience=3)
    run(config(tmp_path / "run", prompts, updates=9, guard=late, checkpoints={"every": 1, "keep": 1}))
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert info["step"] == 1 and info["ended_by"]["step"] == 4 and info["ended_by"]["since"] == 2
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000004"]
    run(config(tmp_path / "short", prompts, updates=1))
    short = weights(tmp_path / "short")
    assert all(torch.equal(value, short[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_a_resumed_run_with_alarms_equals_the_uninterrupted_one(tmp_path, prompts):
    settings = {"updates": 4, "gold": GOLD, "guard": guard(action="raise-kl")}
    run(config(tmp_path / "whole", prompts, **settings))
    broken = PPO(config(tmp_path / "cut", prompts, **settings), resume=False, overwrite=False)
    broken.evaluate()
    for number in range(3):  # stops after update 3, with the checkpoint of update 2
        found = broken.update(number)
        broken.done = number + 1
        broken.reporter.update(broken.done, found)
        broken.reporter.alarms(broken.guard.observe(broken.done, found))
        if number == 1:
            broken.evaluate()
            broken.save()
    run(config(tmp_path / "cut", prompts, **settings), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert events(tmp_path / "cut") == events(tmp_path / "whole") and len(events(tmp_path / "cut")) == 3


def test_settings_that_could_do_nothing_are_named(tmp_path, prompts):
    free = {"name": "fixed", "coef": 0.0}
    with pytest.raises(UserError, match=r"`raise-kl` multiplies kl\.controller\.coef, which is 0"):
        config(tmp_path, prompts, guard={"action": "raise-kl"}, kl__controller=free)
    with pytest.raises(UserError, match=r"'length' is not in guard\.rules"):
        config(tmp_path, prompts, guard={"rules": ["entropy"], "actions": {"length": "stop"}})
    with pytest.raises(UserError, match="'entropy' is named twice"):
        config(tmp_path, prompts, guard={"rules": ["entropy", "entropy"]})


def test_the_range_of_a_reward_model_comes_from_its_run(tmp_path):
    for name, low in (("a", -2.0), ("b", -4.0)):
        (tmp_path / name).mkdir()
        info = {"stage": "reward", "status": "complete", "score_range": {"low": low, "high": 3.0}}
        (tmp_path / name / "run.json").write_text(json.dumps(info))
    assert score_range(REWARDS.pick({"name": "model", "path": str(tmp_path / "a")})) == (-2.0, 3.0)
    assert score_range(REWARDS.pick({"name": "function", "function": "ppo_rewards:letters"})) is None
    assert score_range(REWARDS.pick({"name": "model", "path": "no/run"})) is None


def test_the_command_says_where_gold_peaks_and_draws_it(tmp_path, prompts):
    run(config(tmp_path / "run", prompts, updates=6, gold=GOLD | {"every": 1}))
    picture = tmp_path / "plot.svg"
    shown = CliRunner().invoke(app, ["guard", str(tmp_path / "run"), "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "gold " in shown.stdout and "alpha" in shown.stdout and picture.read_text("utf-8").startswith("<?xml")
    [line] = CliRunner().invoke(app, ["guard", str(tmp_path / "run"), "--json"]).stdout.splitlines()
    found = json.loads(line)
    assert len(found["gold"]) == len(found["sqrt_kl"]) == 6 and found["fit"]["form"] == "rl"
    run(config(tmp_path / "plain", prompts, updates=1))
    failed = CliRunner().invoke(app, ["guard", str(tmp_path / "plain")])
    assert failed.exit_code != 0 and "has no gold reward" in str(failed.exception)


def test_the_page_of_the_guard_lists_every_rule_and_action():
    from rlhf.guard.actions import ACTIONS
    from rlhf.guard.rules import RULES

    page = (tiny.REPOSITORY / "docs" / "guard.md").read_text("utf-8")
    assert not [row.name for row in (*RULES, *ACTIONS) if f"`{row.name}`" not in page]
