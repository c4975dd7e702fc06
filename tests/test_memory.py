"""Predicted memory: bytes worked by hand, ZeRO's layout, the command, and one run compared with its prediction."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlhf.cli.stage_configs import STAGES, TRAINING
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.distributed.deepspeed_json import read_deepspeed
from rlhf.memory import predict as memory
from rlhf.memory.cpu_range import on_cpu
from rlhf.memory.peak import PeakMemory
from rlhf.memory.plan import GIB, MemoryPlan
from rlhf.memory.predict import ZeroLayout, predict
from rlhf.memory.traced_model import TracedModel
from rlhf.memory.tracer import GRADIENTS, LOGITS, MemorySnapshot, MemoryTracer, fake_tensors, use_fake_weights
from rlhf.memory.workload import BatchShape, batch_shape, limit_of, roles
from rlhf.models.load import load_hf_config
from rlhf.models.logprobs import head_logprobs
from stages.cli import app
from stages.memory import lengths_of, memory_of, stage_of

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 64}
SHAPE |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def shape(folder: Path, layers: int = 2, **more: object) -> str:
    """A model folder that holds a config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers} | more), "utf-8")
    return str(folder)


def ppo(path: str, **more: object):
    values = {"run": "runs/x", "model": {"path": path}, "data": {"prompts": "x", "max_prompt_tokens": 32}}
    values |= {"reward": {"name": "model", "path": path}, "rollout": {"max_new_tokens": 32, "prompts_per_update": 16}}
    return check_config(STAGES["ppo"], values | more, "test")


def sft(path: str, **more: object):
    values = {"run": "runs/x", "model": {"path": path, "max_length": 64}, "data": {"train": "x"}}
    return check_config(STAGES["sft"], values | more, "test")


def passes_of(
    config, processes: int = 1, deepspeed: bool = False, bfloat16: bool = False, **more: object
) -> TracedModel:
    work = batch_shape(config, limit_of(config), processes, **more)
    return TracedModel(config, work, bfloat16, deepspeed)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shape(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def sft_passes(small: str) -> TracedModel:
    return passes_of(sft(small))


@pytest.fixture(scope="module")
def ppo_passes(small: str) -> TracedModel:
    return passes_of(ppo(small))


@pytest.fixture(scope="module")
def four_ranks(small: str) -> TracedModel:
    """SFT under DeepSpeed in bfloat16 on four processes."""
    return passes_of(sft(small), 4, deepspeed=True, bfloat16=True)


@pytest.mark.slow
def test_a_teacher_is_whole_on_each_process_and_its_pass_is_in_the_update(small, tmp_path):
    alone = sft(small)
    teacher = shape(tmp_path / "teacher", layers=6)
    taught = sft(small, distillation={"logits": {"teacher": teacher}})
    weights = {}
    for processes in (1, 4):
        layout = ZeroLayout(3)
        before, after = (predict(passes_of(c, processes, True), layout, processes, gpu=True) for c in (alone, taught))
        weights[processes] = after.phases["load"].parts["weights"] - before.phases["load"].parts["weights"]
        assert after.phases["update"].total > before.phases["update"].total + weights[processes]
    count = sum(p.numel() for p in AutoModelForCausalLM.from_config(load_hf_config(taught.model, teacher)).parameters())
    assert weights[1] == weights[4] == 4 * count


def test_a_specialist_is_predicted_and_an_encoder_decoder_refused(small, tmp_path):
    bert = shape(tmp_path / "bert", model_type="bert", architectures=["BertModel"], max_position_embeddings=128)
    values = {"run": "runs/x", "model": {"path": bert}, "task": "tags", "data": {"train": "x.jsonl"}}
    assert stage_of(values, Path("any.yaml")) == "specialist"
    plan = MemoryPlan(TRAINING["specialist"], values, "any.yaml", 2, 8 * GIB)
    layers = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert plan.predict().phases["checkpoint"].parts["optimizer"] > 8 * layers
    t5 = tmp_path / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"memory is not predicted for encoder-decoders \(t5\)"):
        limit_of(sft(str(t5)))


# ---- the tracer ---------------------------------------------------------------------------------------------------


def test_a_meter_counts_what_a_linear_layer_holds_by_hand():
    with torch.device("meta"):
        layer = nn.Linear(8, 16, bias=False)
    with fake_tensors():
        use_fake_weights(layer)
        with MemoryTracer([layer], vocab_size=16) as tracer:
            x = torch.ones(4, 8, requires_grad=True)  # 128 bytes
            y = layer(x)  # 4 x 16 float32: 256 bytes, and its last dimension is the vocabulary
            y.sum().backward()
            tracer.label(GRADIENTS, [layer.weight.grad, x.grad])
    assert tracer.highest(without=GRADIENTS).parts[LOGITS] >= 256
    assert sum(size for number, size in tracer.events if size > 0 and tracer.kinds[number] == GRADIENTS) == 512 + 128


