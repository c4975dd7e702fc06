"""Rows without masks and sequences without padding: the same log-probs, values and gradients as one by one."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from families import ALIBI, FAMILIES, HYBRID, OPT, SMALL, VOCAB, random_model
from sft_runs import run, settings
from transformers import AutoModelForSequenceClassification, DeepseekV3Config, FalconConfig, PhimoeConfig

from rlhf.config.base import OptimizerConfig
from rlhf.core.errors import UserError
from rlhf.models import forward
from rlhf.models.attention import PACKED
from rlhf.models.forward import attend_each
from rlhf.models.isolation import packing_fault
from rlhf.models.scalar import ScalarModel
from rlhf.ppo.batching import TokenRows
from rlhf.ppo.models import ActorCritic, SeparateModels, can_pack
from rlhf.training.engine import make_engine

SMALL_VALUES = DeepseekV3Config(
    **SMALL, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    first_k_dense_replace=2,
)  # fmt: skip
"""DeepSeek-V3 without experts: its values are smaller than its keys."""
MODELS = {**FAMILIES, "opt": OPT, "bloom": ALIBI, "lfm2": HYBRID, "deepseek_v3": SMALL_VALUES}
MIXES = ("bloom", "lfm2", "opt")
"""Packed sequences see each other in these, by a mask at least."""
WAYS = [(n, a) for n in MODELS for a in ("sdpa", "eager") if (n, a) not in (("bloom", "sdpa"), ("gemma2", "sdpa"))]
"""Families, and the attentions that they have."""
SIZES = (11, 4, 7, 2)
ROWS = [
    ([(place * 37 + size) % VOCAB for place in range(size)], [False] + [True] * (size - 1)) for size in SIZES
]  # fmt: skip


def engine_of(config, attention, precision="float32"):
    """Policy and, where the family has one, critic in a plain engine."""
    config = copy.deepcopy(config)
    config._attn_implementation, config.num_labels = attention, 1
    policy = random_model(config)
    scores = type(config) in AutoModelForSequenceClassification._model_mapping
    critic = ScalarModel(AutoModelForSequenceClassification.from_config(config)) if scores else None
    module = ActorCritic(policy, critic).eval().requires_grad_(True)
    return make_engine(module, [{"params": list(module.parameters()), "lr": 0.1}], OptimizerConfig(), precision, None)


def results(engine, packed, shares):
    """Log-probs, values and gradients of a loss that weighs every token differently."""
    engine.module.zero_grad()
    batches = [TokenRows(ROWS, 0, packed).micro_batches([[share]])[0] for share in shares]
    outputs = [engine.forward(batch, 0.7) for batch in batches]
    logprobs = torch.cat([o.logprobs for o in outputs])
    values = torch.zeros(()) if outputs[0].values is None else torch.cat([o.values for o in outputs])
    weights = torch.arange(1.0, len(logprobs) + 1) / len(logprobs)
    (weights * (logprobs + values**2)).mean().backward()
    return [logprobs, values, *(p.grad.clone() for p in engine.module.parameters() if p.grad is not None)]


def assert_equal(found, expected):
    """To 1e-5 of the largest element of each tensor."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0)


@pytest.mark.parametrize(("name", "attention"), WAYS)
def test_padded_rows_give_the_numbers_and_gradients_of_each_sequence_alone(name, attention):
    engine = engine_of(MODELS[name], attention)
    together, alone = results(engine, False, [[0, 1, 2, 3]]), results(engine, False, [[0], [1], [2], [3]])
    assert_equal(together, alone)


@pytest.mark.parametrize(("name", "attention"), [way for way in WAYS if way[0] not in MIXES or way == ("opt", "sdpa")])
def test_packed_sequences_give_the_numbers_and_gradients_of_padded_ones(name, attention):
    engine = engine_of(MODELS[name], attention)
    assert can_pack(SeparateModels(engine), VOCAB, 32, True)
    assert_equal(results(engine, True, [[0, 1, 2, 3]]), results(engine, False, [[0, 1, 2, 3]]))


