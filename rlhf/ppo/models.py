"""The models of a PPO run behind one interface: policy and critic in one engine, and the frozen reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf import distributed
from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.adapters import is_adapter, virtual_tokens_of
from rlhf.models.attention import KERNEL, PACKED, VARLEN, switch
from rlhf.models.forward import (
    causal_lm,
    has_virtual_tokens,
    head_chunks,
    is_encoder_decoder,
    token_logprobs,
    token_values,
)
from rlhf.models.isolation import Text, packing_fault, windows
from rlhf.models.load import count_parameters, load_hf_config, load_policy, recompute_activations
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.models.vocabulary import check_vocabulary, mask_unknown_ids, token_count
from rlhf.ppo.batching import TokenRows
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.types import MicroBatch, TokenOutputs, TokenScores
from rlhf.reward.sources import RewardInputs, model_terms
from rlhf.runs.parents import resolve_model_path
from rlhf.training.engine import Engine, make_engine
from rlhf.tuning.merging import adapters_off
from rlhf.tuning.methods import virtual_tokens
from rlhf.tuning.save import save_result

# ---- policy and critic as one module ---------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """The policy, and the critic where the advantage estimator needs one.

    One backward pass through one engine serves both: alternating backward passes through parts of one ZeRO-3 engine
    would train on stale gradients. With `critic=None` it also serves as the frozen reference.
    """

    def __init__(self, policy: nn.Module, critic: ScalarModel | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self, batch: MicroBatch, temperature: float, ptx: MicroBatch | None = None, role: str = "policy"
    ) -> Any:
        """The outputs of a role for a micro-batch.

        Args:
            batch: Sequences and their response tokens.
            temperature: Logits are divided by it.
            ptx: Demonstrations, for the policy.
            role: `policy` (with the critic's values), `reference` (without), `base` (the policy without its adapter or
                virtual tokens, and without values) or `critic` (nothing but values).

        Returns:
            `TokenOutputs`; for `critic` the values, float32 [n].
        """
        ids, mask, wanted, positions = batch.input_ids, batch.attention_mask, batch.response_mask, batch.position_ids
        if role == "critic":
            return token_values(self.critic, ids, mask, wanted, positions)
        if role == "base":
            with adapters_off(self.policy) as base:
                return TokenOutputs(*policy_logprobs(base, batch, temperature), None, None)
        logprobs, entropies = policy_logprobs(self.policy, batch, temperature)
        values = ptx_logprobs = None
        if role == "policy" and self.critic is not None:
            values = token_values(self.critic, ids, mask, wanted, positions)
        if ptx is not None:
            ptx_logprobs, _ = policy_logprobs(self.policy, ptx, temperature=1.0)
        return TokenOutputs(logprobs, entropies, values, ptx_logprobs)


def policy_logprobs(policy: nn.Module, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats) of the response tokens of a micro-batch, float32 [n] each."""
    ids, mask, wanted, positions = batch.input_ids, batch.attention_mask, batch.response_mask, batch.position_ids
    # every chunk of the head is a collective operation under ZeRO-3, so all ranks need the same number
    chunks = head_chunks(batch.most_tokens, causal_lm(policy).config.get_text_config().vocab_size)
    return token_logprobs(policy, ids, mask, wanted, temperature, chunks, positions)[:2]


def compile_layers(module: nn.Module) -> None:
    """Compile each decoder layer in place, for any batch and length; names of weights stay as they are.

    Rollouts must run in `torch.compiler.set_stance("force_eager")`: a growing cache would be compiled again and again.
    """
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # the base class of transformers' decoder layers
            layer.compile(dynamic=True)


# ---- one interface for all roles -------------------------------------------------------------------------------------