def test_a_meter_forgets_what_is_given_up():
    with fake_tensors(), MemoryTracer() as tracer:
        for _ in range(10):
            torch.ones(256)  # 1 KiB, one after the other
    assert tracer.highest().total <= 2048
    assert sum(size for _, size in tracer.events) == 0


def test_a_mask_as_an_index_selects_as_many_as_were_announced():
    with fake_tensors(), MemoryTracer(selected=5):
        table, mask = torch.zeros(4, 6, 3, requires_grad=True), torch.zeros(4, 6, dtype=torch.bool)
        chosen = table[mask]
        chosen.sum().backward()
    assert chosen.shape == (5, 3) and table.grad.shape == (4, 6, 3)


def test_the_heads_logits_do_not_grow_with_the_number_of_tokens():
    """Vocabulary x tokens never lies in memory: four times the tokens hold no more logits, forward and backward."""

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 150_000, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}

    def logits(tokens: int) -> float:
        with torch.device("meta"):
            lm = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2))
        with fake_tensors():
            use_fake_weights(lm)
            with MemoryTracer([lm], vocab_size=150_000) as tracer:
                hidden = torch.zeros(tokens, 16, requires_grad=True)
                logprobs, entropies = head_logprobs(lm, hidden, torch.zeros(tokens, dtype=torch.int64), 1.0)
                (logprobs.sum() + entropies.sum()).backward()
        return tracer.highest().parts[LOGITS]

    few, many = logits(1110), logits(4440)
    assert many <= 1.05 * few
    assert few < 1110 * 150_000 * 4 / 2


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_experts_are_counted_on_a_cpu_and_nothing_is_logged(tmp_path, capfd, precision):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    wide = sft(shape(tmp_path / "wide", **experts, architectures=["MixtralForCausalLM"]))
    narrow = sft(shape(tmp_path / "narrow", **experts, intermediate_size=64, architectures=["MixtralForCausalLM"]))
    traced = [passes_of(config, bfloat16=precision == "bfloat16") for config in (wide, narrow)]
    peaks = [passes.update["backward"].parts["activations"] for passes in traced]
    tokens = 64 * wide.batch.micro_batch_size * 2  # two experts for each
    assert peaks[0] - peaks[1] >= 2 * 64 * tokens * (4 if precision == "float32" else 2)  # gate and up, 64 wider
    assert capfd.readouterr() == ("", "")


# ---- models and work ---------------------------------------------------------------------------------------------


def test_the_models_of_ppo_are_those_that_the_stage_holds(tmp_path):
    path = shape(tmp_path)
    assert [role.name for role in roles(ppo(path))] == ["policy", "critic", "reference", "reward model"]
    adapted = ppo(path, tuning="lora", advantage={"name": "rloo"}, rollout={"samples_per_prompt": 2})
    assert [role.name for role in roles(adapted)] == ["policy", "reward model"]


@pytest.mark.slow
def test_roles_over_one_base_add_their_adapters_alone(tmp_path):
    path = shape(tmp_path)
    lora = {"name": "lora", "rank": 1}
    adapters = {"tuning": lora, "critic": {"tuning": lora}}
    apart, shared = (
        passes_of(ppo(path, model={"path": path, "sharing": sharing}, **adapters)) for sharing in ("separate", "shared")
    )
    assert [size.total for size in shared.sizes[1:]] == [shared.sizes[1].trained, shared.sizes[0].trained]
    held = [predict(passes, ZeroLayout(), 1, gpu=True).phases["load"].parts["weights"] for passes in (apart, shared)]
    assert held[1] < 0.5 * held[0]


def test_parameters_are_counted_from_the_config_alone(ppo_passes):
    # embeddings and head 2 x 1000 x 64; a layer: q, o 64 x 64, k, v 64 x 32, three of 64 x 128, two norms; a norm
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    total = 2 * 1000 * 64 + 2 * layer + 64
    sizes = ppo_passes.sizes
    assert [size.total for size in sizes] == [total, total - 1000 * 64 + 64, total, total - 1000 * 64 + 64]
    assert [size.trained for size in sizes] == [sizes[0].total, sizes[1].total, 0, 0]


