"""The sampler: same tokens as `generate`, streams that depend on nothing but their seed, and the right ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from families import FAMILIES, PROMPTS, RECURRENT, by_generate, chat_like
from transformers import AutoModelForCausalLM

from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import stop_ids
from rlhf.models.load import load_policy
from rlhf.rollout.kv_cache import joinable
from rlhf.rollout.samplers import SAMPLERS, continuous_batching, hf
from rlhf.rollout.slots import SPARE, JoinedCache, choose
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import Completion, SamplingParams


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(path=tiny.llama()), tiny.llama())


OTHER_WAYS = [(hf, 64), (hf, 1), (continuous_batching, 64), (continuous_batching, 3), (continuous_batching, 1)]
CASES = [(hf, 3, family) for family in FAMILIES]
CASES += [(continuous_batching, 64, family) for family in ("llama", "gpt2", "gemma3")]
SLOW = [(*way, family) for way in OTHER_WAYS for family in FAMILIES if (*way, family) not in CASES]


@pytest.mark.parametrize(
    ("sampler", "batch_size", "family"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_greedy_answers_are_those_of_generate_to_the_token(sampler, family, batch_size):
    model, end, expected = by_generate(family)
    assert joinable(model)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    sampling = SamplingParams(24, temperature=0, batch_size=batch_size)
    found = sampler(model, prompts, [0] * len(prompts), sampling, chat_like(end))
    assert [answer.ids for answer in found] == [ids for ids in expected for _ in range(2)]
    assert all(answer.ended == (answer.ids[-1] == end) for answer in found)


@pytest.mark.parametrize("batch_size", [64, 3])
@pytest.mark.parametrize("family", RECURRENT)
def test_a_model_whose_cache_cannot_be_joined_answers_batch_after_batch(family, batch_size):
    model, end, expected = by_generate(family)
    assert not joinable(model)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    found = hf(
        model, prompts, [0] * len(prompts), SamplingParams(24, temperature=0, batch_size=batch_size), chat_like(end)
    )
    assert [answer.ids for answer in found] == [ids for ids in expected for _ in range(2)]


def test_answers_that_end_with_their_first_token_leave_before_the_others_go_on():
    model, _, expected = by_generate("llama")
    first = expected[0][0]
    found = hf(model, [PROMPTS[0]] * 3 + PROMPTS[1:], [0] * 9, SamplingParams(24, temperature=0), chat_like(first))
    for prompt, answer in zip(PROMPTS[1:], found[3:]):
        alone = hf(model, [prompt], [0], SamplingParams(24, temperature=0), chat_like(first))[0]
        assert answer == alone
    assert [answer.ids for answer in found[:3]] == [[first]] * 3


def passes(model, prompts, sampling, end):
    """Rows and columns of every pass through the model."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, inputs, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    hf(model, prompts, range(len(prompts)), sampling, chat_like(end))
    hook.remove()
    return shapes


def test_answers_to_one_prompt_share_its_prefill():
    model, end, _ = by_generate("llama")
    assert passes(model, [PROMPTS[0]] * 6 + [PROMPTS[2]] * 2, SamplingParams(1), end) == [(2, len(PROMPTS[0]))]


def test_no_more_sequences_than_the_batch_size_are_decoded_and_finished_ones_leave():
    model, end, expected = by_generate("llama")
    shapes = passes(model, PROMPTS * 3, SamplingParams(24, temperature=0, batch_size=4), end)
    assert max(rows for rows, _ in shapes) == 4
    assert sum(rows for rows, _ in shapes) < 1.5 * 3 * sum(map(len, expected))
    assert shapes[-1][0] < 4


def test_the_cache_does_not_outgrow_the_longest_live_sequence():
    model, end, _ = by_generate("gpt2")
    widths = []
    step = JoinedCache.before_step

    def note(cache, longest):
        widths.append(cache.layers[0].keys.shape[2] - longest)
        return step(cache, longest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JoinedCache, "before_step", note)
        hf(model, PROMPTS * 12, range(12 * len(PROMPTS)), SamplingParams(60, batch_size=2), chat_like(end))
    assert len(widths) > 200
    assert max(widths) <= 60 + SPARE


