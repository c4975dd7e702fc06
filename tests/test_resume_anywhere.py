"""Checkpoints continue on another number of processes and under another ZeRO stage; on the same they are bit-equal."""

from __future__ import annotations

import json
import shutil

import pytest
import specialist_rows
import tiny
import torch
import yaml
from logged import lines
from ppo_processes import write_config

pytestmark = pytest.mark.slow

MADE = """
import sys
from pathlib import Path
import torch
from torch import nn
from rlhf import distributed
from rlhf.ppo.config import PPOOptimizerConfig
from rlhf.training.engine import make_engine

def made(path, precision):
    torch.manual_seed(0)
    # sizes that divide by no number of ranks, and a parameter with fewer elements than there are ranks
    module = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1))
    groups = [{"params": module[:2].parameters(), "lr": 0.03}, {"params": module[2:].parameters(), "lr": 0.01}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    return module, make_engine(module, groups, PPOOptimizerConfig(), precision, None if path == "plain" else path)

def train(engine, step):
    rows = data[step, rank::ranks].to(engine.dtype if path != "plain" else torch.float32)
    engine.backward(engine.forward(rows).float().square().sum() / 8, last=True)
    return engine.step(1.0)

def save(engine, folder):
    if rank == 0:
        folder.mkdir()
    distributed.barrier()
    engine.save(folder)

path, precision, first, last, start, end = sys.argv[1:]
distributed.start(60, path != "plain")
rank, ranks = distributed.rank(), distributed.world_size()
data = torch.randn(16, 8, 7, generator=torch.Generator().manual_seed(1))
"""
ENGINE = f"""{MADE}
module, engine = made(path, precision)
if start != "-":
    engine.load(Path(start))
norms = [train(engine, step) for step in range(int(first), int(last))]
folder = Path(end)
save(engine, folder)
with engine.gathered(module):
    weights = {{name: p.detach().float().clone() for name, p in engine.module.named_parameters()}}
if rank == 0:
    torch.save({{"weights": weights, "norms": norms}}, folder / "outcome")
distributed.stop()
"""
EVERY_PAIR = f"""{MADE}
import json
folder, norms = Path(start), []
for step, stage in enumerate("0102031213230"):  # each stage once before and once after each other
    module, engine = made(path.replace("zero0", "zero" + stage), precision)
    if step:
        engine.load(folder / str(step - 1))
    norms.append(train(engine, step))
    save(engine, folder / str(step))
if rank == 0:
    Path(end).write_text(json.dumps(norms))
distributed.stop()
"""


def deepspeed(name):
    return name if name == "plain" else str(tiny.REPOSITORY / "configs" / "deepspeed" / f"{name}.json")


CHAIN = [(1, "plain"), (2, "zero2"), (4, "zero3"), (1, "plain")]


def trained(processes, name, first, last, start, end, precision="float32"):
    """Train an engine from a step to another; gives its weights and the norms of its gradients."""
    words = (deepspeed(name), precision, str(first), str(last), str(start), str(end))
    done = tiny.launch(processes, ENGINE, *words)
    assert done.returncode == 0, done.stdout
    return torch.load(end / "outcome", weights_only=True)


@pytest.mark.parametrize("chain", [
    CHAIN,
    [(4, "zero1"), (2, "zero3-offload"), (1, "zero0"), (2, "zero2-offload")],
])  # fmt: skip
def test_an_engine_continues_on_other_processes_under_other_stages(chain, tmp_path):
    whole = trained(1, "plain", 0, 8, "-", tmp_path / "whole")
    norms, before = [], "-"
    for part, (processes, name) in enumerate(chain):
        found = trained(processes, name, 2 * part, 2 * part + 2, before, before := tmp_path / str(part))
        norms += found["norms"]
    assert norms == pytest.approx(whole["norms"], rel=1e-4)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=1e-4)


