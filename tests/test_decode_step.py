"""Decoding steps over a cache of fixed size, compiled or not, give the tokens of steps over a cache that grows."""

from __future__ import annotations

import functools

import pytest
import torch
from families import FAMILIES, HYBRID, random_model
from test_rollout import PROMPTS, by_generate, chat_like

from rlhf.core.errors import UserError
from rlhf.rollout import decode_step, kv_cache
from rlhf.rollout.samplers import hf
from rlhf.rollout.types import SamplingParams

compiled = functools.partial(hf, step="compiled")


@pytest.fixture
def uncompiled(monkeypatch):
    """The sizes of what the step is given, which is not compiled; everything else is as it will be when it is."""
    sizes = []

    def step(model, ids, mask, positions, cache):
        sizes.append((len(ids), mask.shape[1]))
        return decode_step.next_logits(model, ids, mask, positions, cache)

    monkeypatch.setattr(decode_step, "_compiled", lambda: step)
    return sizes


@pytest.mark.parametrize("batch_size", [64, 3, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_over_a_cache_of_fixed_size_are_those_of_generate(family, batch_size, uncompiled):
    model, end, expected = by_generate(family)
    some = [prompt for prompt in PROMPTS for _ in range(2)]
    found = compiled(model, some, [0] * 14, SamplingParams(24, temperature=0, batch_size=batch_size), chat_like(end))
    assert [answer.ids for answer in found] == [ids for ids in expected for _ in range(2)]
    assert {width for _, width in uncompiled} == {128}, "17 + 24 tokens and what is spare, rounded up"


def test_more_answers_than_the_cache_has_columns_pass_through_it(uncompiled, monkeypatch):
    model, end, expected = by_generate("gemma3")
    places = set()
    before = kv_cache.FixedCache.before_step

    def note(cache, longest):
        mask = before(cache, longest)
        places.add((mask.data_ptr(), *(layer.keys.data_ptr() for layer in cache.layers)))
        return mask

    monkeypatch.setattr(kv_cache.FixedCache, "before_step", note)
    found = compiled(model, PROMPTS * 12, [0] * 84, SamplingParams(24, temperature=0, batch_size=2), chat_like(end))
    assert [answer.ids for answer in found] == expected * 12
    assert len(uncompiled) > 2 * 128, "so that columns had to be moved"
    assert len(places) == 1, "within the same memory: a CUDA graph reads addresses"


def test_places_are_given_up_by_halves(uncompiled):
    model, end, expected = by_generate("llama")
    some = [PROMPTS[i % 7] for i in range(60)]
    found = compiled(model, some, [0] * 60, SamplingParams(24, temperature=0), chat_like(end))
    assert [answer.ids for answer in found] == [expected[i % 7] for i in range(60)]
    sizes = [rows for rows, _ in uncompiled]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) <= {60, 30, 15, 8, 4} and len(set(sizes)) > 1


def test_what_a_device_or_a_cache_rules_out_is_refused():
    sampling, chat = SamplingParams(4), chat_like(2)
    model = random_model(FAMILIES["llama"])
    with pytest.raises(UserError, match="`cuda_graph` needs a CUDA device, and the policy is on `cpu`"):
        hf(model, PROMPTS, [0] * 7, sampling, chat, step="cuda_graph")
    with pytest.raises(UserError, match="a key and a value per token"):
        compiled(random_model(HYBRID), PROMPTS, [0] * 7, sampling, chat)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_compiled_steps_give_the_same_tokens_from_one_graph_a_size(family):
    model, end, expected = by_generate(family)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("force_eager"):  # as the stage has it in a rollout
        for _ in range(2):
            found = compiled(model, PROMPTS, [0] * 7, SamplingParams(24, temperature=0, batch_size=3), chat_like(end))
            assert [answer.ids for answer in found] == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
