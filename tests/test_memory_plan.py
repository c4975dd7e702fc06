"""Whether a run fits on GPUs, the cheapest change that makes it fit, and the command `rlhf plan`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from memory_shapes import shape
from typer.testing import CliRunner

from rlhf.cli.stage_configs import TRAINING
from rlhf.distributed.deepspeed_json import read_deepspeed
from rlhf.memory.plan import GIB, MemoryPlan
from rlhf.memory.predict import ZeroLayout, predict
from stages.cli import app
from stages.memory import lengths_of, memory_of, stage_of

REPOSITORY = Path(__file__).resolve().parents[1]


def plan_of(path: str, gib: float, processes: int = 2, **more: object) -> MemoryPlan:
    values = {"run": "runs/x", "model": {"path": path}, "data": {"prompts": "x", "max_prompt_tokens": 64}}
    values |= {"reward": {"name": "model", "path": path}, "rollout": {"max_new_tokens": 64}, **more}
    return MemoryPlan(TRAINING["ppo"], values, "test", processes, gib * GIB)


@pytest.mark.slow
def test_the_largest_budget_fits_and_the_next_does_not(tmp_path):
    path = shape(tmp_path)
    plan = plan_of(path, 1000)
    few, many = plan.budgets()[0], plan.budgets()[-1]
    need = [plan.needs(f"batch.micro_batch_tokens={tokens}") for tokens in (few, many)]
    tight = plan_of(path, (need[0] + need[1]) / 2 / GIB)
    best = tight.largest_budget()
    assert few <= best < many and tight.fits(f"batch.micro_batch_tokens={best}")
    after = tight.budgets()[tight.budgets().index(best) + 1]
    assert not tight.fits(f"batch.micro_batch_tokens={after}")


@pytest.mark.slow
def test_the_cheapest_change_is_smaller_micro_batches_where_they_suffice(tmp_path):
    path = shape(tmp_path)
    plan = plan_of(path, 1000, batch={"micro_batch_tokens": 4096})
    smallest, own = plan.needs(f"batch.micro_batch_tokens={plan.budgets()[0]}"), plan.needs()
    found = plan_of(path, (smallest + own) / 2 / GIB, batch={"micro_batch_tokens": 4096}).cheapest()
    assert found is not None and [change.split("=")[0] for change in found] == ["batch.micro_batch_tokens"]


@pytest.mark.slow
def test_activations_are_recomputed_where_the_smallest_micro_batches_are_too_large(tmp_path):
    path = shape(tmp_path, layers=6)
    least = [f"batch.micro_batch_tokens={plan_of(path, 1000).budgets()[0]}"]
    kept, again = (plan_of(path, 1000).needs(*least, *more) for more in ([], ["gradient_checkpointing=true"]))
    tight = plan_of(path, (kept + again) / 2 / GIB)
    found = tight.cheapest()
    assert found and "gradient_checkpointing=true" in found
    assert not tight.fits() and tight.fits(*found)


@pytest.mark.slow
def test_the_command_shows_longer_prompts_and_what_works_with_the_optimizer(tmp_path):
    file = config_file(tmp_path, shape(tmp_path / "model", layers=1))
    words = ("rollout.max_new_tokens=64", "optimizer.algorithm=adafactor", "--lengths", "128")
    status, text = said("--config", file, "--gpus", "1", "--gpu-memory", "80", *words)
    assert status == 0, text
    assert "adamw-8bit" in text and "Longest prompt" in text and "128 " in text
    assert "offload" not in text  # Adafactor does not work there


def test_one_gpu_is_offered_offload_alone(tmp_path):
    plan = plan_of(shape(tmp_path), 80, processes=1)
    offers = plan._other_files()
    assert offers == ["configs/deepspeed/zero2-offload.json", "configs/deepspeed/zero3-offload.json"]
    assert all(plan.works(f"deepspeed={file}") for file in offers)
    assert not any(plan.works(f"deepspeed={file}", "optimizer.algorithm=adafactor") for file in offers)


@pytest.mark.parametrize("text", ["4k", "4096;8192", "0", ""])
def test_lengths_that_are_no_numbers_are_refused(text):
    with pytest.raises(Exception, match="--lengths"):
        lengths_of(text)


def test_the_plan_counts_the_state_of_each_optimizer(tmp_path):
    path = shape(tmp_path, layers=1)
    values = {"run": "runs/x", "model": {"path": path, "max_length": 64}, "data": {"train": "x"}}
    plan, held = MemoryPlan(TRAINING["sft"], values, "test", 1, 80 * GIB), {}
    for name in ("adamw", "adamw-8bit", "adafactor"):
        held[name] = plan.predict(f"optimizer.algorithm={name}").phases["checkpoint"]["optimizer"]
    trained = [s.trained for s in next(iter(plan._traced.values()))[0].sizes]
    assert held["adamw"] == 8 * sum(trained)
    assert held["adafactor"] < 0.1 * held["adamw"] < 0.4 * held["adamw-8bit"]
    assert held["adamw-8bit"] < 0.3 * held["adamw"]  # small tensors keep theirs in 32 bits


@pytest.mark.slow
def test_offloaded_gradients_stay_on_the_gpu_only_where_no_bucket_holds_them(tmp_path):
    plan = plan_of(shape(tmp_path), 80, processes=1, precision="bfloat16")
    settings = read_deepspeed(REPOSITORY / "configs" / "deepspeed" / "zero2-offload.json")
    traced = plan._trace(plan.config, True)
    largest = 1000 * 64  # the embedding, and the policy's head
    for bucket, kept in ((largest, 0), (largest - 1, 3 * 2 * largest)):
        found = predict(traced, replace(ZeroLayout.of(settings), bucket=bucket, buckets=1), 1, gpu=True)
        assert found.phases["load"].total == found.phases["checkpoint"].total
        states = found.phases["update"]["gradients"]
        assert states == kept


EIGHT_BILLION = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
EIGHT_BILLION |= {"num_key_value_heads": 8, "max_position_embeddings": 131072}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_8b_with_all_weights_fits_on_one_gpu_of_80_gib(tmp_path, stage):
    file = REPOSITORY / "configs" / "8b-one-gpu" / f"{stage}.yaml"
    values = yaml.safe_load(file.read_text("utf-8")) | {
        "deepspeed": str(REPOSITORY / "configs/deepspeed/zero2-offload.json")
    }
    assert values["deepspeed"].endswith(yaml.safe_load(file.read_text("utf-8"))["deepspeed"])
    base = shape(tmp_path, layers=32, **EIGHT_BILLION)
    plan = MemoryPlan(TRAINING[stage], values, str(file), 1, 80 * GIB, base)
    assert plan.fits()
    if stage == "sft":
        assert not plan.fits("deepspeed=null")  # float32 weights and gradients alone are 60 GiB
    host = {"sft": 107, "reward": 100, "ppo": 205}[stage]
    assert plan.predict().host / GIB == pytest.approx(host, abs=1)


@pytest.mark.slow
def test_nothing_is_named_where_nothing_helps(tmp_path):
    assert plan_of(shape(tmp_path), 0.5).cheapest() is None  # CUDA alone takes more


# ---- the command ---------------------------------------------------------------------------------------------------


def said(*words: str) -> tuple[int, str]:
    """Exit status, and what is printed or what the error says."""
    result = CliRunner().invoke(app, ["plan", *words])
    return result.exit_code, result.output if result.exception is None else str(result.exception)


def config_file(folder: Path, path: str) -> str:
    file = folder / "ppo.yaml"
    file.write_text(
        f"run: {folder}/run\nmodel: {{path: {path}}}\ndata: {{prompts: x}}\nreward: {{name: model, path: {path}}}\n"
    )
    return str(file)


def test_the_command_shows_stages_phases_and_what_fits(tmp_path):
    file = config_file(tmp_path, shape(tmp_path / "model", layers=1))
    status, text = said("--config", file, "--gpus", "2", "--gpu-memory", "80", "rollout.max_new_tokens=64")
    assert status == 0, text
    for word in ("ZeRO 3, offload", "rollout", "scoring", "update", "checkpoint", "It fits", "KV cache"):
        assert word in text


@pytest.mark.slow
def test_without_a_gpu_the_command_prints_the_range_of_one_process(tmp_path):
    file = config_file(tmp_path, shape(tmp_path / "model", layers=1))
    ends = {}
    for longest in (4, 256):
        status, text = said("--config", file, "--gpus", "0", "--longest", str(longest), "rollout.max_new_tokens=64")
        assert status == 0, text
        found = re.search(r"Peak memory of a process: ([\d.]+) (.B) to ([\d.]+) (.B) \(\w+\)", text)
        assert found and "rollout" in text, text
        ends[longest] = [float(found[i]) * {"MB": 1e6, "GB": 1e9}[found[i + 1]] for i in (1, 3)]
    assert ends[4][0] < ends[256][0] and ends[4][1] < ends[256][1]
    assert ends[4][1] > 150e6  # what libraries load


@pytest.mark.parametrize("words", [("--gpus", "0", "--gpu-memory", "80"), ("--gpus", "2")])
def test_the_memory_of_a_gpu_is_given_with_gpus_and_only_then(tmp_path, words):
    status, text = said("--config", config_file(tmp_path, shape(tmp_path / "model")), *words)
    assert status and "--gpu-memory" in text


def test_the_stage_of_a_runs_config_is_the_runs(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"stage": "reward", "status": "complete"}))
    assert stage_of({"model": {}}, tmp_path / "config.yaml") == "reward"


@pytest.mark.slow
def test_a_model_without_its_config_is_refused_unless_base_is_given(tmp_path):
    file = config_file(tmp_path, str(tmp_path / "runs" / "sft"))
    status, text = said("--config", file, "--gpus", "1", "--gpu-memory", "80")
    assert status and "config.json" in text
    shape(tmp_path / "base", layers=1)
    status, text = said("--config", file, "--gpus", "1", "--gpu-memory", "80", "--base", str(tmp_path / "base"))
    assert status == 0, text


@pytest.mark.parametrize("text", ["80GB", "80000", "0", "-1", "nan", "eighty"])
def test_memory_that_is_no_number_of_gib_is_refused(text):
    with pytest.raises(Exception, match="--gpu-memory"):
        memory_of(text)


def test_a_config_without_a_recognisable_stage_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("run: r\nmodel: {path: x}\ndata: {train: y}\n")
    status, text = said("--config", str(file), "--gpus", "1", "--gpu-memory", "80")
    assert status and "--stage" in text
