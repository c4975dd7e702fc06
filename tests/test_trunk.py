"""The frozen trunk: going on from the middle gives the very numbers, in every family that can; others start anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.models.forward import hidden_states
from rlhf.ppo.batching import TokenRows
from rlhf.ppo.frozen_layers import FrozenLayers, gather_states
from rlhf.tuning.methods import TUNING

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
IDS = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 9 + [0] * 2])


def model_of(family: str, layers: int | None = 1):
    """A random model of three layers, with an adapter in the last `layers`."""
    own = {} if family == "gpt2" else SIZES
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**own, "vocab_size": 64, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    wrapped = TUNING.pick({"name": "lora", "rank": 2, "layers": layers})(model, None, "causal")
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return wrapped.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_the_middle_gives_the_same_hidden_states(family):
    model = model_of(family)
    trunk = FrozenLayers(model)
    assert trunk.depth == 2
    with torch.no_grad():
        whole = hidden_states(model, IDS, MASK)[MASK.bool()]
        states = trunk.states(lambda: hidden_states(model, IDS, MASK))
        with trunk.starting_from(states.masked_fill(MASK[..., None] == 0, 0)):
            upper = hidden_states(model, IDS, MASK)[MASK.bool()]
    torch.testing.assert_close(upper, whole, atol=1e-6, rtol=0)


def test_lower_layers_run_for_the_trunk_alone_and_upper_layers_for_all_else():
    model = model_of("llama")
    trunk, ran = FrozenLayers(model), []
    for number, layer in enumerate(trunk.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        states = trunk.states(lambda: hidden_states(model, IDS, MASK))
        assert ran == [0, 1]
        with trunk.starting_from(states):
            hidden_states(model, IDS, MASK)
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("layers, depth", [(1, 2), (2, 1), (3, 0), (None, 0)])
def test_the_trunk_ends_below_the_first_layer_with_an_adapter(layers, depth):
    assert FrozenLayers(model_of("llama", layers)).depth == depth


def test_a_model_that_cannot_go_on_from_the_middle_has_no_trunk():
    model = model_of("llama")
    inner = model.get_base_model().model
    forward = inner.forward

    def with_a_residual_from_the_first_layer(*args, **kwargs):
        first = []
        handle = inner.layers[0].register_forward_hook(lambda _module, _args, output: first.append(output))
        try:
            output = forward(*args, **kwargs)
        finally:
            handle.remove()
        output.last_hidden_state = output.last_hidden_state + first[0].cumsum(1).roll(1, -1) * output.last_hidden_state
        return output

    inner.forward = with_a_residual_from_the_first_layer
    assert FrozenLayers(model).depth == 0


@pytest.mark.parametrize("packed", [False, True])
def test_states_come_back_row_by_row_into_other_batches(packed):
    rows = [([5, 6, 7, 8], [False, False, True, True]), ([9, 10], [False, True]), ([3, 4, 5], [False, True, True])]
    token_rows = TokenRows(rows, pad_id=0, packed=packed)
    (batch,) = token_rows.micro_batches([[[0, 1, 2]]])
    states = torch.arange(batch.input_ids.numel() * 2.0).view(*batch.input_ids.shape, 2)
    kept = gather_states(batch._replace(frozen_states=states))
    whole = states[0].split([4, 2, 3]) if packed else [states[0], states[1, :2], states[2, :3]]
    assert all(torch.equal(kept[row], part) for row, part in enumerate(whole))
    (other,) = token_rows.micro_batches([[[2, 1]]], kept)
    padded = torch.stack([whole[2], torch.cat([whole[1], torch.zeros(1, 2)])])
    assert torch.equal(other.frozen_states, torch.cat([whole[2], whole[1]])[None] if packed else padded)
    (filler,) = token_rows.micro_batches([[[]]], kept)
    assert torch.equal(filler.frozen_states, whole[1][None])
    assert gather_states(filler) == {}
