"""Finished runs of the tiny models, without training: what export, sample, evaluate and chat start from."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tokenizers import AddedToken
from typer.testing import CliRunner

from rlhf.config.base import ModelConfig
from rlhf.core.lazy_group import command_app
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Message
from rlhf.models.forward import hidden_states
from rlhf.models.load import load_policy, quiet
from rlhf.models.scalar import load_scalar
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.runs.parents import parent_facts, resolve_model_path
from rlhf.runs.run import finish, open_run
from rlhf.sft.config import SFTConfig
from rlhf.tuning.save import save_result

quiet()

DATA = [{"path": "demos", "kind": "demonstration", "fingerprint": "d" * 64}]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def chatml(ending: str = "") -> str:
    """The tiny Llama with a ChatML template, whose end of turn is not EOS, and without a padding token.

    `ending` is more of the template, after the last turn.
    """
    folder = Path(tiny.llama()).with_name(f"chatml-{zlib.crc32(ending.encode()):08x}")
    model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.llama())
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.pad_token, tokenizer.chat_template = None, CHATML + ending
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sft(path: Path, tuning: Any = "full", model: str | None = None, seed: int = 1) -> str:
    """A finished SFT run whose weights differ from the model it started from."""
    model = model or tiny.llama()
    config = SFTConfig(run=str(path), model={"path": model}, data={"train": "demos"}, tuning=tuning)
    return _finish(config, "sft", [model], {"eval/loss": 1.25, "eval/perplexity": 3.5}, seed)


def ppo(path: Path, parent: str, reward: str, seed: int = 2, **rollout: Any) -> str:
    """A finished PPO run that started from the run `parent`, with the reward run `reward`."""
    config = PPOConfig(
        run=str(path), model={"path": parent}, data={"prompts": "prompts"}, updates=1,
        reward={"name": "model", "path": reward}, rollout={"max_new_tokens": 12, **rollout},
    )  # fmt: skip
    return _finish(config, "ppo", [parent, reward], {"eval/scores": 0.5, "by_source": {"a": 1}}, seed)


def reward(
    path: Path, model: str | None = None, tuning: Any = "full", scale: tuple[float, float] = (0.5, 2.0), seed: int = 3
) -> str:
    """A finished reward run with a drawn head and these normalisation constants."""
    model = model or tiny.llama()
    config = RewardConfig(run=str(path), model={"path": model}, data={"train": "rankings"}, tuning=tuning)
    return _finish(config, "reward", [model], {"accuracy": 0.75}, seed, scale)


def _finish(config: Any, stage: str, parents: list[str], metrics: dict, seed: int, scale: Any = None) -> str:
    folder = resolve_model_path(config.model.path)
    chat = load_tokenizer(config.model, folder)
    facts = {"parents": [parent_facts(p) for p in parents], "data": DATA, **chat.fingerprints()}
    run = open_run(config, stage, False, False, facts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if stage == "reward":
            scalar = load_scalar(config.model, folder)
            scalar.set_scale(*scale)
            model = config.tuning(scalar.model, chat, "scalar")
        else:
            model = config.tuning(load_policy(config.model, folder), chat, "causal")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if stage != "reward" and config.tuning.name == "full":
            _let_answers_end(model, chat)
    save_result(run.path, model, chat, config.tuning)
    with contextlib.redirect_stdout(io.StringIO()):
        finish(run, metrics=metrics)
    return str(config.run)


@torch.no_grad()
def _let_answers_end(model: Any, chat: Any) -> None:
    """Give the token that ends an answer a probability of about 0.3 after a prompt."""
    ids = torch.tensor([chat.prompt([Message("user", "Hello!")])])
    state = hidden_states(model, ids, torch.ones_like(ids))[0, -1]
    words = model.get_output_embeddings().weight
    logits = words @ state
    words[chat.end_id] += (logits.logsumexp(0) - 1.2 - logits[chat.end_id]) * state / (state @ state)


def policy_logits(run: str, ids: torch.Tensor) -> torch.Tensor:
    """What the run's model itself gives, float32."""
    config = ModelConfig(path=run)
    with torch.no_grad():
        return load_policy(config, resolve_model_path(run)).eval()(input_ids=ids).logits


def reward_logits(run: str, ids: list[list[int]]) -> torch.Tensor:
    """What the transformers model in the run's reward model itself gives."""
    rows, mask = load_tokenizer(ModelConfig(path=run), resolve_model_path(run)).pad(ids)
    with torch.no_grad():
        return load_scalar(ModelConfig(path=run), resolve_model_path(run)).model.eval()(rows, mask).logits[:, 0]


def scores(run: str, texts: list[list[int]]) -> torch.Tensor:
    """What the run's reward model itself gives, normalised."""
    config = ModelConfig(path=run)
    scalar = load_scalar(config, resolve_model_path(run)).eval()
    ids, mask = load_tokenizer(config, resolve_model_path(run)).pad(texts)
    with torch.no_grad():
        return scalar(ids, mask)


def invoke(command: Any, *words: Any, stdin: str = "", program: str = "rlhf") -> tuple[str, str]:
    """Run a command function as `rlhf` mounts it; gives standard output and error. What it raises comes through."""
    app = command_app(command)
    given = [str(word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*program.split(), *given])
        result = CliRunner().invoke(app, given, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def last_json(text: str) -> dict[str, Any]:
    """The JSON object in the last line."""
    return json.loads(text.strip().splitlines()[-1])


def python_block(card: str) -> str:
    """The first Python snippet of a Markdown text."""
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found is not None
    return found[1]


def run_snippet(code: str) -> str:
    """What a Python snippet prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    return said.getvalue()


def score_of_answer(run: str, messages: list[dict[str, str]], answer: str) -> float:
    """The run's normalised score of an answer."""
    chat = load_tokenizer(ModelConfig(path=run), resolve_model_path(run))
    return float(scores(run, [chat.whole(messages, answer)])[0])
