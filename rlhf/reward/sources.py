"""The sources of PPO's scores: one table, REWARDS.

A row builds a source. A source is called with a batch of completed episodes and returns one score for each; higher is
better. A source with a method `with_disagreement` also returns how far its members disagree about each score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, PositiveFloat

from rlhf import distributed
from rlhf.core.lazy import torch
from rlhf.core.table import Pick, Table, options_of
from rlhf.judging.config import RewardJudgeConfig
from rlhf.reward.combining import COMBINATIONS, Combination, disagreement
from rlhf.reward.functions import FunctionName, call_reward_function, import_function

if TYPE_CHECKING:
    from rlhf.config.base import ModelConfig
    from rlhf.data.chat_tokenizer import ChatTokenizer

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


def scores_with_disagreement(source: Source, inputs: RewardInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores of a source, and the standard deviation of each over the members of its ensemble, float32 [B] both.

    The second is None for a source without an ensemble.
    """
    if hasattr(source, "with_disagreement"):
        return source.with_disagreement(inputs)
    return source(inputs), None


@REWARDS.row("model")
def model(context: RewardContext, *, path: str, retokenize: bool = False) -> Source:
    """The trained reward model of a run, or any model folder with a score head.

    `path` is a run or model folder. With `retokenize` a model with another tokenizer scores the text in its own.
    """
    from rlhf.models.scalar import load_scalar
    from rlhf.models.vocabulary import token_count
    from rlhf.runs.parents import resolve_model_path

    if path in context.shared:
        return context.shared[path]
    folder = resolve_model_path(path)
    config = context.model.model_copy(update={"path": path, "chat_template": "auto", "resize_embeddings": False})
    own = context.own_chats[path] if retokenize else None
    tokens = token_count((own or context.chat).tokenizer)
    loaded = load_scalar(config, folder, head="trained", tokens=tokens, as_stored=distributed.grouped())
    scalar = context.freeze(loaded)
    return lambda inputs: _model_scores(scalar, own, inputs)


def _model_scores(scalar: Any, own: ChatTokenizer | None, inputs: RewardInputs) -> torch.Tensor:
    """Scores of a frozen scalar model, on the CPU; with `own` it reads the text in the tokens of that tokenizer."""
    ids, mask = inputs.input_ids, inputs.attention_mask
    if own is not None:
        texts = [own.whole(m, a) for m, a in zip(inputs.messages, inputs.completions)]
        ids, mask = own.pad(texts, ids.device)
    with torch.no_grad():
        scores: torch.Tensor = scalar(ids, mask).float().cpu()
    return scores


def _several(models: list[str]) -> list[str]:
    if len(set(models)) < max(2, len(models)):
        raise ValueError("an ensemble needs at least two reward models, each named once")
    return models


Models = Annotated[list[str], AfterValidator(_several)]


@REWARDS.row("ensemble")
def ensemble(
    context: RewardContext, *, models: Models, combine: Combination = "mean", retokenize: bool = False
) -> Source:
    """Several reward models, such as runs with other seeds or other adapters on one base, as one (Coste et al. 2023).

    `models` are run or model folders; adapters on the same base share one copy of it. `combine` is `mean`, `min`,
    `mean-minus-std` or `mean-minus-variance`; with a factor: `{name: mean-minus-std, coef: 0.5}`. `retokenize` as for
    `model`.
    """
    return Ensemble(context, models, COMBINATIONS.pick(combine), retokenize)


