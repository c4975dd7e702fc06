"""Comparisons that show whether a model family is computed right here: tokens, logits, padding, packing, sharing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.schema import Message
from rlhf.models.classifiers import HEAD_FILE
from rlhf.models.load import load_policy
from rlhf.models.scalar import ScalarModel, load_scalar, reward_scale
from rlhf.ppo.batching import TokenRows
from rlhf.ppo.config import PPOOptimizerConfig
from rlhf.ppo.models import ActorCritic, SeparateModels, can_pack
from rlhf.runs.parents import resolve_model_path
from rlhf.training.engine import Engine

CLOSE = 1e-4
"""Largest difference that counts as rounding, as a fraction of the largest number compared."""
LENGTHS = (40, 3, 25, 7)
"""Tokens of the texts that are compared; the longest one is longer than the windows of a tiny copy."""


class Different(Exception):
    """Two ways to compute the same thing disagree; the message says how far."""


def prompt_tokens(chat: ChatTokenizer) -> str:
    """Compare prompts with `apply_chat_template` of plain transformers, for one to five turns.

    Raises:
        Different: The tokens of a conversation are others.
        UserError: The template refuses all of the conversations.
    """
    turns = [Message("user", "What does the cat do?"), Message("assistant", "It sleeps in the house.")] * 3
    conversations = {name: turns[:count] for name, count in (("one turn", 1), ("three", 3), ("five", 5))}
    conversations["a system turn"] = [Message("system", "Answer briefly."), turns[0]]
    same: list[str] = []
    refused: list[str] = []
    for name, messages in conversations.items():
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            expected = chat.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        except Exception:  # templates may raise anything
            refused.append(name)
            continue
        ids, expected, tokens = chat.prompt(messages), list(expected), chat.tokenizer.convert_ids_to_tokens
        if ids != expected:
            at = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
            ours, theirs = tokens(ids[at : at + 3]), tokens(expected[at : at + 3])
            raise Different(f"{name}: from token {at} on {ours}, but the template gives {theirs}")
        same.append(name)
    if not same:
        raise UserError("the chat template refuses every conversation that was tried")
    return f"as the template's: {', '.join(same)}" + (
        f"; refused by the template: {', '.join(refused)}" * bool(refused)
    )


def policy_logits(run: str, exported: Path, trust_remote_code: bool = False) -> str:
    """Compare an exported policy in plain transformers, text by text, with the run's own, padded.

    Raises:
        Different: The log-probs of a token differ by more than rounding.
    """
    ours = load_policy(*_model(run, trust_remote_code)).eval()
    plain = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=trust_remote_code, dtype=torch.float32)
    rows = _rows(ours.config.get_text_config().vocab_size)
    engine = _engine(ActorCritic(ours, None))
    with torch.no_grad():
        padded = _outputs(engine, rows, False, [[0, 1, 2, 3]])[0]
        logits = [plain.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids, _ in rows]
    expected = [
        one.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] for one, (ids, _) in zip(logits, rows)
    ]
    return _same("log-probs", padded, torch.cat(expected))


def reward_scores(run: str, exported: Path, trust_remote_code: bool = False) -> str:
    """Compare an exported reward model in plain transformers, text by text, with the run's own, padded.

    Raises:
        Different: The scores of a text differ by more than rounding.
    """
    model = _model(run, trust_remote_code)
    scalar, chat = load_scalar(*model, head="trained").eval(), load_tokenizer(*model)
    options = {"trust_remote_code": trust_remote_code, "dtype": torch.float32}
    head = exported / HEAD_FILE
    kind = AutoModel if head.is_file() else AutoModelForSequenceClassification
    plain = kind.from_pretrained(exported, **options).eval()
    mean, std = reward_scale(exported)
    special = {chat.pad_id, plain.config.get_text_config().pad_token_id}
    texts = [[i + 1 if i in special else i for i in ids] for ids, _ in _rows(len(chat.tokenizer))]
    with torch.no_grad():
        found = scalar(*chat.pad(texts))
        outputs = [plain(input_ids=torch.tensor([ids])) for ids in texts]
        if head.is_file():
            weight = load_file(head)["score.weight"][0].float()
            logits = torch.stack([output.last_hidden_state[0, -1].float() @ weight for output in outputs])
        else:
            logits = torch.cat([output.logits[0].float() for output in outputs])
    return _same("scores", found, (logits - mean) / std)


def packing(policy_run: str, reward_run: str | None, trust_remote_code: bool = False) -> str:
    """Compare packed sequences with sequences in a row each, of the policy and of a critic from the reward model.

    Raises:
        Different: They differ, although the test that PPO makes finds them isolated.
        UserError: PPO refuses to pack this model; it pads.
    """
    policy = load_policy(*_model(policy_run, trust_remote_code))
    critic = load_scalar(*_model(reward_run, trust_remote_code), head="small") if reward_run is not None else None
    engine = _engine(ActorCritic(policy, critic))
    vocab_size = policy.config.get_text_config().vocab_size
    can_pack(SeparateModels(engine), vocab_size, max(LENGTHS) + 24, True)
    with torch.no_grad():
        packed = _outputs(engine, _rows(vocab_size), True, [[0, 1, 2, 3]])
        alone = _outputs(engine, _rows(vocab_size), False, [[0], [1], [2], [3]])
    return "; ".join(_same(*pair) for pair in zip(("log-probs", "values"), packed, alone))


def shared_prompts(run: str, trust_remote_code: bool = False) -> str:
    """Whether the answers of a ranking can share a row with their prompt; the reward stage makes the same test.

    Raises:
        UserError: They cannot: each answer is encoded with its prompt.
    """
    scalar: ScalarModel = load_scalar(*_model(run, trust_remote_code), head="small")
    if not scalar.shared_prompts.max_length:
        raise UserError("the answers of a ranking see each other, so each is encoded with its prompt")
    return "the answers of a ranking share a row with their prompt"


# ---- parts ---------------------------------------------------------------------------------------------------------


def _model(run: str, trust_remote_code: bool) -> tuple[ModelConfig, str]:
    return ModelConfig(path=run, trust_remote_code=trust_remote_code), resolve_model_path(run)


def _engine(module: ActorCritic) -> Engine:
    groups = [{"params": list(module.parameters()), "lr": 0.0}]
    return Engine(module.eval(), groups, PPOOptimizerConfig(), "float32")


def _rows(vocab_size: int) -> list[tuple[list[int], list[bool]]]:
    return [
        ([(place * 37 + size * 5) % vocab_size for place in range(size)], [False] + [True] * (size - 1))
        for size in LENGTHS
    ]


def _outputs(engine: Engine, rows: Any, packed: bool, shares: Sequence[list[int]]) -> list[Tensor]:
    """Log-probs of all rows, and values where there is a critic."""
    found = [engine.forward(TokenRows(rows, 0, packed).micro_batches([[share]])[0], 1.0) for share in shares]
    columns = [[one.logprobs for one in found], [one.values for one in found]]
    return [torch.cat(column).cpu() for column in columns if column[0] is not None]


def _same(what: str, found: Tensor, expected: Tensor) -> str:
    difference = float((found.cpu() - expected.cpu()).abs().max())
    if not difference <= CLOSE * max(1.0, float(expected.abs().max())):
        raise Different(f"{what} differ by up to {difference:.2g}")
    return f"{what} differ by at most {difference:.1g}"
