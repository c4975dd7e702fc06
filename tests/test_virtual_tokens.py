"""Virtual tokens (prompt tuning, P-tuning, prefix tuning) in the reward model and in PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from logged import lines as metrics_of
from ppo_runs import config as ppo_config
from reward_runs import config as reward_config
from safetensors.torch import load_file
from stopped import stopped_after

from rlhf.cli.preflight import check
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.schema import Message
from rlhf.data.store import open_dataset
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.inference.reward_model import open_reward_model
from rlhf.models.forward import hidden_states
from rlhf.models.load import load_policy
from rlhf.models.scalar import load_scalar
from rlhf.ppo.config import PPOConfig
from rlhf.runs.run import read_run
from rlhf.tuning.methods import TUNING, say_trainable
from stages import chat as chat_command
from stages import evaluate, ppo, propose, reward, sample, score

SPECS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"name": "prompt-tuning", "tokens": 4},
    "p-tuning": {"name": "p-tuning", "tokens": 4, "hidden": 8},
    "prefix-tuning": {"name": "prefix-tuning", "tokens": 4},
}
WEIGHTS = {"prompt-tuning": 4 * 32, "p-tuning": 4 * 32, "prefix-tuning": 2 * 2 * 4 * 16}
"""What a run saves: tokens x width, or keys and values (width 16) in 2 layers."""
each_method = pytest.mark.parametrize("method", SPECS)
one_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "prefix-tuning")) for name in SPECS]
)
"""For tests of whole runs: the other methods are slow tests."""
IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 30, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Finished runs: an SFT run and a reward run of each method."""
    folder = tmp_path_factory.mktemp("virtual")
    found = {f"sft {method}": finished.sft(folder / f"sft-{method}", spec) for method, spec in SPECS.items()}
    return found | {
        f"reward {method}": finished.reward(folder / f"reward-{method}", tuning=spec) for method, spec in SPECS.items()
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "prompts", 16, held_out=4)


def adapter_weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "adapter_model.safetensors")


# ---- states --------------------------------------------------------------------------------------------------------


@each_method
def test_states_are_those_of_pefts_own_forward(method: str, runs: dict[str, str]) -> None:
    model: Any = load_policy(ModelConfig(path="x"), f"{runs[f'sft {method}']}/model").eval()
    with torch.no_grad():
        states = hidden_states(model, IDS, MASK)
        expected = model(input_ids=IDS, attention_mask=MASK).logits[:, -IDS.shape[1] :]
        found = model.get_base_model().lm_head(states)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=1e-5)


# ---- the reward model ----------------------------------------------------------------------------------------------


@one_method
def test_a_reward_model_trains_them_and_its_head_alone(
    method: str, rankings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    monkeypatch.setattr(reward, "say_trainable", lambda *words: models.append(words[1]) or say_trainable(*words))
    batch = {"batch_size": 36, "micro_batch_size": 36, "max_steps": 3}
    values = {"optimizer": {"lr": 5e-2}, "batch": batch, "eval": {"every": 3}}
    made = reward_config(tmp_path, rankings, tuning=SPECS[method], **values)
    reward.run(made)
    losses = [row["train/loss"] for row in metrics_of(made.run) if "train/loss" in row]
    assert losses[-1] < losses[0]
    base = load_file(Path(tiny.llama()) / "model.safetensors")
    live = dict(models[0].get_base_model().named_parameters())
    assert len(base.keys() & live.keys()) > 10
    assert all(torch.equal(live[name], base[name]) for name in base.keys() & live.keys())
    assert sum(tensor.numel() for tensor in adapter_weights(made.run).values()) == WEIGHTS[method] + 32
    again = open_reward_model(made.run)
    assert again.limit == 128 - 4
    assert (again.scalar.mean, again.scalar.std) != (0.0, 1.0)
    said, _ = finished.invoke(evaluate.command, made.run, "--dataset", rankings, "--split", "eval", "--json")
    [facts] = finished.last_json(said)["datasets"]
    assert facts["pairs"]["accuracy"]["value"] == pytest.approx(read_run(made.run)["metrics"]["accuracy"])


@one_method
def test_a_resumed_reward_run_equals_the_uninterrupted_one_bit_for_bit(
    method: str, rankings: str, tmp_path: Path
) -> None:
    batch = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 3}
    values = {"tuning": SPECS[method], "checkpoints": {"every": 2}, "batch": batch, "eval": {"every": 3}}
    reward.run(reward_config(tmp_path / "whole", rankings, **values))
    cut = reward_config(tmp_path / "cut", rankings, **values)
    with stopped_after(2):
        reward.run(cut)
    reward.run(cut, resume=True)
    whole, resumed = adapter_weights(tmp_path / "whole/run"), adapter_weights(cut.run)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@each_method
