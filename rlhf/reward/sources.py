"""The sources of PPO's scores: one table, REWARDS.

A row builds a source. A source is called with a batch of completed episodes and returns one score for each; higher is
better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, PositiveFloat

from rlhf import distributed
from rlhf.core.lazy import lazy
from rlhf.core.table import Pick, Table
from rlhf.reward.functions import FunctionName, call_reward_function, import_function

if TYPE_CHECKING:
    import torch

    from rlhf.config.base import ModelConfig
    from rlhf.data.chat_tokenizer import ChatTokenizer
else:
    torch = lazy("torch")

REWARDS = Table("reward source")


@dataclass(frozen=True)
class RewardInputs:
    """Completed episodes as a reward source gets them."""

    messages: Sequence[list[dict[str, str]]]
    """The prompts' messages."""
    completions: Sequence[str]
    """The completions' text."""
    input_ids: torch.Tensor
    """int64 [B, T], prompt and completion in the policy's tokens, padded on the right."""
    attention_mask: torch.Tensor
    """int64 [B, T], 1 at tokens."""
    frozen_states: torch.Tensor | None = None
    """[B, T, H] cached hidden states that enter the first layer with adapters, if the reward model shares the base."""


@dataclass(frozen=True)
class RewardContext:
    """What is needed to build a source."""

    model: ModelConfig
    chat: ChatTokenizer
    freeze: Callable[[Any], Any]
    """Freezes a model and moves it to this process's device (or divides it among the ranks)."""
    shared: Mapping[str, Source] = field(default_factory=dict)
    """Reward models on the policy's base, which exist already, by their path."""
    own_chats: Mapping[str, ChatTokenizer] = field(default_factory=dict)
    """The tokenizers of reward models with `retokenize`, by their path; see `own_chats`."""


Source = Any
"""A callable: RewardInputs -> float32 [B] on the CPU."""


@REWARDS.row("model")
def model(context: RewardContext, *, path: str, retokenize: bool = False) -> Source:
    """The trained reward model of a run, or any model folder with a score head.

    `path` is a run or model folder. With `retokenize` a model with another tokenizer scores the text in its own.
    """
    from rlhf.models.scalar import load_scalar
    from rlhf.models.vocabulary import token_count
    from rlhf.runs.run import resolve_model_path

    if path in context.shared:
        return context.shared[path]
    folder = resolve_model_path(path)
    config = context.model.model_copy(update={"path": path, "chat_template": "auto", "resize_embeddings": False})
    own = context.own_chats[path] if retokenize else None
    tokens = token_count((own or context.chat).tokenizer)
    loaded = load_scalar(config, folder, head="trained", tokens=tokens, as_stored=distributed.grouped())
    scalar = context.freeze(loaded)

    def score(inputs: RewardInputs) -> torch.Tensor:
        ids, mask = inputs.input_ids, inputs.attention_mask
        if own is not None:
            texts = [own.whole(m, a) for m, a in zip(inputs.messages, inputs.completions)]
            ids, mask = own.pad(texts, ids.device)
        with torch.no_grad():
            return scalar(ids, mask).float().cpu()

    return score


@REWARDS.row("function")
def function(context: RewardContext, *, function: FunctionName, timeout_seconds: PositiveFloat = 300.0) -> Source:
    """A Python function `module:function` of (prompt messages, completion text) that returns a number.

    A call that takes longer than `timeout_seconds` stops the run.
    """
    call = import_function(function)

    def score(inputs: RewardInputs) -> torch.Tensor:
        values = [
            call_reward_function(call, function, messages, answer, timeout_seconds)
            for messages, answer in zip(inputs.messages, inputs.completions)
        ]
        return torch.tensor(values, dtype=torch.float32)

    return score


def model_terms(reward: Pick) -> list[dict[str, Any]]:
    """The options of each reward model in a reward source, also in sums of sums."""
    if reward.name == "sum":
        picks = [REWARDS.pick({k: v for k, v in t.items() if k != "weight"}) for t in reward.options["terms"]]
        return [term for pick in picks for term in model_terms(pick)]
    return [reward.options] if reward.name == "model" else []


def own_chats(reward: Pick, model: ModelConfig, frozen_at: str | None = None) -> dict[str, ChatTokenizer]:
    """The tokenizers of the reward models that read text in their own tokens, by the path in the config.

    Their templates may refuse prompts that the policy's accepts. A completion that spells one of their control tokens
    is scored as that text.

    Args:
        reward: The reward source.
        model: The policy's config.
        frozen_at: The time that their templates' `strftime_now` gives.

    Raises:
        UserError: See `load_tokenizer`.
    """
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.runs.run import resolve_model_path

    paths = [term["path"] for term in model_terms(reward) if term.get("retokenize")]
    config = model.model_copy(update={"chat_template": "auto", "control_tokens_in_text": "as_text"})
    return {
        path: load_tokenizer(config.model_copy(update={"path": path}), resolve_model_path(path), frozen_at)
        for path in dict.fromkeys(paths)
    }


def _terms(terms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not terms:
        raise ValueError("a sum needs at least one term")
    for term in terms:
        weight = term.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"weight {weight!r} is not a number")
        REWARDS.pick({key: value for key, value in term.items() if key != "weight"})
    return terms


Terms = Annotated[list[dict[str, Any]], AfterValidator(_terms)]


@REWARDS.row("sum")
def weighted_sum(context: RewardContext, *, terms: Terms) -> Source:
    """A weighted sum of sources: `terms` is a list of rows, each with its options and a `weight` (1 by default)."""
    parts = [(t.get("weight", 1.0), REWARDS.pick({k: v for k, v in t.items() if k != "weight"})) for t in terms]
    sources = [(float(weight), pick(context)) for weight, pick in parts]

    def score(inputs: RewardInputs) -> torch.Tensor:
        return torch.stack([weight * source(inputs) for weight, source in sources]).sum(0)

    return score
