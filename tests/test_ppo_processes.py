"""PPO on two processes equals one; killed runs continue bit for bit, whenever the kill comes."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from logged import lines, updates
from ppo_processes import complete, kill_when, start, write_config
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A scalar-head folder with the policy's tokenizer: reward model and critic, so that ZeRO-3 shards those too."""
    from rlhf.config.base import ModelConfig
    from rlhf.models.scalar import load_scalar

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("reward")
    scalar = load_scalar(ModelConfig(path=tiny.llama()), tiny.llama())
    scalar.set_scale(0.1, 2.0)
    scalar.model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory, prompts, reward_model):
    folder = tmp_path_factory.mktemp("single")
    complete(1, write_config(folder, prompts, reward_model))
    return folder


@pytest.mark.parametrize(
    ("stage", "tokens", "packing"),
    [  # with ZeRO-3 all four; the others have every pair of values
        *(("zero3", tokens, packing) for tokens in (120, 1) for packing in (False, True)),
        ("zero0", 120, False), ("zero0", 1, True), ("zero2", 120, True), ("zero2", 1, False),
    ],
)  # fmt: skip
def test_two_processes_give_the_single_process_metrics(stage, tokens, packing, single, tmp_path, prompts, reward_model):
    """With one sequence a pass, of minibatches of 3 and 4, one of the two runs out of passes before the other."""
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / f"{stage}.json")
    batch = {"epochs": 1, "minibatches": 2, "micro_batch_tokens": tokens, "packing": packing}
    complete(2, write_config(tmp_path, prompts, reward_model, deepspeed=settings, batch=batch))
    found, expected = lines(tmp_path / "run"), lines(single / "run")
    lengths = [line["rollout/response_length"] for line in expected if "objective/kl_coef" in line]
    assert any(length != int(length) for length in lengths), "answers of unequal length are the point"
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    weights, plain = (load_file(f / "run" / "model" / "model.safetensors") for f in (tmp_path, single))
    for name, weight in plain.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)


def test_two_processes_with_compiled_layers_give_the_single_process_metrics(single, tmp_path, prompts, reward_model):
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero2.json")
    complete(2, write_config(tmp_path, prompts, reward_model, deepspeed=settings, compile=True))
    for mine, theirs in zip(lines(tmp_path / "run"), lines(single / "run"), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("sampler", ["transformers", "process"])
def test_two_processes_weigh_the_log_probs_of_another_sampler(sampler, tmp_path, prompts, reward_model):
    """`process` gets the weights module by module, with an adapter merged, also from a rank that has no prompt."""
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero3.json")
    rollout = {"prompts_per_update": 7, "max_new_tokens": 14, "sampler": sampler, "temperature": 0.8}
    more = {"tuning": "lora", "eval": {"every": 3, "prompts": 1}} if sampler == "process" else {}
    complete(2, write_config(tmp_path, prompts, reward_model, deepspeed=settings, rollout=rollout, **more))
    rows = updates(tmp_path / "run")
    assert len(rows) == 3
    for line in rows:
        # a log-prob that came to another token on the way would lie whole nats off
        assert 0 < line["rollout/sampler_gap_mean"] <= line["rollout/sampler_gap_max"] < 1e-4
        assert line["rollout/importance_truncated"] == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_while_it_learns_and_while_it_writes_continues_bit_for_bit(
    processes, tmp_path, prompts, reward_model
):
    settings = {"deepspeed": str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero2.json")} if processes > 1 else {}
    files = [write_config(tmp_path / name, prompts, reward_model, **settings) for name in ("whole", "cut")]
    complete(processes, files[0])
    checkpoints = tmp_path / "cut" / "run" / "checkpoints"

    def learning():
        return (checkpoints / "step-00000001").is_dir()

    def writing():
        return (checkpoints / ".step-00000002.partial").is_dir()

    kill_when(start(processes, files[1]), learning)
    kill_when(start(processes, files[1], "--resume"), writing)
    assert json.loads((tmp_path / "cut" / "run" / "run.json").read_text())["status"] == "running"
    output = complete(processes, files[1], "--resume")
    assert "Continuing after update" in output
    assert lines(tmp_path / "cut" / "run") == lines(tmp_path / "whole" / "run")
    whole, cut = (load_file(tmp_path / n / "run" / "model" / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_three_processes_with_one_prompt_give_the_single_process_metrics(tmp_path, prompts, reward_model):
    """Two of them sample nothing and learn from nothing, but take part in every collective."""
    settings = {"deepspeed": str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero3.json")}
    one = {"rollout": {"prompts_per_update": 1, "max_new_tokens": 14}, "eval": {"every": 3, "prompts": 1}}
    one |= {"batch": {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 120}}
    complete(1, write_config(tmp_path / "one", prompts, reward_model, **one))
    complete(3, write_config(tmp_path / "three", prompts, reward_model, **one, **settings))
    found, expected = lines(tmp_path / "three" / "run"), lines(tmp_path / "one" / "run")
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)


SENT = """
import json
import sys

import torch
from ppo_runs import config
from safetensors.torch import load_file

from rlhf import distributed
from rlhf.tuning.merging import merged_weights
from stages.ppo import PPO

folder, prompts, model, zero3 = sys.argv[1:]
distributed.start(120)
ppo = PPO(config(folder, prompts, model__path=model, deepspeed=zero3), False, False)
policy = ppo.models.policy
own = load_file(model + "/model.safetensors")
most, names = 0, set()
with ppo.models.engine.gathered(policy, whole=False), torch.no_grad():
    for name, weight in merged_weights(policy):
        here = {id(p): p.ds_numel for p in policy.parameters() if p.ds_status.name == "AVAILABLE"}
        most = max(most, sum(here.values()))
        assert torch.equal(weight, own.get(name, own["model.embed_tokens.weight"])), name
        names.add(name)
largest = max(p.ds_numel for p in policy.parameters())
assert 0 < most <= largest, (most, largest)
assert {"model.embed_tokens.weight", "lm_head.weight"} <= names and len(names) == len(own) + 1, names ^ set(own)
distributed.stop()
"""


def test_weights_are_sent_module_by_module_under_zero_3(tmp_path, prompts):
    zero3 = json.loads((tiny.REPOSITORY / "configs" / "deepspeed" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else each rank keeps all of a tiny model
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    done = tiny.launch(2, SENT, str(tmp_path / "run"), prompts, tiny.llama(), str(tmp_path / "zero3.json"))
    assert done.returncode == 0, done.stdout
