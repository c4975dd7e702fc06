"""Encoder-decoders: T5, mT5 and BART as policies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from typer.testing import CliRunner

import stages.ppo
import stages.reward
import stages.sft
from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import EncoderDecoderTokenizer, load_tokenizer
from rlhf.data.schema import Message
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.inference.policy import open_policy
from rlhf.inference.reward_model import open_reward_model
from rlhf.inference.sampling import complete
from rlhf.models.encoder_decoder import halves
from rlhf.models.forward import hidden_states, token_logprobs, token_values
from rlhf.models.load import load_policy, quiet
from rlhf.models.scalar import load_scalar
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.rollout.samplers import SAMPLERS, hf
from rlhf.rollout.types import SamplingParams
from rlhf.sft.batches import token_batch
from rlhf.sft.config import SFTConfig
from stages.cli import app

FAMILIES = ("t5", "mt5", "bart")
quiet()


def chat_of(family: str) -> EncoderDecoderTokenizer:
    path = tiny.encoder_decoder(family)
    chat = load_tokenizer(ModelConfig(path=path), path)
    assert isinstance(chat, EncoderDecoderTokenizer)
    return chat


def model_of(family: str):
    path = tiny.encoder_decoder(family)
    return load_policy(ModelConfig(path=path), path).eval()


def rows_of(chat, count: int = 4):
    """Encoded demonstrations with their prompts and responses."""
    found = []
    for number in range(count):
        prompt = chat.prompt([Message("user", tiny.question(number))])
        response = chat.response(tiny.answer(number, number % 2))
        found.append((prompt, response))
    return found


def batch_of(chat, rows):
    return token_batch([{"input_ids": [*p, *r], "labels": [-100] * len(p) + r} for p, r in rows], chat, packing=False)


# ---- layout --------------------------------------------------------------------------------------------------------


def test_a_row_is_divided_where_its_response_begins():
    ids = torch.tensor([[5, 6, 2, 7, 2], [5, 2, 8, 9, 2], [5, 2, 0, 0, 0]])
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 1, 0, 0, 0]])
    wanted = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0] * 5]).bool()
    parts = halves(ids, mask, wanted, start=3)
    assert parts.encoder_ids.tolist() == [[5, 6, 2], [5, 2, 0], [5, 2, 0]]
    assert parts.encoder_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert parts.targets.tolist() == [[7, 2, 0], [8, 9, 2], [0, 0, 0]]
    assert parts.decoder_ids.tolist() == [[3, 7, 2], [3, 8, 9], [3, 0, 0]]
    assert parts.wanted.int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_has_the_tokens_of_the_template_and_only_the_last_response_is_learned(family):
    chat = chat_of(family)
    messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    ids = chat.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert chat.prompt(messages) == ids
    whole, flags = chat.conversation([*messages, Message("assistant", "four")])
    assert [token for token, flag in zip(whole, flags) if flag] == chat.response("four")
    assert chat.decode(chat.response("four")) == "four"
    assert chat.response("four")[-1] == 2 and ids[-1] == 2


# ---- log-probs, losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_loss_are_those_of_transformers(family):
    chat, model = chat_of(family), model_of(family)
    rows = rows_of(chat)
    batch = batch_of(chat, rows)
    found, *_ = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.labelled, 1.0)
    expected, losses = [], []
    for prompt, response in rows:
        output = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response]))
        losses.append(output.loss * len(response))
        logprobs = output.logits[0].log_softmax(-1)
        expected.append(logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-found.sum(), torch.stack(losses).sum(), rtol=1e-4, atol=1e-4)


def test_the_content_of_padding_never_matters():
    chat, model = chat_of("t5"), model_of("t5")
    batch = batch_of(chat, rows_of(chat))
    other = batch.input_ids.masked_fill(batch.attention_mask == 0, 77)
    first, second = (
        token_logprobs(model, ids, batch.attention_mask, batch.labelled, 1.0)[0] for ids in (batch.input_ids, other)
    )
    assert torch.equal(first, second)


def test_what_needs_one_text_refuses_an_encoder_decoder():
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="is an encoder-decoder"):
        hidden_states(model_of("t5"), ids, ids)


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family):
    chat, model = chat_of(family), model_of(family)
    prompts = [prompt for prompt, _ in rows_of(chat)]
    found = hf(model, prompts, range(4), SamplingParams(max_new_tokens=8, temperature=0), chat)
    for prompt, completion in zip(prompts, found):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2)
        assert output[0, 1:].tolist()[: len(completion.ids)] == completion.ids


def test_a_completion_depends_on_its_prompt_and_seed_alone():
    chat, model = chat_of("bart"), model_of("bart")
    prompts = [prompt for prompt, _ in rows_of(chat, 5)]
    params = SamplingParams(max_new_tokens=8, top_p=0.9, min_new_tokens=2)
    whole = hf(model, prompts, [7, 8, 9, 10, 11], params, chat)
    alone = hf(model, prompts[3:4], [10], params, chat)
    assert whole[3].ids == alone[0].ids and len({tuple(one.ids) for one in whole}) > 1


def test_a_stop_string_ends_a_completion():
    chat, model = chat_of("t5"), model_of("t5")
    prompts = [prompt for prompt, _ in rows_of(chat, 3)]
    free = hf(model, prompts, range(3), SamplingParams(max_new_tokens=12), chat)
    text = chat.decode(free[0].ids)
    stop = next(c for c in text if c.isalnum())
    stopped = hf(model, prompts, range(3), SamplingParams(max_new_tokens=12, stop=(stop,)), chat)[0]
    assert stopped.ended and stop in chat.decode(stopped.ids)
    assert stopped.ids == free[0].ids[: len(stopped.ids)] and stop not in chat.decode(stopped.ids[:-1])


@pytest.mark.parametrize("sampler", ["transformers", "vllm", {"name": "hf", "step": "cuda_graph"}])
def test_a_sampler_that_cannot_refuses(sampler):
    chat, model = chat_of("t5"), model_of("t5")
    with pytest.raises(UserError, match="encoder-decoders"):
        SAMPLERS.pick(sampler)(model, [[5, 2]], [0], SamplingParams(max_new_tokens=4), chat)


# ---- the stage, and what follows -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> str:
    return tiny.write_demonstrations(tmp_path_factory.mktemp("demos") / "demos", 24)


def train(folder: Path, family: str, demos: str, **values) -> Path:
    base = {"run": str(folder / "run"), "model": {"path": tiny.encoder_decoder(family)}, "data": {"train": demos}}
    # All rows in one batch, so that the losses of the steps can be compared.
    base |= {"batch": {"batch_size": 24, "micro_batch_size": 24, "max_steps": 4}}
    base |= {"optimizer": {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}}
    base |= {"eval": {"every": 4, "sample_tokens": 4}}
    stages.sft.run(check_config(SFTConfig, base | values, "test"))
    return folder / "run"


METHODS = [
    "full", "lora", "bottleneck", {"name": "prompt-tuning", "tokens": 3},
    *(pytest.param(method, marks=pytest.mark.slow) for method in (
        "ia3", {"name": "last-layers", "layers": 1}, {"name": "p-tuning", "tokens": 3},
        {"name": "prefix-tuning", "tokens": 3},
    )),
]  # fmt: skip


@pytest.mark.parametrize("tuning", METHODS, ids=lambda m: m if isinstance(m, str) else m["name"])
@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_sft_learns_with_every_method_and_the_result_is_sampled(tmp_path, demos, family, tuning):
    run = train(tmp_path, family, demos, tuning=tuning)
    losses = [json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    policy = open_policy(run)
    assert complete(policy, ["Hello?"], max_new_tokens=4, temperature=0) == complete(
        policy, ["Hello?"], max_new_tokens=4, temperature=0
    )


@pytest.mark.parametrize("family", ["t5", "bart", pytest.param("mt5", marks=pytest.mark.slow)])
def test_the_export_gives_the_same_logits_in_plain_transformers(tmp_path, demos, family):
    run = train(tmp_path, family, demos, tuning="lora")
    export(run, tmp_path / "out", EXPORTERS.pick("hf"))
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    ours = open_policy(run).model
    prompt, response = rows_of(chat_of(family), 1)[0]
    inputs = {"input_ids": torch.tensor([prompt]), "labels": torch.tensor([response])}
    torch.testing.assert_close(plain(**inputs).logits, ours(**inputs).logits)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("max_new_tokens=128", "max_new_tokens=4"), {})


def test_evaluate_and_chat_take_an_encoder_decoder(tmp_path, demos):
    run = train(tmp_path, "t5", demos)
    runner = CliRunner()
    done = runner.invoke(app, ["evaluate", str(run), "--dataset", demos, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout.splitlines()[-1])["policy"]
    logged = [json.loads(line).get("eval/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == pytest.approx([loss for loss in logged if loss is not None][-1], rel=1e-4)
    done = runner.invoke(app, ["chat", str(run), "--max-new-tokens", "4"], input="Hello\n", catch_exceptions=False)
    assert done.exit_code == 0


def test_packing_is_refused(tmp_path, demos):
    with pytest.raises(UserError, match="does not work with encoder-decoders"):
        train(tmp_path, "t5", demos, batch={"batch_size": 8, "max_steps": 1, "packing": True})


# ---- reward model, PPO ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rankings(tmp_path_factory) -> str:
    return tiny.write_rankings(tmp_path_factory.mktemp("rankings") / "rankings", 16)


def train_reward(folder: Path, family: str, rankings: str, **values) -> Path:
    base = {"run": str(folder / "reward"), "model": {"path": tiny.encoder_decoder(family)}, "data": {"train": rankings}}
    base |= {"batch": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 4}, "optimizer": {"lr": 1e-2}}
    stages.reward.run(check_config(RewardConfig, base | values, "test"))
    return folder / "reward"


@pytest.mark.parametrize("tuning", ["full", "lora", pytest.param("ia3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_reward_model_has_the_scores_of_plain_transformers(tmp_path, rankings, family, tuning):
    run = train_reward(tmp_path, family, rankings, tuning=tuning)
    scorer = open_reward_model(run)
    texts = [[*prompt, *response] for prompt, response in rows_of(chat_of(family))]
    with torch.no_grad():
        found = scorer.scalar.eval()(*scorer.chat.pad(texts))
    export(run, tmp_path / "out", EXPORTERS.pick("hf"))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = torch.stack([plain(torch.tensor([ids])).logits[0, 0] for ids in texts])
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert len(set(found.tolist())) > 1
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})


@pytest.fixture(scope="module")
def rewards(tmp_path_factory, rankings) -> dict[str, Path]:
    """A reward run of each family."""
    return {family: train_reward(tmp_path_factory.mktemp(family), family, rankings) for family in ("t5", "bart")}


def ppo_config(folder: Path, family: str, rankings: str, reward: Path, **values):
    base = {"run": str(folder / "ppo"), "model": {"path": tiny.encoder_decoder(family)}, "data": {"prompts": rankings}}
    base |= {"reward": {"name": "model", "path": str(reward)}, "updates": 2, "batch": {"minibatches": 1, "epochs": 1}}
    base |= {"rollout": {"prompts_per_update": 4, "samples_per_prompt": 2, "max_new_tokens": 6}}
    return check_config(PPOConfig, base | values, "test")


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("t5", {}), ("bart", {"tuning": "lora", "critic": {"tuning": "lora"}}),
        pytest.param("bart", {"critic": {"init": "policy"}}, marks=pytest.mark.slow),
        pytest.param("t5", {"advantage": "rloo"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_ppo_starts_with_a_ratio_of_exactly_one(tmp_path, rankings, rewards, family, values):
    stages.ppo.run(ppo_config(tmp_path, family, rankings, rewards[family], **values))
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "policy/first_ratio_min" in row]
    assert len(updates) == 2
    assert all(row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0 for row in updates)
    assert open_policy(tmp_path / "ppo").model.config.is_encoder_decoder


def test_values_are_those_of_the_decoder_before_each_token():
    chat = chat_of("t5")
    path = tiny.encoder_decoder("t5")
    critic = load_scalar(ModelConfig(path=path), path, head="small").eval()
    rows = rows_of(chat)
    batch = batch_of(chat, rows)
    with torch.no_grad():
        found = token_values(critic, batch.input_ids, batch.attention_mask, batch.labelled, None)
        expected = []
        for prompt, response in rows:
            output = transformers.AutoModel.from_pretrained(path).eval()(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *response[:-1]]])
            )
            expected.append(critic.model.score(output.last_hidden_state)[0, :, 0])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_critic_starts_from_the_body_of_the_reward_model(rewards, family):
    run = rewards[family]
    config, folder = ModelConfig(path=str(run)), str(run / "model")
    reward, critic = load_scalar(config, folder, head="trained"), load_scalar(config, folder, head="small")
    of = [{n.split(".", 1)[1]: p for n, p in one.model.named_parameters()} for one in (reward, critic)]
    body = [name for name in of[1] if name.startswith(("encoder", "decoder", "shared"))]
    assert body and all(torch.equal(of[0][name], of[1][name]) for name in body)
