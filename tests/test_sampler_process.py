"""The sampler `process`: the tokens of `hf`, sampled elsewhere, and PPO that learns while the next ones are sampled."""

from __future__ import annotations

import json

import ppo_runs
import pytest
import tiny
from logged import updates

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.models.load import load_policy
from rlhf.rollout import sampler_process
from rlhf.rollout.samplers import hf, process
from rlhf.rollout.types import SamplingParams
from stages.ppo import PPO, run

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
SAME = ("objective/rlhf_reward", "loss/policy", "loss/value", "policy/approx_kl", "optimizer/grad_norm")


def same_tokens(model, chat, **options):
    sampling = SamplingParams(12, **options)
    here, there = (sampler(model, PROMPTS, range(3), sampling, chat) for sampler in (hf, process))
    assert [(one.ids, one.ended) for one in there] == [(one.ids, one.ended) for one in here]
    assert all(len(one.logprobs) == len(one.ids) for one in there)


@pytest.mark.slow
def test_it_gives_the_tokens_of_hf_and_follows_the_weights():
    settings = ModelConfig(path=tiny.llama())
    model, chat = load_policy(settings, settings.path).eval(), load_tokenizer(settings, settings.path)
    same_tokens(model, chat, temperature=0.7, stop=("a",))
    child = sampler_process._CHILDREN[model].child
    before = hf(model, PROMPTS, range(3), SamplingParams(12), chat)
    model.model.embed_tokens.weight.data.mul_(1.5)
    assert hf(model, PROMPTS, range(3), SamplingParams(12), chat) != before
    same_tokens(model, chat)
    folder = sampler_process._CHILDREN[model].folder
    assert not list(folder.glob("weights-*")) and not list(folder.glob("answer-*"))
    del model
    assert child.poll() is not None and not folder.exists()


def config(folder, demos, **changes):
    changes = {"rollout__sampler": "process", "eval__every": 4, "updates": 4} | changes
    return ppo_runs.config(folder, demos, **changes)


@pytest.mark.slow
def test_the_run_is_that_of_hf_and_a_lost_process_is_named(tmp_path, demos):
    run(config(tmp_path / "hf", demos, rollout__sampler="hf", updates=2))
    stage = PPO(config(tmp_path / "process", demos, updates=2, eval__prompts=0), resume=False, overwrite=False)
    found = stage.update(0)
    for name in SAME:
        assert found[name] == pytest.approx(updates(tmp_path / "hf")[0][name], abs=1e-5), name
    child = sampler_process._CHILDREN[stage.models.policy].child
    child.kill()
    with pytest.raises(UserError, match=rf"sampler's process \(pid {child.pid}\) was killed by signal 9"):
        stage.update(1)


@pytest.mark.slow
def test_ahead_samples_with_the_weights_before_the_update_and_repeats_and_resumes_exactly(tmp_path, demos):
    lora = {"name": "lora", "rank": 2}
    whole = config(tmp_path / "whole", demos, rollout__ahead=1, tuning=lora)
    stage = PPO(whole, resume=False, overwrite=False)
    initial = stage.rollout(stage.draw_prompts(1)).completions
    stage.train()
    again = config(tmp_path / "again", demos, rollout__ahead=1, tuning=lora)
    stopped = PPO(again, resume=False, overwrite=False)
    stopped.evaluate()
    for index in range(2):
        if index == 1:
            assert [one.ids for one in stopped.ahead().completions] == [one.ids for one in initial]
        metrics = stopped.update(index)
        stopped.done += 1
        stopped.reporter.update(stopped.done, metrics)
    stopped.save()
    saved = json.loads((tmp_path / "again/checkpoints/step-00000002/ppo.json").read_text())
    assert len(saved["ahead"]) == 8
    del stopped
    PPO(again, resume=True, overwrite=False).train()
    rows = [
        [{name: row[name] for name in row if not name.startswith(("time/", "memory/"))} for row in updates(folder)]
        for folder in (tmp_path / "whole", tmp_path / "again")
    ]
    assert len(rows[0]) == 4
    assert rows[0][0]["rollout/sampler_gap_max"] < 1e-4 < rows[0][1]["rollout/sampler_gap_max"]
    assert rows[0] == rows[1]


def test_ahead_is_refused_where_nothing_samples_meanwhile_or_corrects_for_older_weights(tmp_path):
    for fault, changes in {
        "use sampler process": {"rollout__sampler": "hf"},
        "needs max_importance_weight": {"rollout__max_importance_weight": None},
        "score.policy: with rollout.ahead": {"score__policy": "sampler"},
        "`process` gets merged weights, and 'bottleneck' cannot": {"tuning": "bottleneck"},
    }.items():
        with pytest.raises(UserError, match=fault):
            config(tmp_path, "demos", rollout__ahead=1, **changes)
