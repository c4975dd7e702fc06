"""Running out of memory in a pass: the step is repeated in smaller passes, with the numbers of a run that began so."""

from __future__ import annotations

import pytest
import sft_runs
import tiny
import torch
from logged import TIMINGS, updates
from ppo_runs import config

from rlhf.core.errors import UserError
from rlhf.training.engine import Engine
from rlhf.training.out_of_memory import is_out_of_memory
from stages.ppo import PPO


def refuse_above(stage, tokens, backward=False):
    """Let training passes of more than `tokens` tokens run out of memory: at their end, or amid their backward."""

    def fail():
        if not backward:
            torch.empty(2**60)  # the CPU's allocator raises its own error
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def after(module, inputs, out):
        if inputs[0].input_ids.numel() > tokens and torch.is_grad_enabled():
            out.logprobs.register_hook(lambda gradient: fail()) if backward else fail()

    stage.models.engine.module.register_forward_hook(after)


def trained(folder, prompts, tokens, limit=None, backward=False, resume=False, **changes):
    stage = PPO(config(folder, prompts, batch__micro_batch_tokens=tokens, **changes), resume, False)
    if limit is not None:
        refuse_above(stage, limit, backward)
    stage.train()
    return stage


def numbers(line):
    return {name: value for name, value in line.items() if not name.startswith((*TIMINGS, "optimizer/halvings"))}


def test_a_step_that_runs_out_of_memory_amid_its_backward_equals_one_that_began_smaller(tmp_path, prompts, capsys):
    stage = trained(tmp_path / "halved", prompts, 320, limit=90, backward=True)
    assert "Out of memory in a micro-batch: the token budget is halved, from 320 to" in capsys.readouterr().out
    budget = stage.learner.budget.tokens
    assert budget <= 80
    trained(tmp_path / "small", prompts, budget)
    for line, other in zip(updates(tmp_path / "halved"), updates(tmp_path / "small"), strict=True):
        assert line["optimizer/halvings"] == stage.learner.budget.halvings > 0 and other["optimizer/halvings"] == 0
        assert numbers(line) == pytest.approx(numbers(other), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_halved_budget_unless_its_config_names_another(tmp_path, prompts):
    once = {"batch__epochs": 1, "eval__prompts": 0}
    trained(tmp_path / "whole", prompts, 320, limit=90, **once)
    trained(tmp_path / "run", prompts, 320, limit=90, updates=1, **once)
    stage = trained(tmp_path / "run", prompts, 320, resume=True, **once)
    assert numbers(updates(tmp_path / "run")[1]) == numbers(updates(tmp_path / "whole")[1])
    assert stage.learner.budget.halvings == updates(tmp_path / "run")[0]["optimizer/halvings"] > 0
    stage = PPO(config(tmp_path / "run", prompts, batch__micro_batch_tokens=200, updates=3, **once), True, False)
    assert stage.learner.budget.tokens == 200


@pytest.mark.slow
def test_sft_repeats_a_step_that_runs_out_of_memory_and_a_resumed_run_keeps_the_smaller_micro_batches(
    tmp_path, demos, monkeypatch, capsys
):
    whole = sft_runs.run(sft_runs.settings(demos, tmp_path / "whole"))
    backward, passes = Engine.backward, []

    def failing(self, loss, last):
        backward(self, loss, last)
        passes.append(last)
        if len(passes) == 6:  # the second of the third step, whose gradients are there by now
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Engine, "backward", failing)
    run = sft_runs.run(sft_runs.settings(demos, tmp_path / "run"))
    assert "from here on it has 2 instead of 4 records" in capsys.readouterr().out
    assert sft_runs.losses(run) == pytest.approx(sft_runs.losses(whole), rel=1e-4)
    longer = sft_runs.settings(demos, tmp_path / "run", batch={"batch_size": 8, "micro_batch_size": 4, "epochs": 3})
    before = len(passes)
    sft_runs.run(longer, resume=True)
    assert len(passes) - before == 5 * 4  # five steps, four micro-batches each


