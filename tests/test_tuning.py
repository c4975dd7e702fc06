"""The tuning table: every row trains what it says, saves what it trained, and merges without touching live weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, MambaConfig

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.memory.traced_model import TracedModel
from rlhf.memory.workload import BatchShape
from rlhf.models.load import count_parameters, load_policy
from rlhf.models.scalar import load_scalar
from rlhf.models.tiny_copy import random_model, tiny_config
from rlhf.sft.config import SFTConfig
from rlhf.tuning.methods import TUNING, say_trainable, virtual_tokens
from rlhf.tuning.quantization import quantize
from rlhf.tuning.save import save_result

NEEDED: dict[str, dict[str, Any]] = {"last-layers": {"layers": 1}, "modules": {"names": [r"q_proj", r"layers\.1\.mlp"]}}
"""Options without a default; a new row with such options is added here."""

VARIANTS: list[dict[str, Any]] = [
    {"name": "last-layers", "layers": 2, "embeddings": True, "head": False},
    {"name": "lora", "rank": 4, "rslora": True, "target_modules": ["q_proj", "up_proj"]},
    {"name": "lora", "rank": 4, "dora": True},
    {"name": "lora", "target_modules": r".*\.layers\.1\..*_proj"},
    {"name": "bottleneck", "placement": "houlsby", "size": 4, "activation": "relu"},
    {"name": "bottleneck", "reduction": 8, "layers": 1, "activation": "tanh"},
    {"name": "prompt-tuning", "tokens": 5, "init": "vocabulary"},
    {"name": "prompt-tuning", "tokens": 5, "init": "text", "text": "Answer in short sentences."},
    {"name": "prompt-tuning", "tokens": 5, "init": "labels", "labels": ["good", "very bad"]},
    {"name": "p-tuning", "tokens": 4, "encoder": "lstm", "hidden": 8},
    {"name": "prefix-tuning", "tokens": 4, "projection": True, "hidden": 8},
]
ROWS = [TUNING.pick({"name": row.name, **NEEDED.get(row.name, {})}) for row in TUNING]
HERE = [pick for pick in [*ROWS, *map(TUNING.pick, VARIANTS)] if not pick.row.traits["quantized"]]
"""The rows that run without a GPU."""


def name_of(pick: Pick) -> str:
    return "-".join([pick.name, *(str(v)[:12] for v in pick.options.values() if v not in (None, False))])


every_row = pytest.mark.parametrize("pick", HERE, ids=name_of)


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())


def tuned(pick: Pick, chat: ChatTokenizer) -> Any:
    torch.manual_seed(0)
    return pick(load_policy(ModelConfig(path=tiny.llama()), tiny.llama()), chat, "causal")


def tuned_scalar(pick: Pick, chat: ChatTokenizer, path: str) -> Any:
    torch.manual_seed(0)
    scalar = load_scalar(ModelConfig(path=path), path)
    scalar.model = pick(scalar.model, chat, "scalar")
    return scalar


IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 30, 20, 11, 12]])
MASK = torch.ones_like(IDS)


def train(model: torch.nn.Module, forward: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(steps):
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()


def lm_loss(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits at the real tokens, not at virtual ones."""
    return model.eval()(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[:, -IDS.shape[1] :]


# ---- every row -----------------------------------------------------------------------------------------------------


@every_row
def test_training_moves_exactly_the_trainable_weights(pick: Pick, chat: ChatTokenizer) -> None:
    model = tuned(pick, chat)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, lambda: lm_loss(model))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved


@every_row
def test_the_saved_result_gives_the_same_logits(pick: Pick, chat: ChatTokenizer, tmp_path: Path) -> None:
    model = tuned(pick, chat)
    start = logits(model)
    train(model.train(), lambda: lm_loss(model))
    expected = logits(model)
    assert not torch.allclose(expected, start, atol=1e-3)
    save_result(tmp_path, model, chat, pick)
    traits = pick.row.traits
    kind = AutoModelForCausalLM if traits["merges"] else peft.AutoPeftModelForCausalLM
    assert torch.allclose(logits(kind.from_pretrained(tmp_path / "model")), expected, atol=1e-5)
    assert (tmp_path / "adapter").exists() == (traits["adapter"] and traits["merges"])
    if (tmp_path / "adapter").exists():
        base = AutoModelForCausalLM.from_pretrained(tiny.llama())
        assert torch.allclose(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected, atol=1e-5)


