"""The sampler `vllm` against vLLM itself. Run in an environment that has it: `make vllm`, then `make test-vllm`."""

from __future__ import annotations

import pytest
import tiny
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm` runs these tests")

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from logged import lines, updates
from ppo_runs import config

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Message
from rlhf.models.load import load_policy
from rlhf.models.vocabulary import mask_unknown_ids, token_count
from rlhf.ppo.learner import Learner
from rlhf.rollout import vllm, vllm_client
from rlhf.rollout.samplers import SAMPLERS, hf, start
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import SamplingParams
from rlhf.runs.random_state import rng_state
from rlhf.tuning.methods import TUNING
from stages.ppo import PPO, run

pytestmark = pytest.mark.vllm

SMALL = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = SMALL | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
"""vLLM's CPU kernels want heads of at least 32."""
FAMILIES = {
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": 24, "head_dim": 32},
    "qwen2": WIDE,
    "qwen3": WIDE | {"head_dim": 32},
    "gemma": WIDE | {"head_dim": 32},
    "gemma2": WIDE | {
        "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": None,  # transformers' sdpa ignores it, vLLM does not
    },
    "gemma3_text": WIDE | {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
    "phi3": WIDE,
    "gpt2": SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": SMALL | {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
VLLM = SAMPLERS.pick({"name": "vllm", "enforce_eager": True, "max_model_len": 128, "kv_cache_gib": 0.05})
SEEDS = [stream_seed(0, i) for i in range(6)]


@pytest.fixture(autouse=True, scope="module")
def classes_read_in_this_process():
    """vLLM looks at each new model class in a process of its own, which keeps CUDA out of this one but takes long."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


def policy_of(family="llama", tuning="full", chat=None):
    """A random model whose layers are large enough for it not to repeat one token."""
    path = tiny.of_family(family, FAMILIES[family])
    model = load_policy(ModelConfig(path=path), path)
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter is not embedding:
            parameter.data.mul_(10)
    return TUNING.pick(tuning)(model, chat, "causal")


@torch.no_grad()
def gap(policy, prompt, answer, temperature=1.0):
    """Log-probs that an answer came with minus those of the model."""
    logits = policy(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1].float() / temperature
    own = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None]).squeeze(1)
    return torch.tensor(answer.logprobs) - own


@pytest.fixture(scope="module")
def chat():
    path = tiny.of_family("llama", FAMILIES["llama"])
    return load_tokenizer(ModelConfig(path=path), path)


@pytest.fixture(scope="module")
def questions(chat):
    return [chat.prompt((Message("user", tiny.question(i)),)) for i in range(6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_hf_and_log_probs_those_of_the_trainer(family, chat, questions):
    policy = policy_of(family)
    greedy = SamplingParams(24, temperature=0)
    found, expected = (sample(policy, questions, SEEDS, greedy, chat) for sample in (VLLM, hf))
    assert len({token for answer in expected for token in answer.ids}) > 15, "a model that repeats itself tests little"
    assert found == expected
    for prompt, answer in zip(questions, VLLM(policy, questions, SEEDS, SamplingParams(20, temperature=0.7), chat)):
        assert gap(policy, prompt, answer, 0.7).abs().max() < 1e-4


def test_min_new_tokens_delays_the_end(chat, questions):
    policy = policy_of()
    free, late = (SamplingParams(24, least, temperature=0) for least in (0, 18))
    first = hf(policy, questions, SEEDS, free, chat)[0].ids[2]
    policy.generation_config.eos_token_id = first  # a token that the model writes early
    assert len(VLLM(policy, questions, SEEDS, free, chat)[0].ids) <= 3
    found = VLLM(policy, questions, SEEDS, late, chat)
    assert found == hf(policy, questions, SEEDS, late, chat)
    assert min(len(answer.ids) for answer in found) >= 18


def test_a_stop_string_ends_an_answer_where_it_ends_that_of_hf(chat, questions):
    policy = policy_of()
    whole = hf(policy, questions, SEEDS, SamplingParams(24, temperature=0), chat)
    stop = tuple(chat.decode(answer.ids)[4:6] for answer in whole[:3])
    stopped = SamplingParams(24, temperature=0, stop=stop)
    found = VLLM(policy, questions, SEEDS, stopped, chat)
    assert found == hf(policy, questions, SEEDS, stopped, chat)
    assert any(answer.ended and len(answer.ids) < len(long.ids) for answer, long in zip(found, whole))


def test_an_end_token_ends_an_answer_and_a_shorter_limit_cuts_it(chat, questions):
    policy = policy_of()
    greedy = SamplingParams(24, temperature=0)
    policy.generation_config.eos_token_id = hf(policy, questions, SEEDS, greedy, chat)[0].ids[5]
    found = VLLM(policy, questions, SEEDS, greedy, chat)
    assert found == hf(policy, questions, SEEDS, greedy, chat)
    assert found[0].ended and not all(answer.ended for answer in found)


def test_answers_to_one_prompt_differ_and_each_follows_from_its_seed(chat, questions):
    policy, same = policy_of(), [questions[0]] * 6
    found = VLLM(policy, same, SEEDS, SamplingParams(16), chat)
    assert len({tuple(answer.ids) for answer in found}) == 6
    swapped = VLLM(policy, same, SEEDS[::-1], SamplingParams(16), chat)
    assert [answer.ids for answer in swapped] == [answer.ids for answer in found[::-1]]


@pytest.mark.parametrize("narrowed", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_narrowed_distribution_is_followed_and_has_no_log_probs(narrowed, chat, questions):
    policy = policy_of()
    found = VLLM(policy, questions, SEEDS, SamplingParams(12, **narrowed), chat)
    greedy = hf(policy, questions, SEEDS, SamplingParams(12, temperature=0), chat)
    assert [answer.ids for answer in found] == [answer.ids for answer in greedy]
    assert all(answer.logprobs is None for answer in found)


def test_ids_beyond_the_tokenizer_are_never_sampled(chat, questions):
    path = tiny.of_family("phi3", FAMILIES["phi3"])
    policy = load_policy(ModelConfig(path=path), path)
    policy.resize_token_embeddings(400, mean_resizing=False)
    mask_unknown_ids(policy, token_count(chat.tokenizer))
    policy.get_output_embeddings().weight.data[320:] = policy.get_output_embeddings().weight.data[:80]
    for prompt, answer in zip(questions, VLLM(policy, questions, SEEDS, SamplingParams(24), chat)):
        assert max(answer.ids) < 320
        assert gap(policy, prompt, answer).abs().max() < 1e-4


def changed(policy, seed):
    """The policy with random weights in its adapter."""
    torch.manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return policy


@pytest.mark.parametrize(
    ("family", "merge", "alone"), [("llama", False, True), ("llama", True, False), ("gpt2", False, False)]
)
def test_an_adapter_takes_part_alone_or_merged(family, merge, alone, chat, questions):
    """vLLM's class of gpt2 takes no adapters."""
    policy = policy_of(family, tuning="lora", chat=chat)
    greedy = SamplingParams(16, temperature=0, merge_adapters=merge)
    found = [VLLM(policy, questions, SEEDS, greedy, chat)]
    (engine,) = vllm._engines.values()
    assert engine.takes_adapters == alone
    for seed in range(2):  # the second adapter comes to a base that vLLM has
        found.append(VLLM(changed(policy, seed), questions, SEEDS, greedy, chat))
        assert found[-1] == hf(policy, questions, SEEDS, greedy, chat)
        assert not alone or not engine.llm.llm_engine.list_loras()
    assert found[0] != found[1] != found[2]
    for prompt, answer in zip(questions, VLLM(policy, questions, SEEDS, SamplingParams(16), chat)):
        assert gap(policy, prompt, answer).abs().max() < 1e-4


def test_another_base_replaces_the_one_that_vllm_has(chat, questions):
    greedy = SamplingParams(16, temperature=0)
    for factor in (1.0, 0.8):
        policy = changed(policy_of(tuning="lora", chat=chat), 0)
        policy.get_base_model().lm_head.weight.data.mul_(factor).add_(1 - factor)
        assert VLLM(policy, questions, SEEDS, greedy, chat) == hf(policy, questions, SEEDS, greedy, chat)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_new_weights_are_used_from_the_next_call_on(family, chat, questions):
    """Also in a head that is tied to the embedding (gpt2, gemma2), of which vLLM has a copy on a CPU."""
    policy = policy_of(family)
    greedy = SamplingParams(16, temperature=0)
    before = VLLM(policy, questions, SEEDS, greedy, chat)
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05)
    after = VLLM(policy, questions, SEEDS, greedy, chat)
    assert after == hf(policy, questions, SEEDS, greedy, chat) != before


def test_new_weights_are_used_in_bfloat16(chat, questions):
    policy = policy_of("qwen2").bfloat16()
    VLLM(policy, questions, SEEDS, SamplingParams(4), chat)
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05)
    gaps = [
        gap(policy, prompt, answer)
        for prompt, answer in zip(questions, VLLM(policy, questions, SEEDS, SamplingParams(16), chat))
    ]
    assert torch.cat(gaps).abs().mean() < 0.05


def test_random_numbers_and_the_model_are_left_as_they_were(chat, questions):
    policy = policy_of("qwen2")  # another model than before: the engine is made here
    weights = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    before = rng_state()
    VLLM(policy, questions, SEEDS, SamplingParams(4), chat)
    assert torch.equal(rng_state()["torch"], before["torch"]) and rng_state()["python"] == before["python"]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in policy.named_parameters())


def test_a_model_that_vllm_has_no_code_for_is_refused(chat, questions):
    path = tiny.of_family("gpt_neox", WIDE)
    with pytest.raises(UserError, match="no code of its own for gpt_neox"):
        VLLM(load_policy(ModelConfig(path=path), path), questions, SEEDS, SamplingParams(4), chat)


# ---- in PPO


def short_run(folder, prompts, **changes):
    changes = {"model__path": tiny.of_family("llama", WIDE), "rollout__sampler": VLLM} | changes
    return config(folder, prompts, **changes)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_ppo_run_has_importance_weights_near_one(tuning, tmp_path, prompts):
    run(short_run(tmp_path / "run", prompts, tuning=tuning))
    for line in updates(tmp_path / "run"):
        assert 0 < line["rollout/sampler_gap_mean"] <= line["rollout/sampler_gap_max"] < 1e-4
        assert line["rollout/importance_truncated"] == 0
        assert line["policy/first_ratio_min"] == line["policy/first_ratio_max"] == 1.0


@pytest.mark.parametrize(("tuning", "sent"), [("full", "merged_weights"), ("lora", "lora_weights")])
def test_a_sampler_with_stale_weights_shows_in_the_gap(tuning, sent, tmp_path, prompts, monkeypatch):
    """What the test above would miss if both sides were wrong: the first weights kept through all updates."""
    first, weights = [], getattr(vllm, sent)

    def stale(*args):
        first.extend([(name, weight.clone()) for name, weight in weights(*args)] if not first else [])
        yield from first

    monkeypatch.setattr(vllm, sent, stale)
    run(short_run(tmp_path / "run", prompts, tuning=tuning, optimizer__policy_lr=1e-2))
    gaps = [line["rollout/sampler_gap_mean"] for line in updates(tmp_path / "run")]
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, prompts):
    run(short_run(tmp_path / "whole", prompts))
    stage = PPO(short_run(tmp_path / "cut", prompts), False, False)
    stage.reporter.update(1, stage.update(0))
    stage.done = 1
    stage.save()
    run(short_run(tmp_path / "cut", prompts), resume=True)
    whole, cut = ([line for line in lines(tmp_path / name) if "eval/scores" not in line] for name in ("whole", "cut"))
    assert json.dumps(cut) == json.dumps(whole)


SERVER = {**VLLM.options, "name": "vllm-server", "gpu_memory_utilization": 0.4}


@pytest.fixture(scope="module")
def policy_with_server():
    """A policy for tests that use the same server, started by the first of them and lost in the last."""
    return policy_of()


def test_a_server_gives_the_tokens_of_hf_and_follows_the_weights(policy_with_server, chat, questions):
    policy = policy_with_server
    sampler = SAMPLERS.pick(SERVER)
    greedy = SamplingParams(16, temperature=0)
    before = sampler(policy, questions, SEEDS, greedy, chat)
    assert before == hf(policy, questions, SEEDS, greedy, chat)
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05)
    waiting = start(sampler, policy, questions, SEEDS, SamplingParams(16), chat)
    assert sampler(policy, questions, SEEDS, greedy, chat) == hf(policy, questions, SEEDS, greedy, chat) != before
    for prompt, answer in zip(questions, waiting()):
        assert gap(policy, prompt, answer).abs().max() < 1e-4
    server = vllm_client._servers[policy]
    with pytest.raises(UserError, match="token"):
        vllm_client.SamplerServer(server.url, "guess").call("POST", "/sample")


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_server_that_dies_is_started_again_once_in_a_rollout(tuning, policy_with_server, chat, questions, capsys):
    policy = policy_with_server if tuning == "full" else policy_of(tuning=tuning, chat=chat)
    sampler = SAMPLERS.pick(SERVER)
    sampling = SamplingParams(16)
    expected = sampler(changed(policy, 0) if tuning == "lora" else policy, questions, SEEDS, sampling, chat)
    server = vllm_client._servers[policy]
    assert (server.base is not None) == (tuning == "lora")
    waiting = start(sampler, policy, questions, SEEDS, sampling, chat)
    if tuning == "full":  # the answers come from the weights that were sent, although there are newer ones
        policy.lm_head.weight.data.mul_(0.5)
    server.child.kill()
    assert waiting() == expected
    said = " ".join(capsys.readouterr().err.split())
    assert "was killed by signal 9" in said and said.endswith("it is started again")

    def launch_and_lose():
        child = subprocess.Popen(["sleep", "600"])  # a server takes long to start, and is to be lost at once
        child.kill()
        return server.url, child

    server.launch = launch_and_lose
    server.child.kill()
    with pytest.raises(UserError, match="was killed by signal 9"):
        sampler(policy, questions, SEEDS, sampling, chat)


def test_a_run_whose_server_dies_goes_on_exactly(tmp_path, prompts, monkeypatch):
    changes = {"rollout__sampler": SERVER, "tuning": "lora", "updates": 2}  # the server dies after each
    run(short_run(tmp_path / "whole", prompts, **changes))
    stage = PPO(short_run(tmp_path / "hit", prompts, **changes), False, False)
    learn = Learner.learn

    def learn_and_kill(*args):
        vllm_client._servers[stage.models.policy].child.kill()
        return learn(*args)

    monkeypatch.setattr(Learner, "learn", learn_and_kill)
    stage.train()
    whole, hit = (lines(tmp_path / name) for name in ("whole", "hit"))
    assert json.dumps(hit) == json.dumps(whole)


@pytest.fixture(scope="module")
def divided():
    """A server that a user started, with the model divided over two processes, and its address."""
    words = ["serve-sampler", tiny.of_family("llama", WIDE), "--port", "0", "--tensor-parallel", "2"]
    words += ["--dtype", "float32", "--enforce-eager", "--kv-cache-gib", "0.05", "--gpu-memory-utilization", "0.3"]
    environment = {**os.environ, "RLHF_SAMPLER_TOKEN": "a secret"}
    environment["PYTHONPATH"] = str(tiny.REPOSITORY)
    server = subprocess.Popen(
        [sys.executable, "-m", "stages.cli", *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    url = next(line.split()[-1] for line in server.stdout if line.startswith("Serving on"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_SAMPLER_TOKEN", "a secret")
        yield server, url
    server.terminate()
    server.communicate(timeout=60)


@pytest.fixture
def served(divided):
    """The options of a sampler with this server."""
    return {"name": "vllm-server", "url": divided[1]}


def test_sampling_ahead_on_a_divided_server_is_exact_to_repeat_and_to_resume(served, tmp_path, prompts):
    changes = {"rollout__sampler": served, "rollout__ahead": 1, "updates": 3}
    for name in ("whole", "again"):
        run(short_run(tmp_path / name, prompts, **changes))
    stage = PPO(short_run(tmp_path / "cut", prompts, **changes), False, False)
    stage.reporter.update(1, stage.update(0))
    stage.done = 1
    stage.save()
    run(short_run(tmp_path / "cut", prompts, **changes), resume=True)
    whole, *others = (
        [line for line in lines(tmp_path / name) if "eval/scores" not in line] for name in ("whole", "again", "cut")
    )
    assert all(json.dumps(other) == json.dumps(whole) for other in others)
    gaps = [line["rollout/sampler_gap_mean"] for line in updates(tmp_path / "whole")]
    assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:]), "from the second update on, the answers come from older weights"


TWO = """
import json
import sys
from pathlib import Path
from ppo_runs import config
from stages.ppo import run
folder, prompts, model, sampler, stage = sys.argv[1:]
options = json.loads(sampler)
changes = {"deepspeed": f"configs/deepspeed/zero{stage}.json"}
run(config(folder, prompts, model__path=model, rollout__sampler=options, **changes))
"""


@pytest.mark.parametrize("name, stage", [("vllm", 2), ("vllm", 3), ("vllm-server", 3)])
def test_two_processes_under_zero_sample_with_the_weights_of_every_update(name, stage, tmp_path, prompts, request):
    model = tiny.of_family("llama", WIDE)
    sampler = {"name": "vllm", **VLLM.options} if name == "vllm" else request.getfixturevalue("served")
    done = tiny.launch(2, TWO, str(tmp_path / "run"), prompts, model, json.dumps(sampler), str(stage))
    assert done.returncode == 0, done.stdout
    for line in updates(tmp_path / "run"):
        assert 0 < line["rollout/sampler_gap_max"] < 1e-4
        assert line["rollout/importance_truncated"] == 0


def test_a_divided_server_that_loses_a_process_ends_and_the_run_says_how_to_go_on(divided, served, chat, questions):
    """The last test here: it ends the server of the others."""
    policy, sampler = policy_of(), SAMPLERS.pick(served)
    sampler(policy, questions, SEEDS, SamplingParams(4), chat)
    server = divided[0]
    children = [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
    workers = [pid for pid in children if "Worker_TP" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    with pytest.raises(UserError, match="does not answer") as error:
        for _ in range(100):  # vLLM notices within a moment
            sampler(policy, questions, SEEDS, SamplingParams(4), chat)
    assert "rlhf serve-sampler" in error.value.remedy and "--resume" in error.value.remedy
    assert server.wait(timeout=60) == 2
