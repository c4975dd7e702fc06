"""The KV cache of fixed size that CUDA graphs need gives the same tokens as the cache that grows."""

from __future__ import annotations

import functools

import pytest
from families import FAMILIES, HYBRID, PROMPTS, by_generate, chat_like, random_model

from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.ppo.config import RolloutConfig
from rlhf.rollout import kv_cache
from rlhf.rollout.samplers import hf
from rlhf.rollout.slots import next_logits
from rlhf.rollout.types import SamplingParams

recorded = functools.partial(hf, step="cuda_graph")


@pytest.fixture
def shapes(monkeypatch):
    """Runs `cuda_graph` without a GPU: the step over its cache, not recorded. Gives the mask shape of every step."""
    found = []

    def step(model, ids, mask, positions, cache):
        found.append((len(ids), mask.shape[1]))
        return next_logits(model, ids, mask, positions, cache)

    monkeypatch.setattr(kv_cache, "GraphStep", lambda device: step)
    return found


CASES = [(family, size) for size in (3, 64, 1) for family in FAMILIES]
FAST = [("llama", 3), ("gpt2", 3), ("gemma3", 3)]


@pytest.mark.parametrize(
    ("family", "batch_size"), [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_greedy_completions_over_a_cache_of_fixed_size_are_those_of_generate(family, batch_size, shapes):
    model, end, expected = by_generate(family)
    some = [prompt for prompt in PROMPTS for _ in range(2)]
    found = recorded(model, some, [0] * 14, SamplingParams(24, temperature=0, batch_size=batch_size), chat_like(end))
    assert [completion.ids for completion in found] == [ids for ids in expected for _ in range(2)]
    assert {width for _, width in shapes} == {128}, "17 + 24 tokens and the spare columns, rounded up to 64"


def test_more_completions_than_the_cache_has_columns_pass_through_it(shapes, monkeypatch):
    model, end, expected = by_generate("gemma3")
    addresses = set()
    before = kv_cache.FixedCache.before_step

    def note(cache, longest):
        mask = before(cache, longest)
        addresses.add((mask.data_ptr(), *(layer.keys.data_ptr() for layer in cache.layers)))
        return mask

    monkeypatch.setattr(kv_cache.FixedCache, "before_step", note)
    found = recorded(model, PROMPTS * 12, [0] * 84, SamplingParams(24, temperature=0, batch_size=2), chat_like(end))
    assert [completion.ids for completion in found] == expected * 12
    assert len(shapes) > 2 * 128, "so that columns had to be moved"
    assert len(addresses) == 1, "a CUDA graph reads fixed addresses"


def test_the_number_of_slots_halves(shapes):
    model, end, expected = by_generate("llama")
    some = [PROMPTS[i % 7] for i in range(60)]
    found = recorded(model, some, [0] * 60, SamplingParams(24, temperature=0), chat_like(end))
    assert [completion.ids for completion in found] == [expected[i % 7] for i in range(60)]
    sizes = [rows for rows, _ in shapes]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) <= {60, 30, 15, 8, 4} and len(set(sizes)) > 1


def test_an_unsupported_device_or_cache_is_refused():
    sampling, chat = SamplingParams(4), chat_like(2)
    model = random_model(FAMILIES["llama"])
    with pytest.raises(UserError, match="`cuda_graph` needs a CUDA device, and the policy is on `cpu`"):
        recorded(model, PROMPTS, [0] * 7, sampling, chat)
    with pytest.raises(UserError, match="a key and a value per token"):
        recorded(random_model(HYBRID), PROMPTS, [0] * 7, sampling, chat)


def test_the_compiled_step_is_refused_as_removed():
    with pytest.raises(UserError, match=r"sampler: .*`compiled` was removed.*leave `step` out"):
        check_config(RolloutConfig, {"sampler": {"name": "hf", "step": "compiled"}}, "test.yaml")


def test_the_head_gets_contiguous_states_in_prefill_and_decoding():
    """Of others torch copies the head's weight for every row of the batch, on a CPU: in bfloat16 100 times slower."""
    model, end, expected = by_generate("gemma3")
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        found = hf(model, PROMPTS, [0] * 7, SamplingParams(24, temperature=0), chat_like(end))
    finally:
        hook.remove()
    assert [completion.ids for completion in found] == expected
    assert len(seen) > 2
    assert all(states.is_contiguous() and states.shape[1] == 1 for states in seen)