@every_row
def test_merging_leaves_the_live_model_as_it_was(pick: Pick, chat: ChatTokenizer) -> None:
    if not pick.row.traits["merges"]:
        pytest.skip("cannot be merged")
    model = tuned(pick, chat)
    train(model, lambda: lm_loss(model))
    expected = logits(model)
    pointers = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    first, second = tiny.merged_state(model), tiny.merged_state(model)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == pointers[name][0]
        assert torch.equal(parameter, pointers[name][1])
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(model.train(), lambda: lm_loss(model), steps=1)
    assert not torch.equal(logits(model), expected)


def check_scalar(pick: Pick, chat: ChatTokenizer, path: str, folder: Path) -> None:
    scalar = tuned_scalar(pick, chat, path)
    before = {name: p.detach().clone() for name, p in scalar.named_parameters()}
    train(scalar, lambda: scalar(IDS, MASK).square().sum())
    moved = {name for name, p in scalar.named_parameters() if not torch.equal(p, before[name])}
    assert any("score" in name or "classifier" in name for name in moved)
    assert moved <= {name for name, p in scalar.named_parameters() if p.requires_grad}
    save_result(folder, scalar.model, chat, pick)
    again = load_scalar(ModelConfig(path=path), str(folder / "model")).eval()
    assert torch.allclose(again(IDS, MASK), scalar.eval()(IDS, MASK), atol=1e-5)


@every_row
def test_the_score_head_of_a_scalar_model_is_always_trained(pick: Pick, chat: ChatTokenizer, tmp_path: Path) -> None:
    check_scalar(pick, chat, tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        "full", {"name": "last-layers", "layers": 1}, "lora", "ia3", {"name": "modules", "names": ["attention"]},
        "prompt-tuning", "p-tuning", "prefix-tuning",
    ],
)  # fmt: skip
def test_encoders_are_tuned_the_same_way(spec: Any, chat: ChatTokenizer, tmp_path: Path) -> None:
    check_scalar(TUNING.pick(spec), chat, tiny.bert(), tmp_path)


@every_row
def test_unknown_options_are_refused_by_name(pick: Pick) -> None:
    with pytest.raises(ValueError, match=f"{pick.name}.*no option 'bogus'"):
        TUNING.pick({"name": pick.name, **pick.options, "bogus": 1})


@every_row
def test_the_counts_of_every_method_are_said_in_one_line(pick: Pick, chat: ChatTokenizer, capsys: Any) -> None:
    model = tuned(pick, chat)
    say_trainable(pick, model)
    line = capsys.readouterr().out
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert line.count("\n") == 1 and pick.name in line
    assert f"{trained:,} of {total:,} parameters" in line


# ---- the papers' arithmetic ----------------------------------------------------------------------------------------

D, F, K, L, V = 32, 64, 16, 2, 4  # of tiny.llama: width, MLP, keys (2 of 4 heads), layers; and virtual tokens

LINEAR = [(D, D), (D, K), (D, K), (D, D), (D, F), (D, F), (F, D)]
"""Inputs and outputs of the linear layers of one layer: q, k, v, o, gate, up, down."""


