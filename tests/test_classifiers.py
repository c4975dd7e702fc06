"""A score head on families without a sequence classifier in transformers: loading, all stages, the export's code."""

from __future__ import annotations

import re
from pathlib import Path

import finished
import pytest
import reward_runs
import tiny
import torch
import transformers
from ppo_runs import config
from safetensors.torch import load_file

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.models.classifiers import classifier_class
from rlhf.models.load import load_hf_config
from rlhf.models.scalar import load_scalar
from stages import ppo, reward

STATES = {
    key: value for key, value in tiny.SMALL.items() if key.endswith("_id") or key in ("vocab_size", "hidden_size")
}
FAMILIES = {
    "granite": {**tiny.SMALL, "logits_scaling": 2.0},
    "cohere": tiny.SMALL,
    "gemma4_text": {**tiny.SMALL, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320},
    "lfm2": {**tiny.SMALL, "layer_types": ["conv", "full_attention"]},
    "olmoe": {**tiny.SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "mamba": {**STATES, "num_hidden_layers": 2, "state_size": 4},
}


def folder(family: str) -> str:
    """A random model of the family, with the tokenizer of `tiny`."""
    return tiny.of_family(family, FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_on_the_language_models_own_body(family, tmp_path):
    path = folder(family)
    scalar = load_scalar(ModelConfig(path=path), path).eval()
    scalar.model.save_pretrained(tmp_path)
    again = load_scalar(ModelConfig(path=str(tmp_path)), str(tmp_path), head="trained").eval()
    lm = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    plain = transformers.AutoModel.from_pretrained(tmp_path).eval()
    head = load_file(tmp_path / "model.safetensors")["score.weight"][0]
    ids = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    lengths, mask = [9, 6], torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    with torch.no_grad():
        found = scalar(ids * mask, mask)
        for body in (getattr(lm, lm.base_model_prefix), plain):
            states = [body(input_ids=row[None, :length]).last_hidden_state[0, -1] for row, length in zip(ids, lengths)]
            torch.testing.assert_close(found, torch.stack(states) @ head, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again(ids * mask, mask), found)


@pytest.mark.parametrize(
    "family, tuning",
    [
        ("granite", "full"),
        pytest.param("lfm2", "lora", marks=pytest.mark.slow),
        pytest.param("mamba", "full", marks=pytest.mark.slow),
    ],
)
def test_reward_stage_ppo_and_the_cards_code_work(family, tuning, rankings, prompts, tmp_path):
    path = folder(family)
    batch = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    made = reward_runs.config(tmp_path, rankings, model={"path": path}, batch=batch, tuning=tuning)
    reward.run(made)
    source = {"name": "model", "path": made.run}
    values = {"model__path": path, "reward": source, "critic__init": "reward", "updates": 1, "tuning": tuning}
    ppo.run(config(tmp_path / "ppo", prompts, **values))
    out = tmp_path / "export"
    export(made.run, out, EXPORTERS.pick("hf"))
    code = finished.python_block((out / "README.md").read_text("utf-8"))
    assert "trust_remote_code" not in code
    said = finished.run_snippet(code)
    messages = [{"role": "user", "content": "Tell me a story."}]
    expected = finished.score_of_answer(made.run, messages, "Once upon a time there was an owl.")
    assert float(said) == pytest.approx(expected, abs=1e-4)
    if tuning == "lora":
        with pytest.raises(UserError, match="no sequence classifier that this adapter"):
            export(made.run, tmp_path / "adapter", EXPORTERS.pick("adapter"))


def test_the_pages_code_is_the_cards():
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text("utf-8")
    card = (Path(__file__).parents[1] / "rlhf" / "export" / "model_card.md.jinja").read_text("utf-8")
    for line in re.findall(r"^(?:head|logit) = .*", page, re.M):
        assert line.split(" = ")[1] in card


def test_a_shared_base_holds_the_critic_of_such_a_family(prompts, tmp_path):
    values = {"model__path": folder("granite"), "model__sharing": "shared", "updates": 1}
    ppo.run(config(tmp_path / "run", prompts, tuning="lora", critic__tuning="lora", **values))
    export(tmp_path / "run", tmp_path / "critic", EXPORTERS.pick("hf"), role="critic")
    assert (tmp_path / "critic" / "score.safetensors").is_file()


def test_families_with_a_classifier_use_transformers_own():
    found = load_hf_config(ModelConfig(path=tiny.llama()), tiny.llama())
    assert classifier_class(found) is transformers.AutoModelForSequenceClassification