class Ensemble:
    """A reward source whose score combines those of several reward models."""

    def __init__(self, context: RewardContext, models: Sequence[str], combine: Pick, retokenize: bool) -> None:
        from rlhf.models.vocabulary import token_count
        from rlhf.reward.members import ScalarGroup, load_members

        self.combine, self._models, self._shared = combine, list(models), context.shared
        chats = {path: context.own_chats[path] if retokenize else None for path in models}
        config = context.model.model_copy(update={"chat_template": "auto", "resize_embeddings": False})
        others = [path for path in models if path not in context.shared]
        loaded = load_members(
            config, others, lambda path: token_count((chats[path] or context.chat).tokenizer), distributed.grouped()
        )
        groups: dict[str, list[int]] = {}  # members that read the same tokens are one module
        for index, path in enumerate(others):
            own = chats[path]
            groups.setdefault("" if own is None else str(sorted(own.fingerprints().items())), []).append(index)
        self._groups = [
            (
                [others[i] for i in places],
                chats[others[places[0]]],
                context.freeze(ScalarGroup([loaded[i] for i in places])),
            )
            for places in groups.values()
        ]

    def members(self, inputs: RewardInputs) -> torch.Tensor:
        """The scores of all members, in their order in the config: float32 [B, M] on the CPU."""
        found = {path: self._shared[path](inputs) for path in self._models if path in self._shared}
        for paths, own, group in self._groups:
            found |= zip(paths, _model_scores(group, own, inputs).unbind(1))
        return torch.stack([found[path] for path in self._models], 1)

    def with_disagreement(self, inputs: RewardInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """See `scores_with_disagreement`."""
        members = self.members(inputs)
        return self.combine(members), disagreement(members)

    def __call__(self, inputs: RewardInputs) -> torch.Tensor:
        return self.with_disagreement(inputs)[0]


@REWARDS.row("function")
def function(context: RewardContext, *, function: FunctionName, timeout_seconds: PositiveFloat = 300.0) -> Source:
    """A Python function `module:function` of (prompt messages, completion text) that returns a number.

    A call that takes longer than `timeout_seconds` stops the run.
    """
    call = import_function(function)

    def score(inputs: RewardInputs) -> torch.Tensor:
        completions = zip(inputs.messages, inputs.completions)
        values = call_reward_function(call, function, completions, timeout_seconds)
        return torch.tensor(values, dtype=torch.float32)

    return score


def weighted_terms(reward: Pick) -> list[tuple[Pick, float]]:
    """The sources in a reward source and their weights: the terms of a sum, also of sums of sums, or the source."""
    if reward.name != "sum":
        return [(reward, 1.0)]
    terms = map(_term, reward.options["terms"])
    return [(one, outer * inner) for pick, outer in terms for one, inner in weighted_terms(pick)]


def model_terms(reward: Pick) -> list[dict[str, Any]]:
    """`path` and `retokenize` of each reward model in a reward source, also in ensembles and sums of sums."""
    found = []
    for pick, _ in weighted_terms(reward):
        if pick.name == "ensemble":
            found += [{"path": path, "retokenize": pick.options["retokenize"]} for path in pick.options["models"]]
        elif pick.name == "model":
            found.append(pick.options)
    return found


def own_chats(reward: Pick, model: ModelConfig, frozen_at: str | None = None) -> dict[str, ChatTokenizer]:
    """The tokenizers of the reward models that read text in their own tokens, by the path in the config.

    Their templates may refuse prompts that the policy's accepts. Control tokens of theirs that occur in a completion
    are scored as plain text.

    Args:
        reward: The reward source.
        model: The policy's config.
        frozen_at: The time that their templates' `strftime_now` returns.

    Raises:
        UserError: See `load_tokenizer`.
    """
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.runs.parents import resolve_model_path

    paths = [term["path"] for term in model_terms(reward) if term.get("retokenize")]
    config = model.model_copy(update={"chat_template": "auto", "control_tokens_in_text": "as_text"})
    return {
        path: load_tokenizer(config.model_copy(update={"path": path}), resolve_model_path(path), frozen_at)
        for path in dict.fromkeys(paths)
    }


@REWARDS.row("judge")
@options_of(RewardJudgeConfig)
def judge(context: RewardContext, **options: Any) -> Source:
    """Ratings from 1 to 10 by a model on a server with OpenAI's chat API.

    `agreement` is the file that `rlhf judge URL RANKINGS --kind rating --out FILE` has written for this judge; without
    it the judge is refused, unless `unmeasured` is true. `prompt` is a file with your own prompt, `server` has more
    limits (concurrency, requests_per_minute, max_cost, ...). An answer whose rating cannot be read gets 1.
    """
    from rlhf.judging.source import rating_source

    rate = rating_source(RewardJudgeConfig(**options))
    return lambda inputs: torch.tensor(rate(inputs.messages, inputs.completions), dtype=torch.float32)


def _terms(terms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not terms:
        raise ValueError("a sum needs at least one term")
    for term in terms:
        _term(term)
    return terms


def _term(term: Mapping[str, Any]) -> tuple[Pick, float]:
    """A term of a sum, and its weight."""
    values = dict(term)
    weight = values.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"weight {weight!r} is not a number")
    return REWARDS.pick(values), float(weight)


Terms = Annotated[list[dict[str, Any]], AfterValidator(_terms)]


@REWARDS.row("sum")
def weighted_sum(context: RewardContext, *, terms: Terms) -> Source:
    """A weighted sum of sources: `terms` is a list of rows, each with its options and a `weight` (1 by default)."""
    return WeightedSum([(weight, pick(context)) for pick, weight in map(_term, terms)])


class WeightedSum:
    """A reward source that is the weighted sum of others."""

    def __init__(self, parts: Sequence[tuple[float, Source]]) -> None:
        self._parts = parts

    def with_disagreement(self, inputs: RewardInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `scores_with_disagreement`. Ensembles in a sum count as independent: their variances are added."""
        found = [(weight, *scores_with_disagreement(source, inputs)) for weight, source in self._parts]
        total = torch.stack([weight * scores for weight, scores, _ in found]).sum(0)
        variances = [(weight * spread) ** 2 for weight, _, spread in found if spread is not None]
        return total, torch.stack(variances).sum(0).sqrt() if variances else None

    def __call__(self, inputs: RewardInputs) -> torch.Tensor:
        return self.with_disagreement(inputs)[0]
