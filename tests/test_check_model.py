"""`rlhf check-model`: what it finds on families that work, and that it finds what does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import finished
import pytest
import tiny
import torch
from documentation import DOCS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.inference.model_checks import Different, policy_logits, prompt_tokens
from rlhf.models.load import check_head
from rlhf.models.tiny_copy import random_model, tiny_config
from stages.check_model import make_tiny_copy
from stages.cli import app
from stages.model_table import FAMILIES, check_family, row

IN_CI = ("gpt2", "gemma3_text", "mistral", "granite", "mixtral", "gpt_oss", "mamba")
"""Families that are different enough for every change to try them, as it does Llama."""
STAGES = ["sft", "reward", "dpo", "ppo", "exported policy", "exported reward"]
STEPS = ["prompt tokens", *STAGES, "packing", "shared prompts"]
WITH_LORA = [f"{step}, lora" for step in STAGES]


def test_an_export_with_other_weights_is_found(tmp_path: Path) -> None:
    run, changed = finished.sft(tmp_path / "run"), tmp_path / "export"
    export(run, changed, EXPORTERS.pick("hf"))
    assert policy_logits(run, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(Different, match="log-probs differ by up to"):
        policy_logits(run, changed)


def test_prompts_with_other_tokens_than_the_templates_are_found() -> None:
    class Other(ChatTokenizer):
        def prompt(self, messages):
            return [*super().prompt(messages), 7]

    chat = load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())
    assert prompt_tokens(chat) == "as the template's: one turn, three, five, a system turn"
    with pytest.raises(Different, match="one turn: from token"):
        prompt_tokens(Other(chat.tokenizer))


def test_the_exit_status_and_the_json_say_what_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(tiny.llama()).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = "{{ raise_exception('only for tools') }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    done = CliRunner().invoke(app, ["check-model", str(model), "--json"])
    found = json.loads(done.output.splitlines()[-1])
    assert done.exit_code == 1 and found["works"] is False
    assert [(step["step"], step["result"]) for step in found["steps"]] == [("prompt tokens", "refused")]
    assert "only for tools" in found["steps"][0]["detail"]


def test_a_tiny_copy_has_the_models_tokenizer_and_architecture_and_random_weights(tmp_path: Path) -> None:
    assert "LlamaForCausalLM, a random copy of" in make_tiny_copy(tiny.llama(), tmp_path / "copy")
    config, own = (AutoConfig.from_pretrained(path) for path in (tmp_path / "copy", tiny.llama()))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, own.vocab_size)
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    chat, ours = (load_tokenizer(ModelConfig(path=str(p)), str(p)) for p in (tmp_path / "copy", tiny.llama()))
    assert chat.fingerprints() == ours.fingerprints()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_copy_of_every_family_has_logits_that_are_its_head_on_its_hidden_states(family: str) -> None:
    config = tiny_config(AutoConfig.for_model(family), 259)
    for part in (config, config.get_text_config()):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 2
    model = random_model(config)
    assert model.num_parameters() < 3_000_000
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 43)[None]).logits
    assert logits.shape == (1, 40, 259) and logits.isfinite().all()
    check_head(model)


def line_on_page(family: str) -> str:
    """The family's line in docs/models.md."""
    page = (DOCS / "models.md").read_text("utf-8")
    return re.search(rf"^\| `{family}` .*", page, re.MULTILINE)[0]


@pytest.mark.slow
def test_every_step_works_with_llama(tmp_path: Path) -> None:
    name, steps = check_family("llama", tmp_path)
    assert [(step.step, step.result) for step in steps] == [(name, "works") for name in [*STEPS, *WITH_LORA]]
    assert (tmp_path / "log.txt").read_text("utf-8").count("Done: ") == 8
    assert line_on_page("llama") == row("llama", name, steps)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if f in IN_CI else pytest.mark.families) for f in FAMILIES if f != "llama"],
)
def test_the_page_shows_what_works_with_every_family(family: str, tmp_path: Path) -> None:
    assert line_on_page(family) == row(family, *check_family(family, tmp_path))
