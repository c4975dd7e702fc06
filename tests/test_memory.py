"""Predicted memory: bytes worked by hand, ZeRO's layout, and one run compared with its prediction."""

from __future__ import annotations

import copy
import importlib.util
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
from memory_shapes import ppo, sft, shape
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.cli.stage_configs import TRAINING
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
from rlhf.models.forward import head_logprobs
from rlhf.models.load import load_hf_config
from stages.memory import stage_of

REPOSITORY = Path(__file__).resolve().parents[1]


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
        weights[processes] = after.phases["load"]["weights"] - before.phases["load"]["weights"]
        assert after.phases["update"].total > before.phases["update"].total + weights[processes]
    count = sum(p.numel() for p in AutoModelForCausalLM.from_config(load_hf_config(taught.model, teacher)).parameters())
    assert weights[1] == weights[4] == 4 * count


def test_a_specialist_is_predicted_and_an_encoder_decoder_refused(small, tmp_path):
    bert = shape(tmp_path / "bert", model_type="bert", architectures=["BertModel"], max_position_embeddings=128)
    values = {"run": "runs/x", "model": {"path": bert}, "task": "tags", "data": {"train": "x.jsonl"}}
    assert stage_of(values, Path("any.yaml")) == "specialist"
    plan = MemoryPlan(TRAINING["specialist"], values, "any.yaml", 2, 8 * GIB)
    layers = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert plan.predict().phases["checkpoint"]["optimizer"] > 8 * layers
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
    assert tracer.highest(without=GRADIENTS)[LOGITS] >= 256
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
                logprobs, entropies, _ = head_logprobs(lm, hidden, torch.zeros(tokens, dtype=torch.int64), 1.0)
                (logprobs.sum() + entropies.sum()).backward()
        return tracer.highest()[LOGITS]

    few, many = logits(1110), logits(4440)
    assert many <= 1.05 * few
    assert few < 1110 * 150_000 * 4 / 2


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_experts_are_counted_on_a_cpu_and_nothing_is_logged(tmp_path, capfd, precision):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    wide = sft(shape(tmp_path / "wide", **experts, architectures=["MixtralForCausalLM"]))
    narrow = sft(shape(tmp_path / "narrow", **experts, intermediate_size=64, architectures=["MixtralForCausalLM"]))
    traced = [passes_of(config, bfloat16=precision == "bfloat16") for config in (wide, narrow)]
    peaks = [passes.update["backward"]["activations"] for passes in traced]
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
    held = [predict(passes, ZeroLayout(), 1, gpu=True).phases["load"]["weights"] for passes in (apart, shared)]
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
def test_virtual_tokens_of_a_policy_are_in_the_cache_like_tokens_of_the_prompt(tmp_path, method):
    path, found = shape(tmp_path, layers=1), []
    for count in (4, 40):
        tuning = {"name": method, "tokens": count}
        passes = passes_of(ppo(path, tuning=tuning, critic={"init": "policy", "tuning": tuning}))
        found.append(passes.rollout["decode"].total)
    assert passes.update["backward"].total > 0 and passes.scoring.total > 0
    assert found[1] > found[0]


RARE = ("ia3", {"name": "last-layers", "layers": 1}, "p-tuning")


@pytest.mark.parametrize(
    "tuning", ["lora", "prompt-tuning", *(pytest.param(method, marks=pytest.mark.slow) for method in RARE)]
)
def test_tuning_methods_are_predicted(small, sft_passes, tuning):
    found = predict(passes_of(sft(small, tuning=tuning)), ZeroLayout(), 1, gpu=True)
    whole = predict(sft_passes, ZeroLayout(), 1, gpu=True)
    assert 0 < found.phases["update"]["optimizer"] < whole.phases["update"]["optimizer"]


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
        names = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 4}
    AutoConfig.for_model(family, **names).save_pretrained(tmp_path)
    found = predict(passes_of(ppo(str(tmp_path))), ZeroLayout(), 1, gpu=True)
    assert all(snapshot.total > 0 for snapshot in found.phases.values())


# ---- states and their layout -------------------------------------------------------------------------------------


