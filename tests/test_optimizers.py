"""The table of optimizers: what each holds, that a resumed run continues bit for bit, and what is refused."""

from __future__ import annotations

import json
import os
import sys

import pytest
import tiny
import torch
from torch import nn

from rlhf.config.base import OptimizerConfig
from rlhf.config.optimizers import OPTIMIZERS, refuse_optimizer
from rlhf.core.errors import UserError
from rlhf.training.engine import make_engine
from rlhf.training.saved_state import LAYOUT

ON_DEVICE = [row.name for row in OPTIMIZERS if not row.traits["host"]]
SCALARS = ("step", "RMS", "qmap1", "qmap2")
"""State that does not grow with the tensor: a step count, a norm, tables of 256 numbers that all tensors share."""


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 3))


def engine_for(name, lr=0.01, **options):
    module = model()
    groups = [{"params": list(module[0].parameters()), "lr": lr}, {"params": list(module[2].parameters()), "lr": lr}]
    return make_engine(module, groups, OptimizerConfig(algorithm={"name": name, **options}), "float32", None)


def train(engine, steps):
    losses = []
    for step in steps:
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
        loss = (engine.forward(x) - x[:, :3]).square().mean()
        engine.backward(loss, last=True)
        engine.step(1.0)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ON_DEVICE)
def test_a_loaded_optimizer_continues_bit_for_bit(name, tmp_path):
    first = engine_for(name)
    losses = train(first, range(40))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    first.save(tmp_path)
    second = engine_for(name)
    second.load(tmp_path)
    assert train(first, range(40, 44)) == train(second, range(40, 44))
    for a, b in zip(first.module.parameters(), second.module.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adamw-8bit", "adafactor"])
def test_a_state_that_cannot_be_divided_is_refused_under_another_stage_and_taken_under_stage_0(name, tmp_path):
    first = engine_for(name)
    train(first, range(2))
    first.save(tmp_path)
    layout = json.loads((tmp_path / LAYOUT).read_text())
    (tmp_path / LAYOUT).write_text(json.dumps(layout | {"processes": 2}))
    engine_for(name).load(tmp_path)
    (tmp_path / LAYOUT).write_text(json.dumps(layout | {"processes": 2, "zero_stage": 3}))
    with pytest.raises(UserError, match=r"written by 2 processes under ZeRO stage 3(.|\n)*cannot be divided"):
        engine_for(name).load(tmp_path)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_an_optimizer_holds_the_bytes_that_the_plan_counts(name):
    engine = engine_for(name)
    train(engine, [0])
    for parameter in engine.module.parameters():
        state = engine.optimizer.state[parameter]
        held = sum(value.nbytes for key, value in state.items() if torch.is_tensor(value) and key not in SCALARS)
        assert held == OPTIMIZERS[name].traits["state"](parameter.shape), (name, tuple(parameter.shape))


def test_moments_in_8_bits_learn_as_fast_as_those_in_32():
    whole, small = (sum(train(engine_for(name), range(60))[-10:]) for name in ("adamw", "adamw-8bit"))
    assert small == pytest.approx(whole, rel=0.1)


def test_adafactors_first_step_by_hand():
    # A gradient of rank one equals its row and column means' estimate, so its first update is its sign times the rate.
    weight = nn.Parameter(torch.zeros(2, 3))
    pick = OPTIMIZERS.pick("adafactor")
    optimizer = pick([{"params": [weight], "lr": 0.5}], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    weight.grad = torch.tensor([[1.0], [-2.0]]) * torch.tensor([[1.0, 3.0, 0.5]])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.5 * weight.grad.sign())


def test_settings_that_an_optimizer_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"betas: 'adafactor' has no such setting"):
        OptimizerConfig(algorithm="adafactor", betas=(0.8, 0.9))
    with pytest.raises(ValueError, match="no option 'decay'"):
        OptimizerConfig(algorithm={"name": "adamw", "decay": 0.5})
    with pytest.raises(ValueError, match="did you mean 'adamw-8bit'"):
        OptimizerConfig(algorithm="adamw8bit")


@pytest.mark.parametrize(
    "name, settings, bfloat16, said",
    [
        ("adafactor", {"stage": 1}, False, "does not work under ZeRO stage 1"),
        ("adafactor", {"stage": 0}, True, "does not work under DeepSpeed in bfloat16"),
        ("cpu-adam", None, False, "offload_optimizer"),
        ("cpu-adam", {"stage": 2}, False, "offload_optimizer"),
    ],
)
def test_what_an_optimizer_does_not_work_with_is_refused(name, settings, bfloat16, said):
    zero = None if settings is None else {"zero_optimization": settings}
    with pytest.raises(UserError, match=said):
        refuse_optimizer(OPTIMIZERS.pick(name), zero, bfloat16)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        refuse_optimizer(OPTIMIZERS.pick("adamw-8bit"), None, False)


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from rlhf import distributed
from rlhf.config.base import OptimizerConfig
from rlhf.training.engine import make_engine
from rlhf.training.saved_state import LAYOUT

distributed.start(60)
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])

def made(name, stage, precision):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3))
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in ((layers[:3], 0.003), (layers[3:], 0.001))]
    path = f"configs/deepspeed/{stage}.json"
    return make_engine(layers, groups, OptimizerConfig(algorithm=name), precision, path)

def train(engine, steps):
    norms = []
    for step in steps:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + distributed.rank()))
        engine.backward(engine.forward(x.to(engine.dtype)).float().square().sum() / 8, last=True)
        norms.append(engine.step(1.0))
    return norms

def weights(engine):
    with engine.gathered(engine.module):
        return [p.detach().clone() for p in engine.module.parameters()]

for name, stage, precision in cases:
    place = folder / f"{name}-{stage}-{precision}"
    place.mkdir(exist_ok=True)
    first = made(name, stage, precision)
    train(first, range(2))
    early = weights(first)
    first.save(place)
    second = made(name, stage, precision)
    second.load(place)
    assert train(first, range(2, 5)) == train(second, range(2, 5)), place
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second))), place
    assert not any(torch.equal(a, b) for a, b in zip(early, weights(second))), place
distributed.stop()
"""
CASES = [
    ("adamw-8bit", "zero0", "bfloat16"),
    ("adamw-8bit", "zero1", "float32"),
    ("adamw-8bit", "zero2", "bfloat16"),
    ("adamw-8bit", "zero3", "float32"),
    ("adamw-8bit", "zero2-offload", "float32"),
    ("adamw-8bit", "zero3-offload", "bfloat16"),
    ("adafactor", "zero0", "float32"),
]
CPU_ADAM = [("cpu-adam", "zero2-offload", "float32"), ("cpu-adam", "zero3-offload", "bfloat16")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(CASES, id="on the device"),
        pytest.param(
            CPU_ADAM,
            id="on the host",
            marks=pytest.mark.skipif(
                "TORCH_EXTENSIONS_DIR" not in os.environ,
                reason="compiles C++ for minutes; TORCH_EXTENSIONS_DIR names the folder that keeps the result",
            ),
        ),
    ],
)
def test_two_processes_under_deepspeed_continue_bit_for_bit(cases, tmp_path):
    done = tiny.launch(2, PROGRAM, str(tmp_path), json.dumps(cases))
    assert done.returncode == 0, done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"-".join(case) for case in cases}