def test_a_score_does_not_depend_on_padding_or_on_the_rest_of_the_batch(method: str, runs: dict[str, str]) -> None:
    scalar = load_scalar(ModelConfig(path="x"), f"{runs[f'reward {method}']}/model", head="trained").eval()
    with torch.no_grad():
        together = scalar(IDS, MASK)
        alone = [scalar(ids[mask.bool()][None], mask[mask.bool()][None])[0] for ids, mask in zip(IDS, MASK)]
        values = scalar.token_values(IDS, MASK)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, values[[0, 1], [5, 3]], atol=1e-5, rtol=1e-5)


@each_method
def test_rlhf_score_gives_the_scores_of_the_exports_snippet_in_plain_peft(
    method: str, runs: dict[str, str], tmp_path: Path
) -> None:
    run = runs[f"reward {method}"]
    facts = export(run, tmp_path / "out", EXPORTERS.pick("adapter"))
    assert facts["parameters"] == WEIGHTS[method] + 32
    printed = float(finished.run_snippet(finished.python_block((tmp_path / "out/README.md").read_text())))
    words = ["-p", "Tell me a story.", "-a", "Once upon a time there was an owl.", "--json"]
    row = finished.last_json(finished.invoke(score.command, run, *words)[0])
    assert row["score"] == pytest.approx(printed, abs=1e-4)


@pytest.mark.parametrize(
    "start, method",
    [("prompt-tuning", "prompt-tuning"), ("p-tuning", "prompt-tuning"), ("prefix-tuning", "prefix-tuning")],
)
def test_a_reward_model_goes_on_with_the_tokens_of_the_sft_run(
    start: str, method: str, runs: dict[str, str], tmp_path: Path
) -> None:
    sft = runs[f"sft {start}"]
    made = finished.reward(tmp_path / "reward", sft, SPECS[method])
    before, after = (adapter_weights(run)["prompt_embeddings"] for run in (sft, made))
    assert 0.05 < (after - before).std() < 0.2  # what `finished` adds
    assert json.loads((Path(made) / "model/adapter_config.json").read_text())["base_model_name_or_path"] == tiny.llama()


@pytest.mark.parametrize(
    "start, other, words",
    [
        ("prompt-tuning", "full", "name: prompt-tuning, tokens: 4"),
        ("prompt-tuning", SPECS["prefix-tuning"], "name: prompt-tuning, tokens: 4"),
        ("p-tuning", SPECS["p-tuning"], "without an encoder.*name: prompt-tuning, tokens: 4"),
        ("prefix-tuning", {"name": "prefix-tuning", "tokens": 5}, "name: prefix-tuning, tokens: 4"),
        ("prompt-tuning", {"name": "prompt-tuning", "tokens": 4, "init": "vocabulary"}, "trains them further"),
    ],
)
def test_another_method_cannot_go_on_with_them(
    start: str, other: Any, words: str, runs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"(?s)does not fit model.path.*{words}"):
        finished.sft(tmp_path / "run", other, runs[f"sft {start}"])


@pytest.mark.parametrize("family", ["t5", "bart"])
@each_method
def test_an_encoder_decoder_is_refused_as_a_reward_model_before_it_is_loaded(
    method: str, family: str, rankings: str, tmp_path: Path
) -> None:
    made = reward_config(tmp_path, rankings, model={"path": tiny.encoder_decoder(family)}, tuning=SPECS[method])
    with pytest.raises(UserError, match=f"(?s){method} does not work.*encoder-decoder.*take only token ids"):
        reward.run(made)
    assert not Path(made.run).exists()