class Models(ABC):
    """The interface between the PPO stage and its models. `SeparateModels` holds one model per role, `SharedModels`
    (`rlhf.ppo.shared_base`) one base with an adapter per role."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        module: Any = engine.module
        self.policy: Any = module.policy
        self.critic: ScalarModel | None = module.critic

    @property
    def scorers(self) -> Mapping[str, Callable[[RewardInputs], Tensor]]:
        """Reward models among these models, by their path in the config."""
        return {}

    @property
    def frozen(self) -> list[nn.Module]:
        """Models outside of the engine."""
        return []

    def with_frozen_states(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch with the hidden states after the frozen lower layers, where these can be shared."""
        return batch

    @abstractmethod
    def reference(self, batch: MicroBatch, temperature: float) -> TokenOutputs:
        """Outputs of the frozen reference; no values."""

    def token_scores(self, batch: MicroBatch, temperature: float, policy: bool = True) -> TokenScores:
        """Policy, critic and reference on a micro-batch. With `policy=False` the policy's pass is left out."""
        if policy:
            mine = self.engine.forward(batch, temperature)
            logprobs, entropies, values = mine.logprobs, mine.entropies, mine.values
        else:
            logprobs = entropies = None
            values = None if self.critic is None else self.engine.forward(batch, temperature, role="critic")
        return TokenScores(logprobs, self.reference(batch, temperature).logprobs, entropies, values)

    def save(self, run: Path, chat: ChatTokenizer, config: PPOConfig) -> None:
        """Write the result into the run folder; every rank calls it."""
        save_result(run, self.policy, chat, config.tuning)


class SeparateModels(Models):
    """A model per role. Without `frozen_reference` the policy without its adapter is the reference; that
    is right only where the adapter was new."""

    def __init__(self, engine: Engine, frozen_reference: Any = None) -> None:
        super().__init__(engine)
        self._frozen_reference = frozen_reference

    @property
    def frozen(self) -> list[nn.Module]:
        return [] if self._frozen_reference is None else [self._frozen_reference]

    def reference(self, batch: MicroBatch, temperature: float) -> TokenOutputs:
        outputs: TokenOutputs
        if self._frozen_reference is not None:
            outputs = self._frozen_reference(batch, temperature, role="reference")
        else:
            outputs = self.engine.forward(batch, temperature, role="base")
        return outputs


def check_vocabularies(config: PPOConfig, chat: ChatTokenizer) -> None:
    """Check every model that gets the policy's token ids, before any weights are loaded.

    Raises:
        UserError: A model's embedding lacks rows for some of the tokenizer's ids.
    """
    picks = (config.reward, *config.onlookers.values())
    scorers = [term["path"] for pick in picks for term in model_terms(pick) if not term.get("retokenize")]
    if config.needs_critic and config.critic.init == "reward":
        scorers.append(str(config.reward_model))
    fixed = config.model.model_copy(update={"resize_embeddings": False})
    for path, settings in ((config.model.path, config.model), *((path, fixed) for path in dict.fromkeys(scorers))):
        folder = resolve_model_path(path)
        check_vocabulary(settings, load_hf_config(settings, folder), path, token_count(chat.tokenizer))


def load_separate(config: PPOConfig, chat: ChatTokenizer) -> SeparateModels:
    """Policy and critic in one engine, and the frozen reference."""
    path = resolve_model_path(config.model.path)
    tokens = token_count(chat.tokenizer)
    policy = config.tuning(_masked_policy(config, path, tokens), chat, "causal")
    critic: ScalarModel | None = None
    if config.needs_critic:
        start = resolve_model_path(str(config.reward_model)) if config.critic.init == "reward" else path
        critic = load_scalar(config.model, start, head="small", tokens=tokens, as_stored=distributed.grouped())
        critic.model = config.critic.tuning(critic.model, chat, "scalar")
    if config.gradient_checkpointing:
        for part in [policy] if critic is None else [policy, critic.model]:
            recompute_activations(part, use_reentrant=False)
            part.train()  # transformers recomputes only in training mode; dropout is off, so nothing else changes
    rates = ((policy, config.optimizer.policy_lr), (critic, config.optimizer.critic_lr))
    groups = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": lr} for m, lr in rates if m is not None]
    module = ActorCritic(policy, critic)
    if config.compile:
        compile_layers(module)
    trained, total = count_parameters(module)
    say(f"Policy{' and critic' if critic else ', no critic'}: {trained:,} of {total:,} parameters are trained")
    engine = make_engine(module, groups, config.optimizer, config.precision, config.deepspeed)
    if config.tuning.row.traits["adapter"] and not is_adapter(path):
        return SeparateModels(engine)
    return SeparateModels(engine, engine.freeze(ActorCritic(_masked_policy(config, path, tokens), None)))


