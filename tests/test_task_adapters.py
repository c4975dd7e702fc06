"""Rows of different tasks in one batch equal each task by itself, through PEFT's own classes."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.core.errors import UserError
from rlhf.inference.policy import open_policy
from rlhf.inference.task_adapters import TaskAdapters
from rlhf.models.adapters import with_adapter
from rlhf.rollout.samplers import hf
from rlhf.rollout.slots import left_padded
from rlhf.rollout.types import SamplingParams
from rlhf.tuning.layers import bottleneck_config

GREEDY = SamplingParams(max_new_tokens=10, temperature=0.0, batch_size=4)


def configs(model):
    """Task -> PEFT config; several of one kind, with other ranks and lengths."""
    common = {"task_type": "CAUSAL_LM"}
    return {
        "lora-4": peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **common),
        "lora-2": peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True, **common),
        "ia3": peft.IA3Config(**common),
        "houlsby": bottleneck_config(model, placement="houlsby", reduction=8, activation="relu"),
        "pfeiffer": bottleneck_config(model, placement="pfeiffer", reduction=4, activation="relu"),
        "prompt-3": peft.PromptTuningConfig(num_virtual_tokens=3, **common),
        "prompt-6": peft.PromptTuningConfig(num_virtual_tokens=6, **common),
        "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **common),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, **common),
        "prefix-projected": peft.PrefixTuningConfig(
            num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8, **common
        ),
    }


def write_adapters(base, folder):
    """An adapter folder of each kind with random weights. Returns task -> path."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    paths = {}
    for number, (task, config) in enumerate(configs(model).items()):
        torch.manual_seed(number)
        wrapped = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        wrapped.save_pretrained(folder / task)
        file = folder / task / "adapter_model.safetensors"
        weights = {key: value + 0.3 * torch.randn_like(value) for key, value in load_file(file).items()}
        save_file(weights, file)
        paths[task] = str(folder / task)
    return paths


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    base = tiny.llama()
    paths = write_adapters(base, tmp_path_factory.mktemp("adapters"))
    return base, {**paths, "plain": "none"}


def alone(base, path):
    """The base with one adapter, by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return (model if path == "none" else with_adapter(model, path, "CAUSAL_LM")).eval()


def prompts(count):
    """Token prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 60, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]


@torch.inference_mode()
def logits(mixed, ids, mask, tasks):
    """One forward pass of rows [B, T] that belong to different tasks: [B, T, V]."""
    mixed.rows.select(tasks)
    cache = transformers.DynamicCache()
    before = torch.tensor([mixed.virtual_tokens(task) for task in tasks])
    width = mixed.fill(cache, tasks)
    return mixed.model(
        input_ids=ids, attention_mask=torch.cat([left_padded(before, width), mask], 1),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0) + before[:, None], past_key_values=cache, use_cache=True,
    ).logits  # fmt: skip


def test_one_pass_over_all_tasks_gives_each_tasks_logits(adapters):
    base, paths = adapters
    mixed = TaskAdapters(open_policy(base), paths)
    rows = prompts(len(paths))
    order = [3, 0, 8, 10, 5, 1, 7, 9, 2, 6, 4]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = logits(mixed, ids, mask, order)
    names = list(paths)
    for row, task in enumerate(order):
        one = torch.tensor([rows[row]])
        with torch.no_grad():
            expected = alone(base, paths[names[task]])(input_ids=one, attention_mask=torch.ones_like(one)).logits
        length = len(rows[row])
        torch.testing.assert_close(found[row, width - length :], expected[0, -length:], atol=1e-5, rtol=1e-5)


def test_the_adapters_change_the_logits(adapters):
    base, paths = adapters
    mixed = TaskAdapters(open_policy(base), paths)
    ids = torch.tensor([prompts(1)[0]] * len(paths))
    last = logits(mixed, ids, torch.ones_like(ids), range(len(paths)))[:, -1]
    gaps = torch.cdist(last, last) + torch.eye(len(last))
    assert gaps.min() > 1e-3


def test_mixed_greedy_tokens_equal_those_of_each_task_by_generate(adapters):
    base, paths = adapters
    policy = open_policy(base)
    rows = [row for row in prompts(11) for _ in range(2)]
    tasks = [(5 * i + i // 11) % len(paths) for i in range(len(rows))]
    found = TaskAdapters(policy, paths).sample(rows, tasks, range(len(rows)), GREEDY)
    names, ends = list(paths), policy.model.generation_config.eos_token_id
    for row, task, completion in zip(rows, tasks, found):
        ids = torch.tensor([row])
        model = alone(base, paths[names[task]])
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, use_cache=True
        )
        assert completion.ids == out[0, len(row) :].tolist(), names[task]


def test_sampled_tokens_do_not_depend_on_the_other_rows(adapters):
    base, paths = adapters
    params = SamplingParams(max_new_tokens=8, temperature=1.0, batch_size=3)
    rows, mixed = prompts(11), TaskAdapters(open_policy(base), paths)
    together = mixed.sample(rows, range(11), range(11), params)
    by_one = [mixed.sample([rows[i]], [i], [i], params)[0] for i in range(11)]
    assert together == by_one


def test_the_plain_base_is_as_without_adapters(adapters):
    base, paths = adapters
    rows, plain = prompts(4), list(paths).index("plain")
    policy = open_policy(base)
    expected = hf(policy.model, rows, range(4), GREEDY, policy.chat)
    assert TaskAdapters(policy, paths).sample(rows, [plain] * 4, range(4), GREEDY) == expected


@pytest.mark.parametrize("family", ["gemma3_text", pytest.param("mistral", marks=pytest.mark.slow)])
def test_virtual_tokens_before_a_sliding_window(family, tmp_path):
    settings = {
        "mistral": {"sliding_window": 6},
        "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    }[family]
    base = tiny.of_family(family, tiny.SMALL | settings)
    paths = write_adapters(base, tmp_path)
    kept = {task: paths[task] for task in ("prompt-3", "prompt-6", "prefix")}
    policy = open_policy(base)
    rows = prompts(6)
    found = TaskAdapters(policy, kept).sample(rows, [0, 1, 2, 2, 1, 0], range(6), GREEDY)
    ends = policy.model.generation_config.eos_token_id
    for row, task, completion in zip(rows, [0, 1, 2, 2, 1, 0], found):
        ids = torch.tensor([row])
        model = alone(base, list(kept.values())[task])
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, use_cache=True
        )
        assert completion.ids == out[0, len(row) :].tolist(), list(kept)[task]


def test_an_adapter_of_another_base_is_refused(adapters, tmp_path):
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama())
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data.normal_()
    other.save_pretrained(tmp_path / "other")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="was trained on"):
        TaskAdapters(open_policy(adapters[0]), {"task": tmp_path / "adapter"})


def test_a_folder_without_an_adapter_is_refused(adapters):
    base, _ = adapters
    with pytest.raises(UserError, match="there is no adapter"):
        TaskAdapters(open_policy(base), {"task": base})


@pytest.mark.parametrize("option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=list)
def test_an_adapter_that_cannot_be_chosen_row_by_row_is_refused(adapters, tmp_path, option):
    base, _ = adapters
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **option)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"uses {next(iter(option))}"):
        TaskAdapters(open_policy(base), {"task": tmp_path})
