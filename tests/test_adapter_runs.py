"""Every adapter of the table in whole SFT runs: the base stays as it is, the result is its own parameters alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from logged import lines as metrics_of
from safetensors.torch import load_file
from sft_runs import run, settings
from stopped import stopped_after

from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.runs.run import Run
from rlhf.training import opening
from rlhf.tuning.methods import TUNING, say_trainable
from stages import evaluate, sample

ADAPTERS = [row.name for row in TUNING if row.traits["adapter"] and not row.traits["quantized"]]
"""The rows that run without a GPU."""
SMALL = {"batch": {"batch_size": 8, "micro_batch_size": 4, "max_steps": 4}, "eval": {"every": 4, "samples": 0}}


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "demos", 40, held_out=4)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    places = [folder / part / "adapter_model.safetensors" for part in ("adapter", "model")]
    return load_file(next(place for place in places if place.is_file()))


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in ("ia3", "p-tuning", "prefix-tuning"))) for m in ADAPTERS],
)
def test_a_run_trains_saves_and_resumes_its_own_parameters_alone(
    method: str, demos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_file(Path(tiny.llama()) / "model.safetensors")
    models: list[Any] = []
    monkeypatch.setattr(opening, "say_trainable", lambda *words: models.append(words[1]) or say_trainable(*words))
    values = settings(demos, tmp_path / "whole", tuning=method, checkpoints={"every": 2}, **SMALL)
    whole = run(values)
    model = models[0]
    frozen = {name: p for name, p in model.get_base_model().named_parameters() if not p.requires_grad}
    plain = {name.replace(".base_layer", ""): p for name, p in frozen.items()}
    assert {name for name in base if name in plain} >= {name for name in base if "layers" in name}
    assert all(torch.equal(plain[name], base[name]) for name in base if name in plain)
    found = adapter_of(whole)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method != "p-tuning":  # whose encoder is not needed once the tokens are learned
        assert sum(tensor.numel() for tensor in found.values()) == trained
    # a run that ends after its checkpoint at step 2, and goes on
    cut = tmp_path / "cut"
    with stopped_after(3):
        run(values | {"run": str(cut)})
    assert Run(cut, "sft").checkpoints(2).newest() is not None
    biggest = max(file.stat().st_size for file in (cut / "checkpoints").rglob("*") if file.is_file())
    assert biggest < 12 * trained + 100_000  # weights and two moments of what is trained
    run(values | {"run": str(cut)}, resume=True)
    resumed = adapter_of(cut)
    assert all(torch.equal(found[name], resumed[name]) for name in found)


@pytest.mark.parametrize("method", ADAPTERS)
def test_sample_evaluate_and_export_take_the_result(method: str, demos: str, tmp_path: Path) -> None:
    done = finished.sft(tmp_path / "run", method)
    out = tmp_path / "samples.jsonl"
    finished.invoke(sample.command, done, "--dataset", demos, "--limit", 2, "--max-new-tokens", 4, "--out", out)
    assert len(out.read_text().splitlines()) == 2
    finished.invoke(evaluate.command, done, "--dataset", demos, "--limit", 2)
    facts = export(done, tmp_path / "out", EXPORTERS.pick("adapter"))
    assert facts["adapter_base"] == tiny.llama()
    assert facts["parameters"] == sum(tensor.numel() for tensor in adapter_of(Path(done)).values())


CHECK = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from rlhf.config.load import check_config
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.sft.config import SFTConfig
from rlhf.tuning.merging import gathered
from stages import ppo, reward, sft

CONFIGS = {"sft": (SFTConfig, sft), "reward": (RewardConfig, reward), "ppo": (PPOConfig, ppo)}
base = load_file(Path(json.loads(sys.argv[1])[0][1]["model"]["path"]) / "model.safetensors")
checked = []

def frozen_base(model, tuning):
    with gathered(list(model.parameters())):
        plain = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
        same = [torch.equal(plain[n].detach().float().cpu(), base[n]) for n in base if n in plain]
    assert len(same) >= len(base) - 1 and all(same), tuning
    checked.append(tuning)

def before_saving(usual):
    def save_result(path, model, chat, tuning):
        frozen_base(model, tuning)
        usual(path, model, chat, tuning)
    return save_result

from rlhf.ppo import models
for module in (sft, reward, models):
    module.save_result = before_saving(module.save_result)
for stage, values in json.loads(sys.argv[1]):
    kind, module = CONFIGS[stage]
    module.run(check_config(kind, values, "the test"), False, False)
assert len(checked) == len(json.loads(sys.argv[1]))
"""
VIRTUAL = [row.name for row in TUNING if row.traits["prompt_learning"]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_base_is_bitwise_unchanged_under_zero(stage: int, demos: str, rankings: str, tmp_path: Path) -> None:
    """All methods in one process group; virtual tokens in the reward model and in PPO too."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    batch = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 1}
    small = SMALL | {"batch": batch, "deepspeed": str(file)}
    jobs = [("sft", settings(demos, tmp_path / f"sft-{method}", tuning=method, **small)) for method in ADAPTERS]
    common = {"model": {"path": tiny.llama()}, "deepspeed": str(file)}
    for method in VIRTUAL:
        values = common | {"tuning": method, "run": str(tmp_path / f"reward-{method}"), "batch": batch}
        jobs.append(("reward", values | {"data": {"train": rankings}}))
        values = common | {"tuning": method, "run": str(tmp_path / f"ppo-{method}"), "data": {"prompts": demos}}
        values |= {"reward": {"name": "function", "function": "ppo_rewards:letters"}, "updates": 1}
        values |= {"critic": {"init": "policy", "tuning": method}, "batch": {"minibatches": 1, "epochs": 1}}
        jobs.append(
            ("ppo", values | {"rollout": {"prompts_per_update": 4, "max_new_tokens": 4}, "eval": {"prompts": 0}})
        )
    done = tiny.launch(2, CHECK, json.dumps(jobs))
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(adapter_of(Path(values["run"])) for _, values in jobs)
    for method in VIRTUAL:
        (update,) = (row for row in metrics_of(tmp_path / f"ppo-{method}") if "policy/first_ratio_max" in row)
        assert update["policy/first_ratio_min"] == update["policy/first_ratio_max"] == 1
