"""Model folders whose JSON files are damaged or made to do harm give one error in moments."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.inference.policy import open_policy
from rlhf.models.load import load_hf_config
from rlhf.runs.model_folder import FILES, check_model_folder
from rlhf.runs.parents import resolve_model_path

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(tiny.llama(), tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [DEEP, "[1]", "{", "null", ""], ids=["deep", "list", "cut", "null", "empty"])
def test_a_json_file_that_is_no_object_of_moderate_depth_is_refused_by_its_name(model, name, content):
    (model / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: "):
        open_policy(model)


def damaged_weights(whole: bytes) -> dict[str, tuple[bytes, str]]:
    """Contents of model.safetensors that no library loads, and what the error says of each."""
    length = int.from_bytes(whole[:8], "little")
    return {
        "header": (whole[:8] + b"x" * length + whole[8 + length :], "not a safetensors file"),
        "not UTF-8": (whole[:8] + b"\xff" * length + whole[8 + length :], "not a safetensors file"),
        "other JSON": ((2).to_bytes(8, "little") + b"[]", "its header does not describe tensors"),
        "other tensors": ((7).to_bytes(8, "little") + b'{"a":3}', "its header does not describe tensors"),
        "length": (b"\xff" * 8 + whole[8:], "its header is damaged"),
        "empty": (b"", "its header is damaged"),
        "cut": (whole[:-1], "It was cut off or damaged"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        "zip": (b"PK\x03\x04" + bytes(100), "it is a pickle"),
        "pickle": (b"\x80\x04\x95" + b"x" * 100, "it is a pickle"),
    }


@pytest.mark.parametrize("harm", damaged_weights(bytes(8)))
def test_weights_that_no_library_loads_are_refused_by_name(model, harm):
    file = model / "model.safetensors"
    content, said = damaged_weights(file.read_bytes())[harm]
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: ") as error:
        resolve_model_path(model)
    assert said in str(error.value)


PARTS = ["num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "num_experts", "n_routed_experts", "num_blocks"]


@pytest.mark.parametrize("key", PARTS)
def test_a_config_of_a_billion_layers_or_experts_is_refused(model, key):
    change(model / "config.json", **{key: 10**9})
    with pytest.raises(UserError, match=rf"config\.json: {key} is 1,000,000,000; the limit is 10,000"):
        resolve_model_path(model)


def test_the_config_of_a_part_is_checked_too(model):
    change(model / "config.json", text_config={"num_hidden_layers": 10**9})
    with pytest.raises(UserError, match=r"text_config\.num_hidden_layers is"):
        resolve_model_path(model)


def test_large_numbers_that_count_no_parts_are_fine(model):
    more = {"vocab_size_of_layers_note": "x", "max_position_embeddings": 10**7, "player_count": 10**6}
    change(model / "config.json", **more)
    check_model_folder(model)


@pytest.mark.parametrize("values", [{"hidden_size": "many"}, {"model_type": ["llama"]}, {"rope_parameters": 3}])
def test_a_config_with_a_value_of_another_type_is_one_error(model, values):
    change(model / "config.json", **values)
    with pytest.raises(UserError, match=r"model\.path: "):
        open_policy(model)


@pytest.mark.parametrize("content", [DEEP, "[" * 100_000, "{}", "null", "{"], ids=lambda text: text[:3])
def test_a_tokenizer_that_cannot_be_read_is_one_error(model, content):
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path: no tokenizer can be loaded from "):
        load_tokenizer(ModelConfig(path=str(model)), str(model))


def test_an_intact_folder_is_read(model):
    assert resolve_model_path(model) == str(model)
    assert load_hf_config(ModelConfig(path=str(model)), str(model)).model_type == "llama"


def test_a_pickled_model_is_refused_with_the_command_that_converts_it(model):
    whole = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(whole, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"are a pickle \(pytorch_model.bin\), which is never loaded") as caught:
        resolve_model_path(str(model))
    convert(caught.value.remedy)
    assert resolve_model_path(str(model)) == str(model)
    assert torch.equal(load_file(model / "model.safetensors")["model.norm.weight"], whole["model.norm.weight"])


def test_an_adapter_of_another_tool_is_refused_with_the_command_that_merges_it(model, tmp_path):
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is an adapter \(LORA\) for ") as caught:
        resolve_model_path(str(tmp_path / "adapter"))
    convert(caught.value.remedy.split("; then copy")[0])
    assert resolve_model_path(f"{tmp_path}/adapter-merged") == f"{tmp_path}/adapter-merged"
    change(tmp_path / "adapter" / "adapter_config.json", peft_type="PREFIX_TUNING")
    with pytest.raises(UserError, match="no weights that could be merged"):
        resolve_model_path(str(tmp_path / "adapter"))


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(model, tmp_path):
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    for name in (tmp_path / "adapter", Path(os.path.relpath(tmp_path / "adapter"))):
        with pytest.raises(UserError, match=r"adapter's weights are a pickle \(adapter_model.bin\)") as caught:
            open_policy(name)
    convert(caught.value.remedy)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == weights.keys() and all(found[name].equal(weights[name]) for name in weights)


def convert(remedy: str) -> None:
    """Run the `python -c` command of a remedy, in this process: a new one imports for seconds."""
    program, option, code = shlex.split(remedy[remedy.index("python -c") :])
    assert (program, option) == ("python", "-c")
    exec(code, {"__name__": "__main__"})


def test_a_name_that_the_hub_does_not_give_is_refused_with_the_way_to_bring_the_model():
    with pytest.raises(UserError, match="no model can be loaded from nobody/nothing") as caught:
        load_hf_config(ModelConfig(path="nobody/nothing"), "nobody/nothing")
    assert "hf download NAME --local-dir FOLDER" in caught.value.remedy