def test_an_encoder_without_past_keys_is_refused_for_prefix_tuning(chat: ChatTokenizer) -> None:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ModernBertForSequenceClassification(ModernBertConfig(vocab_size=320, pad_token_id=0, num_labels=1, **shape))
    with pytest.raises(UserError, match=r"(?s)prefix-tuning does not work with ModernBert.*Use prompt-tuning"):
        TUNING.pick("prefix-tuning")(model, chat, "scalar")


def test_a_whole_model_of_a_reward_run_is_refused_with_the_reason(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)cannot be merged.*only PEFT adds them.*--format adapter"):
        export(runs["reward prompt-tuning"], tmp_path / "out", EXPORTERS.pick("hf"))


# ---- PPO -----------------------------------------------------------------------------------------------------------


def small(folder: Path, prompts: str, method: str, **changes: Any) -> PPOConfig:
    """Two updates of 4 prompts; policy and critic have virtual tokens."""
    values = {"tuning": SPECS[method], "critic__tuning": SPECS[method], "rollout__prompts_per_update": 4}
    values |= {"rollout__max_new_tokens": 6, "eval__prompts": 2}
    return ppo_config(folder, prompts, **values | changes)


def start(config: PPOConfig) -> ppo.PPO:
    return ppo.PPO(config, resume=False, overwrite=False)


@each_method
def test_ppo_trains_them_alone_and_begins_with_a_ratio_of_exactly_one(
    method: str, prompts: str, tmp_path: Path
) -> None:
    stage = start(small(tmp_path, prompts, method))
    module: Any = stage.models.engine.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    updates = [stage.update(number) for number in range(2)]
    assert all(one["policy/first_ratio_min"] == one["policy/first_ratio_max"] == 1 for one in updates)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    for role in ("policy", "critic"):
        assert any(name.startswith(role) and "prompt_encoder" in name for name in moved)
    assert all("prompt_encoder" in name or "score" in name for name in moved)


@each_method
def test_the_reference_is_the_policy_without_them(method: str, prompts: str, tmp_path: Path) -> None:
    stage = start(small(tmp_path, prompts, method))
    rollout = stage.rollout(stage.draw_prompts(0))
    batch = stage.minibatches(rollout, 0).epochs[0][0].micro_batches()[0]
    with torch.no_grad():
        found = stage.models.reference(batch, 1.0)
        base = load_policy(ModelConfig(path="x"), tiny.llama())(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        )
    expected = base.logits.log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.logprobs, expected[batch.response_mask[:, 1:]], atol=1e-5, rtol=1e-5)
    assert (stage.models.token_scores(batch, 1.0).logprobs - found.logprobs).abs().max() > 1e-4