def test_the_work_of_a_micro_batch_follows_from_the_budget(tmp_path):
    config = ppo(shape(tmp_path), batch={"micro_batch_tokens": 200, "minibatches": 2})
    assert batch_shape(config, 512, 1) == BatchShape(
        3, 64, 96, 3, 16, 32, False
    )  # 200 // 64 rows; 16 / 2 episodes in 3 passes
    assert batch_shape(config, 512, 2).micro_batches == 2
    assert batch_shape(config, 512, 1, longest=8).width == 40


@pytest.mark.slow
def test_a_deep_model_is_drawn_on_from_few_layers_as_if_it_were_traced_whole(tmp_path):
    config = ppo(shape(tmp_path, layers=9), gradient_checkpointing=False)
    drawn, whole = passes_of(config), passes_of(config)
    whole._deep = lambda trace, deep: trace(None)
    for name in drawn.update:
        assert drawn.update[name].total == pytest.approx(whole.update[name].total, rel=0.02), name
    assert drawn.scoring.total == pytest.approx(whole.scoring.total, rel=0.02)
    for name in drawn.rollout:
        assert drawn.rollout[name].total == pytest.approx(whole.rollout[name].total, rel=0.02), name


@pytest.mark.slow
def test_recomputed_activations_hold_less(tmp_path):
    path = shape(tmp_path, layers=6)
    kept, again = (passes_of(sft(path, gradient_checkpointing=on)) for on in (False, True))
    assert again.update["backward"].total < 0.6 * kept.update["backward"].total


@pytest.mark.parametrize("method", ["prompt-tuning", pytest.param("prefix-tuning", marks=pytest.mark.slow)])
def test_virtual_tokens_of_a_policy_are_in_the_cache_like_tokens_of_the_prompt(small, method):
    found = []
    for count in (4, 40):
        tuning = {"name": method, "tokens": count}
        passes = passes_of(ppo(small, tuning=tuning, critic={"init": "policy", "tuning": tuning}))
        found.append(passes.rollout["decode"].total)
    assert passes.update["backward"].total > 0 and passes.scoring.total > 0
    assert found[1] > found[0]


@pytest.mark.parametrize("tuning", ["lora", "ia3", {"name": "last-layers", "layers": 1}, "prompt-tuning", "p-tuning"])
def test_tuning_methods_are_predicted(small, sft_passes, tuning):
    found = predict(passes_of(sft(small, tuning=tuning)), ZeroLayout(), 1, gpu=True)
    whole = predict(sft_passes, ZeroLayout(), 1, gpu=True)
    assert 0 < found.phases["update"].parts["optimizer"] < whole.phases["update"].parts["optimizer"]


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen2", "opt"))]
)
def test_families_are_predicted_from_their_own_code(tmp_path, family):
    from transformers import AutoConfig

    names = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    names |= {
        "intermediate_size": 64,
        "ffn_dim": 64,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "word_embed_proj_dim": 32,
    }
    if family == "gpt2":
        names = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}
    AutoConfig.for_model(family, **names).save_pretrained(tmp_path)
    found = predict(passes_of(ppo(str(tmp_path))), ZeroLayout(), 1, gpu=True)
    assert all(snapshot.total > 0 for snapshot in found.phases.values())


# ---- states and their layout -------------------------------------------------------------------------------------


def test_states_in_plain_torch_by_hand(ppo_passes):
    policy, critic = (size.total for size in ppo_passes.sizes[:2])
    found = predict(ppo_passes, ZeroLayout(), 1, gpu=True).phases
    # policy and critic to train, both again frozen (reference, reward model), all in float32
    assert found["load"].parts["weights"] == 2 * 4 * (policy + critic)
    assert found["scoring"].parts["optimizer"] == 8 * (policy + critic)


@pytest.mark.parametrize(("stage", "weights", "optimizer"), [(1, 2, 12 / 4), (2, 2, 12 / 4), (3, 2 / 4, 12 / 4)])
def test_zero_divides_states_over_four_processes(four_ranks, stage, weights, optimizer):
    gathered = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    layout = ZeroLayout.of({"zero_optimization": {"stage": stage, "reduce_bucket_size": 1, **gathered}})
    found, total = predict(four_ranks, layout, 4, gpu=True), four_ranks.sizes[0].total
    assert found.phases["checkpoint"].parts["weights"] == pytest.approx(weights * total)
    assert found.phases["checkpoint"].parts["optimizer"] == pytest.approx(optimizer * total)
    assert found.host == 4 * four_ranks.sizes[0].largest  # one tensor on its way from the file
    assert found.writer == 2 * total  # the result is a single file


