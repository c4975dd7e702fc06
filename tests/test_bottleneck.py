"""Bottleneck adapters: where they go, the published function, and every stage and command that takes them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from dpo_runs import config as dpo_config
from logged import lines
from ppo_runs import config as ppo_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.models.load import load_policy
from rlhf.models.tiny_copy import random_model, tiny_config
from rlhf.tuning.layers import stacks_of, sublayers
from rlhf.tuning.methods import TUNING
from stages import dpo, ppo

SPEC = {"name": "bottleneck", "placement": "houlsby", "size": 4}
IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 30, 20, 11, 12]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bottleneck")
    sft = finished.sft(folder / "sft", SPEC)
    return {
        "sft": sft,
        "reward": finished.reward(folder / "reward", tuning=SPEC),
        "over-sft": finished.reward(folder / "over-sft", sft, SPEC),
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "prompts", 16, held_out=4)


# ---- where they go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, attention, mlp",
    [
        ("llama", ["self_attn.o_proj"], "mlp.down_proj"),
        ("gpt2", ["attn.c_proj"], "mlp.c_proj"),
        ("gpt_neox", ["attention.dense"], "mlp.dense_4h_to_h"),
        ("falcon", ["self_attention.dense"], "mlp.dense_4h_to_h"),
        ("opt", ["self_attn.out_proj"], "fc2"),
        ("mixtral", ["self_attn.o_proj"], "mlp"),
    ],
)
def test_adapters_follow_the_output_projections_of_a_family(family: str, attention: list[str], mlp: str) -> None:
    model = random_model(tiny_config(AutoConfig.for_model(family), 259))
    layer = stacks_of(model)[0][1][0]
    assert sublayers(layer, model.config.hidden_size) == (attention, mlp)


def test_an_encoder_decoder_gets_them_in_both_halves_and_after_cross_attention() -> None:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    stacks = stacks_of(AutoModelForSeq2SeqLM.from_config(config))
    found = [sublayers(stack[0], 16) for _, stack in stacks]
    assert [name for name, _ in stacks] == ["encoder.block", "decoder.block"]
    assert found[0] == (["layer.0.SelfAttention.o"], "layer.1.DenseReluDense.wo")
    assert found[1] == (["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"], "layer.2.DenseReluDense.wo")


def test_the_function_is_houlsbys() -> None:
    """out + up(activation(down(out))), worked out with the saved tensors; nothing changes at the start."""
    base = load_policy(ModelConfig(path=tiny.llama()), tiny.llama()).eval()
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        model = TUNING.pick(SPEC | {"activation": "relu"})(base, None, "causal")
        assert torch.equal(model(input_ids=IDS).logits, plain)
        layer = model.get_base_model().model.layers[1].mlp.down_proj
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        up.weight.normal_()
        up.bias.normal_()
        given = torch.randn(3, layer.base_layer.in_features)
        out = layer.base_layer(given)
        expected = out + torch.relu(out @ down.weight.T + down.bias) @ up.weight.T + up.bias
        torch.testing.assert_close(layer(given), expected)


def test_a_model_of_experts_gets_one_after_the_whole_block() -> None:
    model = random_model(tiny_config(AutoConfig.for_model("mixtral"), 259)).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        wrapped = TUNING.pick(SPEC)(model, None, "causal")
        assert torch.equal(wrapped(input_ids=IDS).logits, plain)


def test_layers_without_an_mlp_are_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match=r"bottleneck \(houlsby\) does not work with MambaForCausalLM"):
        TUNING.pick(SPEC)(AutoModelForCausalLM.from_config(config), None, "causal")


# ---- stages --------------------------------------------------------------------------------------------------------


def test_the_result_is_its_own_parameters_alone(runs: dict[str, str]) -> None:
    for name, more in (("sft", 0), ("reward", 32)):
        folder = Path(runs[name]) / "model"
        weights = load_file(folder / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in weights.values()) == 2 * 2 * (2 * 32 * 4 + 32 + 4) + more
        assert not list(folder.glob("model*.safetensors"))


def test_a_reward_model_goes_on_with_the_adapter_of_the_sft_run(runs: dict[str, str]) -> None:
    started, went_on = (load_file(Path(runs[name]) / "model/adapter_model.safetensors") for name in ("sft", "over-sft"))
    assert set(started) < set(went_on)  # and a head
    shift = [went_on[key] - started[key] for key in started if key.endswith("up.weight")]
    assert 0.05 < torch.stack(shift).std() < 0.2  # what `finished` adds
    config = json.loads((Path(runs["over-sft"]) / "model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny.llama()


@pytest.mark.parametrize("other", ["lora", SPEC | {"size": 8}, SPEC | {"placement": "pfeiffer"}])
def test_another_method_cannot_go_on_with_it(other: Any, runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)does not fit model.path.*size: 4"):
        finished.sft(tmp_path / "run", other, runs["sft"])


CASES = {
    "from the base": {"model": None, "reward": None},
    "from both runs": {"model": "sft", "reward": "reward"},
    "from both runs on one base": {"model": "sft", "reward": "reward", "sharing": "shared"},
    "from a chain on one base": {"model": "sft", "reward": "over-sft", "sharing": "shared"},
}


def settings(folder: Path, prompts: str, case: dict[str, Any], runs: dict[str, str], **changes: Any) -> Any:
    changes = {"tuning": SPEC, "critic__tuning": SPEC, "model__sharing": case.get("sharing", "separate"), **changes}
    if case["model"]:
        changes |= {"model__path": runs[case["model"]]}
    if case["reward"]:
        changes |= {"reward": {"name": "model", "path": runs[case["reward"]]}, "critic__init": "reward"}
    return ppo_config(folder, prompts, **changes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ppo_trains_it_against_the_policy_that_it_started_from(
    case: dict[str, Any], runs: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    stage = ppo.PPO(settings(tmp_path / "run", prompts, case, runs, updates=2), resume=False, overwrite=False)
    module = stage.models.engine.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    first = stage.update(0)
    assert first["objective/kl"] == 0
    assert stage.update(1)["objective/kl"] != 0
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("bottleneck_" in name or "score" in name or "heads" in name for name in moved)
    assert not [name for name in moved if ".reference." in name or ".reward." in name]


def test_the_same_numbers_on_one_base_as_on_separate_ones(runs: dict[str, str], prompts: str, tmp_path: Path) -> None:
    found = []
    for name in ("from both runs", "from both runs on one base"):
        stage = ppo.PPO(settings(tmp_path / name, prompts, CASES[name], runs), resume=False, overwrite=False)
        found.append([stage.update(number) for number in range(2)])
    for separate, shared in zip(*found):
        for key in ("objective/kl", "objective/scores", "loss/policy", "loss/value"):
            assert separate[key] == pytest.approx(shared[key], abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_a_resumed_ppo_run_equals_the_uninterrupted_one_bit_for_bit(
    sharing: str, runs: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    case = {"model": "sft", "reward": "reward", "sharing": sharing}
    ppo.run(settings(tmp_path / "whole", prompts, case, runs))
    broken = ppo.PPO(settings(tmp_path / "cut", prompts, case, runs), resume=False, overwrite=False)
    broken.evaluate()
    broken.reporter.update(1, broken.update(0))
    broken.done = 1
    broken.save()
    ppo.run(settings(tmp_path / "cut", prompts, case, runs), resume=True)
    whole, cut = (load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_dpo_compares_with_the_policy_that_it_started_from(runs: dict[str, str], tmp_path: Path) -> None:
    data = tiny.write_rankings(tmp_path / "rankings", 16, held_out=4)
    loss = {"name": "bradley-terry"}
    values = dpo_config(tmp_path, data, model={"path": runs["sft"]}, tuning=SPEC, loss=loss)
    dpo.run(values)
    assert lines(tmp_path / "run")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rollout__merge_adapters": True}, "'bottleneck' has no adapter that can be merged"),
        ({"rollout__sampler": "vllm"}, "'bottleneck' cannot be merged"),
    ],
)
def test_what_needs_merged_weights_is_refused_early(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        ppo_config(tmp_path, "nowhere", tuning=SPEC, **changes)


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cards_snippets_give_the_runs_numbers_in_plain_transformers(runs: dict[str, str], tmp_path: Path) -> None:
    code = ""
    for name in ("sft", "over-sft"):
        export(runs[name], tmp_path / name, EXPORTERS.pick("adapter"))
        code += finished.python_block((tmp_path / name / "README.md").read_text())
        code += "\nmodel.config.pad_token_id = 0\n"
        code += f"torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits, {str(tmp_path / name)!r} + '.pt')\n"
    code = "import torch\n" + code + "import sys\nassert not {'peft', 'rlhf'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    policy, scores = (torch.load(tmp_path / f"{name}.pt").detach() for name in ("sft", "over-sft"))
    torch.testing.assert_close(policy, finished.policy_logits(runs["sft"], IDS), atol=1e-5, rtol=1e-5)
    expected = finished.reward_logits(runs["over-sft"], IDS.tolist())[:, None]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_a_whole_model_is_refused_with_the_reason(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)cannot be merged.*nonlinearity.*--format adapter"):
        export(runs["sft"], tmp_path / "out", EXPORTERS.pick("hf"))