@pytest.mark.parametrize(
    "spec, expected",
    [
        ({"name": "lora", "rank": 3}, L * sum(3 * (d + o) for d, o in LINEAR)),
        ({"name": "lora", "rank": 3, "layers": 1}, sum(3 * (d + o) for d, o in LINEAR)),
        ({"name": "lora", "rank": 3, "dora": True}, L * sum(3 * (d + o) + o for d, o in LINEAR)),
        ({"name": "ia3"}, L * (2 * K + F)),
        ({"name": "bottleneck", "placement": "houlsby", "size": 5}, L * 2 * (2 * D * 5 + D + 5)),
        ({"name": "bottleneck", "placement": "pfeiffer", "size": 5}, L * (2 * D * 5 + D + 5)),
        ({"name": "bottleneck", "reduction": 8, "layers": 1}, 2 * D * 4 + D + 4),
        ({"name": "prompt-tuning", "tokens": V}, V * D),
        ({"name": "p-tuning", "tokens": V, "hidden": 6}, V * D + (D * 6 + 6) + (6 * 6 + 6) + (6 * D + D)),
        ({"name": "prefix-tuning", "tokens": V}, 2 * L * V * K),
        (
            {"name": "prefix-tuning", "tokens": V, "projection": True, "hidden": 6},
            V * K + (K * 6 + 6) + (6 * 2 * L * K + 2 * L * K),
        ),
        ({"name": "last-layers", "layers": 1, "head": False}, sum(d * o for d, o in LINEAR) + 2 * D),
    ],
    ids=str,
)
def test_a_method_trains_as_many_parameters_as_its_paper_says(
    spec: dict[str, Any], expected: int, chat: ChatTokenizer
) -> None:
    assert count_parameters(tuned(TUNING.pick(spec), chat))[0] == expected


def test_five_virtual_tokens_of_a_model_of_width_4096_are_20480_parameters() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=4096, intermediate_size=8, num_hidden_layers=1, num_attention_heads=32
    )
    with torch.device("meta"):
        model = TUNING.pick({"name": "prompt-tuning", "tokens": 5})(
            AutoModelForCausalLM.from_config(config), None, "causal"
        )
    assert count_parameters(model)[0] == 20_480


@every_row
def test_the_memory_prediction_counts_what_is_trained(pick: Pick, chat: ChatTokenizer) -> None:
    config = SFTConfig(run="r", model={"path": tiny.llama()}, data={"train": "d"}, tuning=pick)
    (counts,) = TracedModel(config, BatchShape(1, 8, 8, 1), False, False).sizes
    assert counts.trained == count_parameters(tuned(pick, chat))[0]


# ---- single rows ---------------------------------------------------------------------------------------------------


def test_last_layers_trains_those_layers_norm_and_head(chat: ChatTokenizer) -> None:
    model = tuned(TUNING.pick({"name": "last-layers", "layers": 1}), chat)
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "layers.1." not in n} == {"model.norm", "model.embed_tokens"}  # the head is tied
    assert not any("layers.0." in name for name in trained)


def test_modules_trains_what_matches(chat: ChatTokenizer) -> None:
    model = tuned(TUNING.pick({"name": "modules", "names": [r"layers\.0\..*(q|k)_proj"]}), chat)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk"}


def test_prompt_tuning_starts_from_the_embeddings_that_it_names(chat: ChatTokenizer) -> None:
    words = load_policy(ModelConfig(path=tiny.llama()), tiny.llama()).get_input_embeddings().weight

    def start(**options: Any) -> torch.Tensor:
        model = tuned(TUNING.pick({"name": "prompt-tuning", "tokens": 7, **options}), chat)
        return model.prompt_encoder["default"].embedding.weight

    encode = lambda text: chat.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    ids = encode("the cat")
    assert torch.equal(start(init="text", text="the cat"), words[torch.tensor(ids * 7)[:7]])
    labelled = start(init="labels", labels=["good", "bad cat"])
    assert torch.allclose(labelled[0], words[torch.tensor(encode("good"))].mean(0))
    assert torch.allclose(labelled[1], words[torch.tensor(encode("bad cat"))].mean(0))
    for rows in (labelled[2:], start(init="vocabulary")):
        assert all((words == row).all(1).any() for row in rows)
        assert not any((words[:3] == row).all(1).any() for row in rows)  # no special tokens
    drawn = start(init="random")
    assert not any((words == row).all(1).any() for row in drawn)
    assert 0.3 < float(drawn.std() / words.std()) < 3