def test_offload_moves_states_to_the_host(four_ranks):
    total = four_ranks.sizes[0].total
    settings = read_deepspeed(REPOSITORY / "configs" / "deepspeed" / "zero3-offload.json")
    found = predict(four_ranks, replace(ZeroLayout.of(settings), bucket=0, live=0), 4, gpu=True)
    assert found.phases["checkpoint"].total == 0
    assert found.host == pytest.approx(4 * four_ranks.sizes[0].largest + (12 + 4 + 2) * total / 4)


def test_higher_stages_need_less(four_ranks):
    zero = [ZeroLayout(stage, bucket=0, live=0) for stage in (1, 2, 3)]
    found = [predict(four_ranks, layout, 4, gpu=True).phases for layout in zero]
    assert found[0]["update"].total > found[1]["update"].total > found[2]["update"].total
    assert found[1]["checkpoint"].total > found[2]["checkpoint"].total


def test_a_moment_on_a_line_is_never_below_nothing():
    line = MemorySnapshot({"a": 4.0, "b": 1.0}).extrapolate(MemorySnapshot({"a": 6.0}), 3)
    assert line.parts == {"a": 10.0, "b": 0.0}


# ---- what fits -----------------------------------------------------------------------------------------------------


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
    values = {"run": "runs/x", "model": {"path": shape(tmp_path), "max_length": 64}, "data": {"train": "x"}}
    plan, held = MemoryPlan(TRAINING["sft"], values, "test", 1, 80 * GIB), {}
    for name in ("adamw", "adamw-8bit", "adafactor"):
        held[name] = plan.predict(f"optimizer.algorithm={name}").phases["checkpoint"].parts["optimizer"]
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
        states = found.phases["update"].parts["gradients"]
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
    host = {"sft": 77, "reward": 72, "ppo": 147}[stage]
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


# ---- measured ------------------------------------------------------------------------------------------------------


def test_a_failed_prediction_is_said_and_ends_nothing(capsys, tmp_path):
    PeakMemory().report(sft(str(tmp_path / "nothing")))
    assert "not predicted" in capsys.readouterr().out


def test_the_line_at_the_end_names_both_peaks(capsys):
    PeakMemory().report(sft(tiny.llama()))
    assert re.search(
        r"predicted [\d.]+ [MG]B to [\d.]+ [MG]B \(update\), measured [\d.]+ [MG]B", capsys.readouterr().out
    )


def test_the_high_end_on_a_cpu_keeps_what_recomputing_frees():
    config = sft(tiny.llama())
    with_all, freed = (
        on_cpu(config.model_copy(update={"gradient_checkpointing": freed}), False, 1, 64, 32, 1)
        for freed in (False, True)
    )
    assert freed.high == with_all.high
    assert freed.low < with_all.low


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_range_at_the_end_of_a_small_run_on_a_cpu_holds(tmp_path, stage):
    data = tiny.write_demonstrations(tmp_path / "data", 60, 4)
    values = {"run": str(tmp_path / "run"), "model": {"path": tiny.llama()}}
    if stage == "sft":
        values |= {"data": {"train": data}, "batch": {"batch_size": 16, "micro_batch_size": 16}}
    else:
        values |= {"data": {"prompts": data}, "updates": 2, "critic": {"init": "policy"}}
        values |= {"reward": {"name": "function", "function": "ppo_rewards:letters"}}
        values |= {"rollout": {"prompts_per_update": 16, "max_new_tokens": 24}}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values), "utf-8")
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", "--config", str(tmp_path / "stage.yaml")], capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"predicted ([\d.]+) (.B) to ([\d.]+) (.B) \(\w+\), measured ([\d.]+) (.B)", done.stdout)
    assert found, done.stdout[-500:]
    size = {"MB": 1e6, "GB": 1e9}
    low, high, measured = (float(found[i]) * size[found[i + 1]] for i in (1, 3, 5))
    assert low <= measured <= high


@pytest.mark.slow
def test_a_measured_peak_is_within_15_percent_of_the_predicted(tmp_path, shared, record_property):
    spec = importlib.util.spec_from_file_location("memory_benchmark", REPOSITORY / "benchmarks" / "memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    guess, found, _ = benchmark.both("PPO, full", tmp_path)
    high, peak = max(guess.values()), max(found.values())
    record_property("figures", f"peak memory: predicted {high / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert high == pytest.approx(peak, rel=0.15)


def test_parts_and_phases_are_those_that_are_documented():
    page = (REPOSITORY / "docs" / "memory.md").read_text("utf-8")
    assert all(name in page for name in (*memory.PARTS, *memory.PHASES))
