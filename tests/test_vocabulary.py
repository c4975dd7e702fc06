"""Embeddings with more or fewer rows than the tokenizer has ids."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from logged import updates
from ppo_runs import config
from sft_runs import run, settings

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.schema import Message
from rlhf.models.forward import token_logprobs
from rlhf.models.load import load_policy
from rlhf.models.vocabulary import mask_unknown_ids, token_count
from rlhf.rollout.samplers import continuous_batching, hf
from rlhf.rollout.types import SamplingParams
from rlhf.tuning.methods import TUNING
from stages import ppo

IDS = 320
"""Of tiny.tokenizer."""


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The tiny Llama with 64 more rows, whose ids are likely."""
    folder = str(tmp_path_factory.mktemp("padded"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama())
    model.resize_token_embeddings(IDS + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS:] = model.get_input_embeddings().weight[5]
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The tiny Llama with 8 rows too few."""
    folder = str(tmp_path_factory.mktemp("short"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama())
    model.resize_token_embeddings(IDS - 8)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("sampler", [hf, continuous_batching])
def test_ids_beyond_the_tokenizer_are_never_sampled(sampler, tuning, padded, chat):
    assert token_count(chat.tokenizer) == IDS
    prompts = [chat.prompt((Message("user", tiny.question(i)),)) for i in range(6)]
    policy = TUNING.pick(tuning)(load_policy(ModelConfig(path=padded), padded), chat, "causal")
    draw = lambda: [i for c in sampler(policy, prompts, range(6), SamplingParams(8), chat) for i in c.ids]  # noqa: E731
    assert max(draw()) >= IDS, "without the mask some are"
    mask_unknown_ids(policy.get_base_model() if tuning == "lora" else policy, IDS)
    assert max(draw()) < IDS


def test_log_probs_entropies_and_gradients_are_those_of_the_known_ids_alone(padded):
    ids = torch.randint(3, IDS, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = torch.ones_like(ids).bool()
    wanted[:, 0] = False
    plain, masked = (load_policy(ModelConfig(path=padded), padded).eval() for _ in range(2))
    mask_unknown_ids(masked, IDS)
    logprobs, entropies, _ = token_logprobs(masked, ids, torch.ones_like(ids), wanted, 0.7)
    known = (plain(ids).logits[:, :-1, :IDS] / 0.7).log_softmax(-1)
    expected = known.gather(-1, ids[:, 1:, None]).flatten(), -(known.exp() * known).sum(-1).flatten()
    torch.testing.assert_close((logprobs, entropies), expected)
    (logprobs.sum() + entropies.sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    found, right = (model.get_input_embeddings().weight.grad for model in (masked, plain))
    torch.testing.assert_close(found, right)


def test_the_mask_adds_nothing_to_the_backward_pass(padded):
    ids = torch.randint(3, IDS, (2, 12))
    plain, masked = (load_policy(ModelConfig(path=padded), padded) for _ in range(2))
    mask_unknown_ids(masked, IDS)
    names = [model(ids).logits.grad_fn.name() for model in (plain, masked)]
    assert names[0] == names[1], "a copy of the gradient of all logits, as large as they are"


def test_ppo_from_padded_embeddings_starts_at_a_ratio_of_1_and_a_kl_of_0(padded, prompts, tmp_path):
    ppo.run(config(tmp_path / "run", prompts, model__path=padded, updates=1, batch__epochs=1, batch__minibatches=1))
    first = updates(tmp_path / "run")[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert first["policy/ratio_min"] == first["policy/ratio_max"] == 1


def test_a_tokenizer_larger_than_the_embedding_is_refused_or_gets_equal_new_rows(short, demos, tmp_path):
    with pytest.raises(UserError, match=r"312 rows.*ids up to 319") as refused:
        run(settings(demos, tmp_path / "refused", model={"path": short}))
    assert "model.resize_embeddings=true" in str(refused.value.remedy)
    policy, reference = (load_policy(ModelConfig(path=short, resize_embeddings=True), short, tokens=IDS) for _ in "12")
    rows = policy.get_input_embeddings().weight
    assert len(rows) == policy.config.vocab_size == IDS
    torch.testing.assert_close(rows[-1], rows[: IDS - 8].mean(0))
    assert rows.equal(reference.get_input_embeddings().weight)
    batch = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 1}
    done = run(settings(demos, tmp_path / "run", model={"path": short, "resize_embeddings": True}, batch=batch))
    assert transformers.AutoConfig.from_pretrained(done / "model").vocab_size == IDS


def test_new_rows_with_an_adapter_are_refused(short, demos, tmp_path):
    with pytest.raises(UserError, match="lora would not train the new rows"):
        model = {"path": short, "resize_embeddings": True}
        run(settings(demos, tmp_path / "run", model=model, tuning="lora"))


def test_ppo_names_a_reward_model_that_lacks_ids_of_the_policy(short, prompts, tmp_path):
    reward = {"name": "sum", "terms": [{"name": "model", "path": short}]}
    with pytest.raises(UserError, match=f"{short}: the model's embedding has 312 rows"):
        ppo.run(config(tmp_path / "run", prompts, reward=reward))
    assert not (tmp_path / "run").exists()
