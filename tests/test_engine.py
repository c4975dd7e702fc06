"""The engine: accumulation, clipping, groups, finiteness, checkpoints; DeepSpeed on two processes is plain torch."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
import transformers
from torch import nn

from rlhf import distributed
from rlhf.ppo.config import PPOOptimizerConfig
from rlhf.training.engine import make_engine
from rlhf.training.schedule import lr_scale

CONFIG = PPOOptimizerConfig(max_grad_norm=0.5, weight_decay=0.1)


def two_parts():
    torch.manual_seed(0)
    return nn.ModuleDict({"policy": nn.Linear(4, 3), "critic": nn.Linear(4, 1)})


def engine_for(module, lr=(0.1, 0.01)):
    groups = [{"params": list(module[name].parameters()), "lr": rate} for name, rate in zip(("policy", "critic"), lr)]
    return make_engine(module, groups, CONFIG, "float32", None)


def loss_of(module, x):
    return module["policy"](x).square().sum() + module["critic"](x).sum()


def test_a_step_is_adamw_on_the_clipped_sum_of_the_micro_batches():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    mine, plain = two_parts(), two_parts()
    engine = engine_for(mine)
    for i, part in enumerate(x.split(2)):
        engine.backward(loss_of(mine, part), last=i == 2)
    norm = engine.step(0.5)

    loss_of(plain, x).backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    groups = [
        {"params": plain["policy"].parameters(), "lr": 0.05},
        {"params": plain["critic"].parameters(), "lr": 0.005},
    ]
    torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.1).step()
    assert norm == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)


def test_a_gradient_that_is_not_finite_updates_nothing_and_is_reported_once():
    module = two_parts()
    engine = engine_for(module)
    before = [p.detach().clone() for p in module.parameters()]
    engine.backward(loss_of(module, torch.full((1, 4), math.inf)), last=True)
    assert engine.step(1.0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    engine.optimizer.zero_grad()
    engine.backward(loss_of(module, torch.ones(1, 4)), last=True)
    assert engine.step(1.0) is not None


def test_a_loaded_engine_continues_exactly(tmp_path):
    x = torch.randn(4, 4)
    first = engine_for(two_parts())
    first.backward(loss_of(first.module, x), last=True)
    first.step(1.0)
    first.save(tmp_path)
    second = engine_for(two_parts())
    second.load(tmp_path)
    for engine in (first, second):
        engine.backward(loss_of(engine.module, 2 * x), last=True)
        engine.step(1.0)
    for a, b in zip(first.module.parameters(), second.module.parameters()):
        assert torch.equal(a, b)


def test_rates_climb_from_the_first_step_then_fall():
    assert [lr_scale("linear", step, 10, 2, first=1) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )
    assert [lr_scale("cosine", step, 4, 0, first=1) for step in range(4)] == pytest.approx(
        [1, 0.8535534, 0.5, 0.1464466]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
def test_rates_are_those_of_transformers(schedule, warmup):
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        assert lr_scale(schedule, step, 10, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_frozen_models_take_no_gradient():
    engine = engine_for(two_parts())
    frozen = engine.freeze(nn.Linear(2, 2))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


def test_a_process_that_has_started_takes_the_smallest_numbers_for_nothing():
    distributed.start(60)
    assert float(torch.tensor(1e-38) * 1e-2) == 0  # what is below 1.2e-38 would slow its passes by a fifth


PROGRAM = """
import json, math, sys
import torch
from torch import nn
from rlhf import distributed
from rlhf.ppo.config import PPOOptimizerConfig
from rlhf.training.engine import make_engine

path, folder = sys.argv[1:3]
distributed.start(60)
torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
module = nn.ModuleDict({"policy": policy, "critic": nn.Linear(8, 1)})

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = module
    def forward(self, x):
        return self.parts["policy"](x).square().sum() + self.parts["critic"](x).sum()

both = Both()
config = PPOOptimizerConfig(max_grad_norm=0.5)
groups = [{"params": list(module[n].parameters()), "lr": lr} for n, lr in (("policy", 0.03), ("critic", 0.01))]
engine = make_engine(both, groups, config, "float32", None if path == "plain" else path)
if path != "plain":
    assert torch.distributed.get_world_size() == 2
    assert engine.stage == json.load(open(path))["zero_optimization"]["stage"]
data = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
norms = []
for step in range(4):
    # six rows a step: rank 0 has four of them, rank 1 two, in two micro-batches each
    shares = [[[0, 1, 2], [3]], [[4], [5]]] if distributed.world_size() == 2 else [[[0, 1], [2, 3, 4], [5]]]
    for i, rows in enumerate(shares[distributed.rank()]):
        engine.backward(engine.forward(data[step, rows]) / 6, last=i == len(shares[distributed.rank()]) - 1)
    norms.append(engine.step(1.0 - 0.1 * step))
with engine.gathered(both):
    weights = {n: p.detach().float().clone() for n, p in both.named_parameters()}
    for _ in range(1 + distributed.rank()):  # outside the engine, another number of calls on each rank
        both(data[0])
engine.backward(engine.forward(data[0] * (math.inf if distributed.rank() == 0 else 1.0)), last=True)
assert engine.step(1.0) is None
with engine.gathered(both):
    assert all(torch.equal(p.float(), weights[n]) for n, p in both.named_parameters())
if distributed.rank() == 0:
    torch.save({"weights": weights, "norms": norms}, folder)
distributed.stop()
"""


def outcome(name, processes, folder):
    path = name if name == "plain" else str(tiny.REPOSITORY / "configs" / "deepspeed" / f"{name}.json")
    done = tiny.launch(processes, PROGRAM, path, str(folder / name))
    assert done.returncode == 0, done.stdout
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return outcome("plain", 1, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_two_processes_under_deepspeed_equal_plain_torch(stage, plain, tmp_path):
    found = outcome(stage, 2, tmp_path)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=1e-4)


def test_deepspeed_files_say_their_stage():
    for file in (tiny.REPOSITORY / "configs" / "deepspeed").glob("*.json"):
        assert f"zero{json.loads(file.read_text())['zero_optimization']['stage']}" in file.name