def test_each_zero_stage_continues_from_each_other(tmp_path):
    whole = trained(1, "plain", 0, 13, "-", tmp_path / "whole")
    done = tiny.launch(2, EVERY_PAIR, deepspeed("zero0"), "float32", "0", "0", str(tmp_path), str(tmp_path / "norms"))
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "norms").read_text()) == pytest.approx(whole["norms"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "precision"),
    [(f"zero{stage}", "bfloat16") for stage in range(4)] + [("zero0", "float32"), ("zero1", "float32")],
)
def test_an_engine_continues_bit_for_bit_on_the_same_processes_under_the_same_stage(name, precision, tmp_path):
    whole = trained(2, name, 0, 4, "-", tmp_path / "whole", precision)
    trained(2, name, 0, 2, "-", tmp_path / "cut", precision)
    found = trained(2, name, 2, 4, tmp_path / "cut", tmp_path / "end", precision)
    assert found["norms"] == whole["norms"][2:]
    assert all(torch.equal(found["weights"][n], weight) for n, weight in whole["weights"].items())


def supervised(folder, train, steps, **more):
    """A config of SFT, the reward model or DPO with this many steps, in a file."""
    values = {"run": str(folder / "run"), "model": {"path": tiny.llama()}, "data": {"train": train}}
    values |= {"batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": steps}, "eval": {"every": 2}}
    values |= {"optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0}, "checkpoints": {"every": 2}, **more}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def run_stage(stage, file, processes, *words):
    done = tiny.launch(
        processes, f"from stages.{stage} import main, run; main({stage!r})", "--config", str(file), *words
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_stage_continues_on_other_processes_under_other_stages(stage, demos, prompts, tmp_path):
    """Each part makes the run longer by two steps, and goes on from the checkpoint that the part before has written."""

    def config(folder, part, **more):
        if stage == "sft":
            return supervised(folder, [demos], 2 * part, **more)
        reward = {"name": "function", "function": "ppo_rewards:letters"}
        more |= {"critic": {"init": "policy"}, "updates": part, "eval": {"every": 1, "prompts": 3}}
        return write_config(folder, prompts, None, reward=reward, **more)

    run_stage(stage, config(tmp_path / "whole", len(CHAIN)), 1)
    for part, (processes, name) in enumerate(CHAIN, 1):
        place = {} if name == "plain" else {"deepspeed": deepspeed(name)}
        run_stage(stage, config(tmp_path / "moved", part, **place), processes, *["--resume"] * (part > 1))
    found, expected = lines(tmp_path / "moved" / "run"), lines(tmp_path / "whole" / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    moves = [move["processes"] for move in json.loads((tmp_path / "moved" / "run" / "run.json").read_text())["moved"]]
    assert moves == [{"from": 1, "to": 2}, {"from": 2, "to": 4}, {"from": 4, "to": 1}]


@pytest.mark.parametrize("stage", ["reward", "dpo", "specialist"])
def test_the_other_stages_continue_on_two_processes_too(stage, rankings, tmp_path):
    def config(folder, steps, **more):
        if stage != "specialist":
            return supervised(folder, rankings, steps, **more)
        rows = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
        return supervised(
            folder, rankings, steps, **more, model={"path": str(tmp_path / "bert")}, task="text", data=rows
        )

    shutil.copytree(tiny.bert(), tmp_path / "bert")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process draws its own
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings | none))
    for seed, name in enumerate(("train", "eval")):
        specialist_rows.write(tmp_path / f"{name}.jsonl", specialist_rows.rows("text", 24, seed))
    run_stage(stage, config(tmp_path / "whole", 4), 1)
    run_stage(stage, config(tmp_path / "moved", 2), 1)
    run_stage(stage, config(tmp_path / "moved", 4, deepspeed=deepspeed("zero3")), 2, "--resume")
    for mine, theirs in zip(lines(tmp_path / "moved" / "run"), lines(tmp_path / "whole" / "run"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