def test_one_record_that_does_not_fit_ends_the_run_with_what_to_change(tmp_path, demos, monkeypatch):
    monkeypatch.setattr(Engine, "backward", lambda self, loss, last: torch.empty(2**60))
    with pytest.raises(UserError, match=r"one record, at step 1(.|\n)*gradient_checkpointing=true"):
        sft_runs.run(sft_runs.settings(demos, tmp_path / "run"))


def test_one_episode_that_does_not_fit_ends_the_run_with_what_to_change(tmp_path, prompts):
    with pytest.raises(UserError, match=r"one episode \(the longest has \d+ tokens\)(.|\n)*rollout.max_new_tokens"):
        trained(tmp_path / "run", prompts, 160, limit=5, eval__prompts=0)


def test_errors_of_the_allocators_are_told_from_others():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError())


# ---- several processes ---------------------------------------------------------------------------------------------

RANKS = """
import sys
from rlhf import distributed
from ppo_runs import config
from stages.ppo import PPO
from test_out_of_memory import refuse_above

folder, prompts, stage = sys.argv[1:]
deepspeed = f"configs/deepspeed/zero{stage}.json" if stage != "0" else None
c = config(folder, prompts, batch__micro_batch_tokens=320, deepspeed=deepspeed, eval__prompts=0, timeout_seconds=60)
distributed.start(60)
ppo = PPO(c, False, False)
if distributed.rank() == 1:
    refuse_above(ppo, 90, backward=True)
ppo.train()
"""


@pytest.mark.slow
def test_ranks_repeat_a_step_together_where_one_of_them_runs_out_of_memory(tmp_path, prompts):
    done = tiny.launch(2, RANKS, str(tmp_path / "ranks"), prompts, "0")
    assert done.returncode == 0 and "token budget is halved" in done.stdout, done.stdout
    lines = updates(tmp_path / "ranks")
    trained(tmp_path / "one", prompts, 320 >> int(lines[0]["optimizer/halvings"]), eval__prompts=0)
    for line, other in zip(lines, updates(tmp_path / "one"), strict=True):
        assert numbers(line) == pytest.approx(numbers(other), rel=1e-3, abs=1e-5)


SFT_RANKS = """
import sys
import sft_runs
import torch
from rlhf import distributed
from rlhf.training.engine import DeepSpeedEngine

folder, demos = sys.argv[1:]
backward, passes = DeepSpeedEngine.backward, []

def failing(self, loss, last):
    backward(self, loss, last)
    passes.append(last)
    if distributed.rank() == 1 and len(passes) == 3:  # the first of two in the second step
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

DeepSpeedEngine.backward = failing
sft_runs.run(sft_runs.settings(demos, folder, batch={"batch_size": 8, "micro_batch_size": 2, "max_steps": 4}))
"""


@pytest.mark.slow
def test_ranks_repeat_a_step_of_sft_together_where_one_of_them_runs_out_of_memory(tmp_path, demos):
    done = tiny.launch(2, SFT_RANKS, str(tmp_path / "ranks"), demos)
    assert done.returncode == 0 and "from here on it has 1 instead of 2 records" in done.stdout, done.stdout
    batch = {"batch_size": 8, "micro_batch_size": 2, "max_steps": 4}
    alone = sft_runs.run(sft_runs.settings(demos, tmp_path / "alone", batch=batch))
    assert sft_runs.losses(tmp_path / "ranks") == pytest.approx(sft_runs.losses(alone), rel=1e-4)


@pytest.mark.slow
def test_under_zero_stage_2_the_error_gives_the_smaller_budget_to_continue_with(tmp_path, prompts):
    done = tiny.launch(2, RANKS, str(tmp_path / "ranks"), prompts, "2")
    assert done.returncode != 0 and "--resume batch.micro_batch_tokens=160" in done.stdout, done.stdout