@pytest.mark.parametrize("name", MIXES)
def test_a_model_that_mixes_packed_sequences_is_refused(name):
    engine = engine_of(MODELS[name], "eager")
    with pytest.raises(UserError, match=r"(?s)packing.*(attend to each|other numbers).*Leave batch.packing out"):
        can_pack(SeparateModels(engine), VOCAB, 32, True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("std", [0.05, 0.25])
def test_rounding_does_not_hide_that_packed_sequences_see_each_other(std, attention):
    # Falcon's leak is smaller than 6% of a log-prob, and bfloat16 rounds.
    config = FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    engine = engine_of(config, attention, "bfloat16")
    for parameter in engine.module.policy.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=std)
    assert not can_pack(SeparateModels(engine), VOCAB, 32, None)
    with pytest.raises(UserError, match="FalconForCausalLM attend to each other"):
        can_pack(SeparateModels(engine), VOCAB, 32, True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_sequences_are_packed_in_bfloat16_on_a_cpu(name):
    engine = engine_of(FAMILIES[name], "sdpa", "bfloat16")
    alone = results(engine, False, [[0], [1], [2], [3]])
    assert can_pack(SeparateModels(engine), VOCAB, 32, None)
    packed = results(engine, True, [[0, 1, 2, 3]])
    torch.testing.assert_close(packed[0], alone[0], rtol=0, atol=0.01 * float(alone[0].abs().max()))


def test_a_sliding_window_that_packing_would_lose_is_found_where_sequences_are_longer():
    # PhiMoE passes its window to the attention in the mask alone, which packing on a CPU replaces.
    config = PhimoeConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    engine = engine_of(config, "sdpa")
    with pytest.raises(UserError, match=r"get other outputs than in a row of their own \(tested with 28 tokens"):
        can_pack(SeparateModels(engine), VOCAB, 200, True)
    assert engine.module.policy.config._attn_implementation == "sdpa"
    assert can_pack(SeparateModels(engine), VOCAB, 16, True)


def test_a_model_that_cannot_compute_a_packed_row_is_refused_with_the_error_that_it_raises():
    def outputs(texts, packed):
        raise ValueError("softcap is not supported\nin this attention")

    fault = packing_fault(outputs, VOCAB, 32, [], torch.float32)
    assert fault == "cannot be computed: softcap is not supported"


@pytest.mark.parametrize(("attention", "packed"), [("sdpa", True), ("eager", False)])
def test_packing_is_chosen_on_a_cpu_where_it_needs_no_mask(attention, packed):
    engine = engine_of(FAMILIES["llama"], attention)
    assert not can_pack(SeparateModels(engine), VOCAB, 32, False)
    assert can_pack(SeparateModels(engine), VOCAB, 32, None) is packed
    assert engine.module.policy.config._attn_implementation == (PACKED if packed else attention)


def test_a_model_that_cannot_be_packed_keeps_its_attention():
    engine = engine_of(HYBRID, "sdpa")
    assert not can_pack(SeparateModels(engine), VOCAB, 32, None)
    assert engine.module.policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_packed_sequence_is_never_a_matrix_of_all_tokens(name, monkeypatch):
    engine = engine_of(MODELS[name], "sdpa")
    can_pack(SeparateModels(engine), VOCAB, 32, None)
    critic = engine.module.critic.model
    critic.config = copy.deepcopy(critic.config)  # as where roles share a base: a body's attention is the body's own
    critic.config._attn_implementation = "sdpa"
    seen = []
    parts = forward._parts

    def watched(sizes, *args):
        seen.append(tuple(sizes.tolist()))
        return parts(sizes, *args)

    monkeypatch.setattr(forward, "_parts", watched)
    monkeypatch.setattr(forward, "sdpa_attention_forward", None)  # the matrix of all tokens would fail
    results(engine, True, [[0, 1, 2, 3]])
    assert set(seen) == {SIZES}


@pytest.mark.parametrize("window", [0, 3])
def test_the_attention_is_an_operator_as_torch_asks(window):
    query, key, value = (torch.randn(1, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    torch.library.opcheck(attend_each, (query, key, value, torch.tensor([5, 4]), 0.3, window))


def test_an_ordinary_call_of_a_packed_model_is_unchanged():
    engine = engine_of(FAMILIES["mistral"], "sdpa")
    ids, mask = torch.arange(22).view(2, 11) + 3, torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    before = engine.module.policy(input_ids=ids, attention_mask=mask).logits
    assert can_pack(SeparateModels(engine), VOCAB, 32, True)
    torch.testing.assert_close(engine.module.policy(input_ids=ids, attention_mask=mask).logits, before, rtol=0, atol=0)


# ---- in the stage SFT ----------------------------------------------------------------------------------------------


def test_sft_packs_only_models_that_isolate_packed_demonstrations(tmp_path, monkeypatch):
    # Flash attention needs a GPU; with eager attention, Llama isolates packed rows and LFM2's convolutions do not.
    monkeypatch.setattr("rlhf.sft.batches.VARLEN", ("eager",))
    config = copy.deepcopy(HYBRID)
    config.vocab_size = len(tiny.tokenizer())
    random_model(config).save_pretrained(tmp_path / "lfm2")
    tiny.tokenizer().save_pretrained(tmp_path / "lfm2")
    demos = tiny.write_demonstrations(tmp_path / "demos", 16)
    model = {"attn_implementation": "eager", "max_length": 128}
    wanted = {"packing": True, "max_steps": 1, "batch_size": 8}
    with pytest.raises(UserError, match=r"packed demonstrations of Lfm2ForCausalLM (attend|get)"):
        run(settings(demos, tmp_path / "a", model={"path": str(tmp_path / "lfm2"), **model}, batch=wanted))
    run(settings(demos, tmp_path / "b", model={"path": tiny.llama(), **model}, batch=wanted))