def test_states_in_plain_torch_by_hand(ppo_passes):
    policy, critic = (size.total for size in ppo_passes.sizes[:2])
    found = predict(ppo_passes, ZeroLayout(), 1, gpu=True).phases
    # policy and critic to train, both again frozen (reference, reward model), all in float32
    assert found["load"]["weights"] == 2 * 4 * (policy + critic)
    assert found["scoring"]["optimizer"] == 8 * (policy + critic)


@pytest.mark.parametrize(("stage", "weights", "optimizer"), [(1, 2, 12 / 4), (2, 2, 12 / 4), (3, 2 / 4, 12 / 4)])
def test_zero_divides_states_over_four_processes(four_ranks, stage, weights, optimizer):
    gathered = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    layout = ZeroLayout.of({"zero_optimization": {"stage": stage, "reduce_bucket_size": 1, **gathered}})
    found, total = predict(four_ranks, layout, 4, gpu=True), four_ranks.sizes[0].total
    assert found.phases["checkpoint"]["weights"] == pytest.approx(weights * total)
    assert found.phases["checkpoint"]["optimizer"] == pytest.approx(optimizer * total)
    assert found.host == 4 * four_ranks.sizes[0].largest  # one tensor on its way from the file
    assert found.writer == 2 * total  # the result is a single file


def test_offload_moves_states_to_the_host(four_ranks):
    total = four_ranks.sizes[0].total
    settings = read_deepspeed(REPOSITORY / "configs" / "deepspeed" / "zero3-offload.json")
    found = predict(four_ranks, replace(ZeroLayout.of(settings), bucket=0, live=0), 4, gpu=True)
    assert found.phases["checkpoint"].total == 0
    assert found.host == pytest.approx(4 * four_ranks.sizes[0].largest + (12 + 4 + 2 + 2) * total / 4)


@pytest.mark.parametrize(("micro_batches", "summed"), [(1, 0), (2, 2)])
def test_stage_2_offload_keeps_new_weights_and_summed_gradients_on_the_host(four_ranks, micro_batches, summed):
    total = four_ranks.sizes[0].total
    settings = read_deepspeed(REPOSITORY / "configs" / "deepspeed" / "zero2-offload.json")
    traced = copy.copy(four_ranks)
    traced.batch = replace(four_ranks.batch, micro_batches=micro_batches)
    found = predict(traced, replace(ZeroLayout.of(settings), bucket=0), 4, gpu=True)
    assert found.host == pytest.approx(4 * four_ranks.sizes[0].largest + (12 + 4 + 2 + summed) * total / 4)


def test_on_a_cpu_offload_needs_more_memory_since_the_host_is_the_device(four_ranks):
    total = four_ranks.sizes[0].total
    names = ("zero2.json", "zero2-offload.json")
    plain, offload = (
        predict(four_ranks, ZeroLayout.of(read_deepspeed(REPOSITORY / "configs" / "deepspeed" / name)), 4, gpu=False)
        for name in names
    )
    assert offload.phases["checkpoint"].total - plain.phases["checkpoint"].total == pytest.approx((4 + 2) * total / 4)


def test_higher_stages_need_less(four_ranks):
    zero = [ZeroLayout(stage, bucket=0, live=0) for stage in (1, 2, 3)]
    found = [predict(four_ranks, layout, 4, gpu=True).phases for layout in zero]
    assert found[0]["update"].total > found[1]["update"].total > found[2]["update"].total
    assert found[1]["checkpoint"].total > found[2]["checkpoint"].total


def test_a_moment_on_a_line_is_never_below_nothing():
    line = MemorySnapshot({"a": 4.0, "b": 1.0}).extrapolate(MemorySnapshot({"a": 6.0}), 3)
    assert line == {"a": 10.0, "b": 0.0}


# ---- measured ------------------------------------------------------------------------------------------------------


def test_a_failed_prediction_is_said_and_ends_nothing(capsys, tmp_path):
    PeakMemory().report(sft(str(tmp_path / "nothing")))
    assert "not predicted" in capsys.readouterr().out


def test_the_line_at_the_end_names_both_peaks(capsys):
    PeakMemory().report(sft(tiny.llama()))
    assert re.search(
        r"predicted [\d.]+ [MG]B to [\d.]+ [MG]B \(update\), measured [\d.]+ [MG]B", capsys.readouterr().out
    )


@pytest.mark.slow
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