def test_an_answer_depends_on_its_seed_alone_not_on_the_batch_it_was_made_in(policy, chat):
    prompts = [chat.prompt(record) for record in _messages(6)]
    seeds = [stream_seed(0, 0, 0, i) for i in range(6)]
    together = hf(policy, prompts, seeds, SamplingParams(20), chat)
    alone = [hf(policy, [p], [s], SamplingParams(20), chat)[0] for p, s in zip(prompts, seeds)]
    in_twos = hf(policy, prompts, seeds, SamplingParams(20, batch_size=2), chat)
    assert together == alone == in_twos


def _messages(count):
    from rlhf.data.schema import Message

    return [(Message("user", tiny.question(i)),) for i in range(count)]


def test_different_seeds_give_different_answers(policy, chat):
    prompt = chat.prompt(_messages(1)[0])
    answers = hf(policy, [prompt] * 4, [stream_seed(0, i) for i in range(4)], SamplingParams(20), chat)
    assert len({tuple(a.ids) for a in answers}) == 4


def test_min_new_tokens_bars_the_end_until_then():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()

    def wish_to_end(module, inputs, output):
        output.logits[..., 2] += 50

    model.register_forward_hook(wish_to_end)
    assert [len(a.ids) for a in hf(model, PROMPTS, range(7), SamplingParams(9), chat_like(2))] == [1] * 7
    assert [len(a.ids) for a in hf(model, PROMPTS, range(7), SamplingParams(9, min_new_tokens=5), chat_like(2))] == [
        6
    ] * 7


def test_a_stop_string_ends_the_answer_after_it(policy, chat):
    prompt = chat.prompt(_messages(1)[0])
    free = hf(policy, [prompt], [3], SamplingParams(30), chat)[0]
    string = chat.decode(free.ids)[5:7]
    stopped = hf(policy, [prompt], [3], SamplingParams(30, stop=(string,)), chat)[0]
    assert stopped.ended
    assert string in chat.decode(stopped.ids)
    assert free.ids[: len(stopped.ids)] == stopped.ids
    assert string not in chat.decode(stopped.ids[:-1])


def test_the_generation_configs_stop_tokens_end_answers(policy, chat):
    assert stop_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 7])), chat) == [2, 1, 7]


def test_choose_inverts_the_cumulative_distribution():
    # probabilities 0.1, 0.2, 0.3, 0.4: cumulative 0.1, 0.3, 0.6, 1.0
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, 4)
    noise = torch.tensor([0.0, 0.05, 0.15, 0.35, 0.61, 0.9999999])
    assert choose(logits, noise, SamplingParams(1)).tolist() == [0, 0, 1, 2, 3, 3]


def test_choose_draws_in_proportion_at_the_temperature():
    logits = torch.tensor([0.0, 1.0]).expand(20_000, 2)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = choose(logits, noise, SamplingParams(1, temperature=0.5)).float().mean()
    assert share == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.01)


def test_top_k_and_top_p_leave_the_likeliest():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1000, 4)
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert set(choose(logits, noise, SamplingParams(1, top_k=2)).tolist()) == {0, 1}
    assert set(choose(logits, noise, SamplingParams(1, top_p=0.75)).tolist()) == {0, 1, 2}


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]).expand(1000, 5)
    noise = torch.cat(
        [torch.zeros(1), torch.rand(998, generator=torch.Generator().manual_seed(0)), torch.tensor([0.99999994])]
    )
    assert set(choose(logits, noise, SamplingParams(1)).tolist()) == {1, 3}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(row.name, marks=[pytest.mark.slow] * (row.name == "process"))  # it starts a process
        for row in SAMPLERS
        if not row.name.startswith("vllm")  # test_vllm.py
    ],
)
def test_every_sampler_gives_one_answer_a_prompt_in_order(name, policy, chat):
    prompts = [chat.prompt(m) for m in _messages(3)]
    answers = SAMPLERS[name].fn(policy, prompts, [1, 2, 3], SamplingParams(7), chat)
    assert all(isinstance(a, Completion) and 1 <= len(a.ids) <= 7 for a in answers)
    assert len(answers) == 3
    assert SAMPLERS[name].fn(policy, [], [], SamplingParams(7), chat) == []


def test_the_policy_is_left_in_the_mode_that_it_was_in(policy, chat):
    policy.train()
    hf(policy, [chat.prompt(_messages(1)[0])], [0], SamplingParams(2), chat)
    assert policy.training