def test_virtual_tokens_are_counted_as_positions() -> None:
    assert virtual_tokens(TUNING.pick({"name": "prefix-tuning", "tokens": 9})) == 9
    assert virtual_tokens(TUNING.pick("lora")) == 0


def test_the_result_stops_where_an_answer_ends(chat: ChatTokenizer, tmp_path: Path) -> None:
    model = tuned(TUNING.pick("full"), chat)
    model.generation_config.eos_token_id = [7, 2]
    save_result(tmp_path, model, chat, TUNING.pick("full"))
    config = GenerationConfig.from_pretrained(tmp_path / "model")
    assert config.eos_token_id == [chat.end_id, 7] and config.pad_token_id == chat.pad_id
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.eos_token_id == [chat.end_id, 7] and loaded.config.use_cache
    again = load_tokenizer(ModelConfig(path=str(tmp_path / "model")), str(tmp_path / "model"))
    assert again.fingerprints() == chat.fingerprints()


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"name": "last-layers", "layers": 3}, "3 is more than the 2 layers"),
        ({"name": "modules", "names": ["nowhere"]}, "'nowhere' matches no parameter"),
        ({"name": "modules", "names": ["("]}, "not a regular expression"),
        ({"name": "lora", "target_modules": ["nowhere"]}, "lora does not work with LlamaForCausalLM"),
        ({"name": "lora", "target_modules": ["lm_head"]}, "the head cannot have an adapter"),
        ({"name": "lora", "target_modules": ["embed_tokens"]}, "the embeddings of this model are tied to its head"),
        ({"name": "prompt-tuning", "init": "text"}, "tuning.text: set it if and only if init is `text`"),
        ({"name": "prompt-tuning", "labels": ["a"]}, "tuning.labels: set it if and only if init is `labels`"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(spec: dict[str, Any], words: str, chat: ChatTokenizer) -> None:
    with pytest.raises(UserError) as error:
        tuned(TUNING.pick(spec), chat)
    assert words in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_qlora_without_a_gpu_says_so(chat: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="qlora needs a CUDA device"):
        tuned(TUNING.pick("qlora"), chat)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_adapter_over_4_bits_merges_to_the_function_that_was_trained(
    device: str, chat: ChatTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pick = TUNING.pick({"name": "qlora", "rank": 4})
    model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama())
    quantize(model, torch.device(device), torch.float32)
    model = TUNING.pick({"name": "lora", "rank": 4})(model, chat, "causal")
    ids = IDS.to(device)
    train(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    save_result(tmp_path, model, chat, pick)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(device).eval()
    with torch.no_grad():  # in training mode: bitsandbytes repacks the weights for inference on some CPUs
        expected, found = (m(input_ids=ids, use_cache=False).logits for m in (model.train(), again))
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_table_is_known_without_importing_torch() -> None:
    code = "import sys, rlhf.tuning.methods; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tiny.REPOSITORY).returncode == 0


def test_lora_extends_a_familys_own_linear_layers():
    """Falcon's are a subclass of nn.Linear, as routers are, which alone are left out."""
    config = tiny_config(AutoConfig.for_model("falcon"), 259)
    model = TUNING.pick({"name": "lora", "rank": 2})(random_model(config), None, "causal")
    extended = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert extended == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize("layers", [None, 1])
def test_lora_leaves_out_the_layers_whose_weights_a_family_reads_without_calling_them(layers):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    wrapped = TUNING.pick({"name": "lora", "layers": layers})(model, None, "causal")
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert any("in_proj" in name for name in names) and not any("out_proj" in name for name in names)
    assert any("layers.0" in name for name in names) == (layers is None)
    with pytest.raises(UserError, match="lora does not work with MambaForCausalLM"):
        TUNING.pick({"name": "lora", "target_modules": ["out_proj"]})(
            AutoModelForCausalLM.from_config(config), None, "causal"
        )