@each_method
def test_rollouts_come_from_the_weights_of_this_update(method: str, prompts: str, tmp_path: Path) -> None:
    stage = start(small(tmp_path, prompts, method, score__policy="sampler", optimizer__policy_lr=0.1))
    for number in range(2):  # the sampler's log-probs against those of the first pass of learning
        update = stage.update(number)
        assert update["policy/first_ratio_min"] == pytest.approx(1, abs=1e-4)
        assert update["policy/first_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert abs(update["policy/ratio_max"] - 1) > 1e-3  # the weights moved


def test_the_checks_before_a_stage_accept_a_run_with_them(runs: dict[str, str], prompts: str, tmp_path: Path) -> None:
    own = {"model__path": runs["sft prompt-tuning"], "critic__init": "reward"}
    own["reward"] = {"name": "model", "path": runs["reward prompt-tuning"]}
    found = check("ppo", small(tmp_path / "run", prompts, "prompt-tuning", **own), resume=False, overwrite=False)
    said = " ".join(how for _, how in found)
    assert "finished sft run" in said and "finished reward run" in said


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_ppo_goes_on_with_the_tokens_of_its_parents_and_compares_with_them(
    method: str, runs: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    parents = {"model__path": runs[f"sft {method}"], "critic__init": "reward"}
    parents["reward"] = {"name": "model", "path": runs[f"reward {method}"]}
    stage = start(small(tmp_path, prompts, method, **parents))
    assert stage.update(0)["objective/kl"] == 0
    assert stage.update(1)["objective/kl"] != 0


@pytest.mark.parametrize("method", [pytest.param("p-tuning", marks=pytest.mark.slow), "prefix-tuning"])
def test_a_resumed_ppo_run_equals_the_uninterrupted_one_bit_for_bit(method: str, prompts: str, tmp_path: Path) -> None:
    ppo.run(small(tmp_path / "whole", prompts, method))
    broken = start(small(tmp_path / "cut", prompts, method))
    broken.evaluate()
    broken.reporter.update(1, broken.update(0))
    broken.done = 1
    broken.save()
    ppo.run(small(tmp_path / "cut", prompts, method), resume=True)
    whole, cut = (adapter_weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("method, family", [("prompt-tuning", "bart"), ("prefix-tuning", "t5")])
def test_an_encoder_decoder_is_a_policy_with_them(method: str, family: str, prompts: str, tmp_path: Path) -> None:
    own = {"model__path": tiny.encoder_decoder(family), "critic__tuning": "full", "score__policy": "sampler"}
    stage = start(small(tmp_path, prompts, method, **own))
    for number in range(2):
        update = stage.update(number)
        assert update["policy/first_ratio_min"] == pytest.approx(1, abs=1e-4)
        assert update["policy/first_ratio_max"] == pytest.approx(1, abs=1e-4)


def test_the_critic_of_an_encoder_decoder_cannot_have_them(prompts: str, tmp_path: Path) -> None:
    made = small(tmp_path / "run", prompts, "p-tuning", model__path=tiny.encoder_decoder("t5"))
    with pytest.raises(UserError, match=r"(?s)p-tuning does not work for a reward model or critic"):
        start(made)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rollout__sampler": "transformers", "rollout__max_importance_weight": None}, "not support virtual tokens"),
        ({"rollout__sampler": "vllm"}, "'prompt-tuning' cannot be merged"),
        ({"rollout__merge_adapters": True}, "no adapter that can be merged"),
        ({"batch__packing": True}, "only the first sequence of a row would see the virtual tokens of tuning"),
        ({"model__sharing": "shared"}, "needs `lora`, `qlora` or `bottleneck`, got 'prompt-tuning'"),
        ({"critic__tuning": "prefix-tuning", "gradient_checkpointing": True}, "critic.tuning `prefix-tuning`"),
    ],
)
def test_what_does_not_work_with_them_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        small(tmp_path, "nowhere", "prompt-tuning", **changes)


# ---- the policy in use ---------------------------------------------------------------------------------------------


@each_method
def test_samples_are_those_of_pefts_own_generate(method: str, runs: dict[str, str], tmp_path: Path) -> None:
    run = runs[f"sft {method}"]
    words = ["-p", "What does the cat do?", "-p", "Hello!", "--temperature", 0, "--max-new-tokens", 8]
    finished.invoke(sample.command, run, *words, "--out", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model: Any = load_policy(ModelConfig(path="x"), f"{run}/model").eval()
    chat = load_tokenizer(ModelConfig(path="x"), f"{run}/model")
    for row, text in zip(found, ("What does the cat do?", "Hello!")):
        ids = torch.tensor([chat.prompt([Message("user", text)])])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True
        )
        assert row["answer"] == chat.decode(output[0, ids.shape[1] :].tolist())


def test_chat_and_propose_take_the_result(runs: dict[str, str], prompts: str, tmp_path: Path) -> None:
    run = runs["sft prefix-tuning"]
    said, _ = finished.invoke(chat_command.command, run, "--max-new-tokens", 4, stdin="Hello!\n")
    assert said
    words = ["--prompts", prompts, "--out", tmp_path / "out", "--k", 2, "--count", 2, "--max-new-tokens", 8]
    finished.invoke(propose.command, run, *words, program="rlhf data propose")
    assert len(list(open_dataset(tmp_path / "out", "proposal").records())) == 2