def _masked_policy(config: PPOConfig, path: str, tokens: int) -> Any:
    policy = load_policy(config.model, path, tokens=tokens, as_stored=distributed.grouped())
    mask_unknown_ids(policy, tokens)
    return policy


# ---- packing -------------------------------------------------------------------------------------------------------


def can_pack(models: Models, vocab_size: int, longest: int, wanted: bool | None) -> bool:
    """Whether micro-batches are packed; tested on the models (see `rlhf.models.isolation`). Every rank calls it.

    If so, models with the attention `sdpa` get `sdpa_packed` on a CPU.

    Args:
        models: The models of the run.
        vocab_size: The policy's vocabulary size.
        longest: Tokens of the longest sequence of the run.
        wanted: True, False, or None for where it is known to be faster: an attention with variable lengths, or `sdpa`
            on a CPU.

    Raises:
        UserError: Packing is wanted, but packed sequences of this model are not isolated.
    """
    policy, engine = models.policy, models.engine
    if is_encoder_decoder(policy):
        if wanted:
            raise UserError("batch.packing: does not work with encoder-decoders", remedy="Leave it out.")
        return False
    if has_virtual_tokens(policy) or (models.critic is not None and has_virtual_tokens(models.critic.model)):
        return False  # PPOConfig refuses `wanted`
    attention = policy.config._attn_implementation
    one_by_one = attention == "sdpa" and distributed.device().type == "cpu" and hasattr(torch.ops.aten, KERNEL)
    if wanted is False or (wanted is None and not one_by_one and attention not in VARLEN):
        return False
    switched = [engine.module, *models.frozen] if one_by_one else []
    for model in switched:
        switch(model, "sdpa", PACKED)
    fault = _packing_fault(models, vocab_size, longest)
    faults = distributed.all_max(torch.tensor(float(fault is not None), device=distributed.device()))
    packed = not faults.item()  # the same on every rank
    if not packed:
        for model in switched:
            switch(model, PACKED, "sdpa")
    if wanted and not packed:
        raise UserError(
            f"batch.packing: with attention {attention!r}, packed sequences of {type(policy).__name__}"
            f" {fault or 'are not isolated on another process'}",
            remedy="Leave batch.packing out: padding of similar lengths costs little.",
        )
    return packed


def _packing_fault(models: Models, vocab_size: int, longest: int) -> str | None:
    """Why the trained models cannot pack; see `packing_fault`."""
    engine: Any = models.engine
    configs = [models.policy.config, *([] if models.critic is None else [models.critic.config])]
    sizes = [size for config in configs for size in windows(config)]
    whole = {p.dtype for p in engine.module.parameters() if p.is_floating_point()} == {torch.float32}
    calls = [(engine.forward, engine.dtype)]
    if engine.dtype != torch.float32 and whole and configs[0]._attn_implementation not in VARLEN:
        calls.append((engine.module, torch.float32))  # without autocast: its rounding hides small faults
    for call, dtype in calls:

        def outputs(texts: Sequence[Text], packed: bool, call: Any = call) -> list[Tensor]:
            rows, everything = TokenRows(texts, 0, packed), list(range(len(texts)))
            found: TokenOutputs = call(*rows.micro_batches([[everything]] * distributed.world_size()), 1.0)
            return [found.logprobs, *([] if found.values is None else [found.values])]

        fault = packing_fault(outputs, vocab_size, longest, sizes, dtype)
        if fault is not None:
            return fault
    return None


def most_virtual_tokens(config: PPOConfig) -> int:
    """The most positions that virtual tokens use in a model that reads the policy's token ids."""
    tunings = [config.tuning, *([config.critic.tuning] if config.needs_critic else [])]
    picks = (config.reward, *config.onlookers.values())
    terms = [term for pick in picks for term in model_terms(pick)]
    scorers = [term["path"] for term in terms if not term.get("retokenize")]
    return max(*map(virtual_tokens, tunings), *(virtual_tokens_of(resolve_model_path(path)) for path in scorers), 0)
