"""The models of a PPO run behind one interface: policy and critic in one engine, and the frozen reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.load import count_parameters, load_policy, recompute_activations
from rlhf.models.packed_attention import KERNEL, PACKED, VARLEN, switch
from rlhf.models.save import save_result
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.ppo.actor_critic import ActorCritic, TokenOutputs, adapters_off, compile_layers
from rlhf.ppo.batching import TokenRows
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.types import MicroBatch, TokenScores
from rlhf.reward.sources import RewardInputs
from rlhf.runs.run import resolve_model_path
from rlhf.training.engine import Engine, make_engine


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
        """Reward models that are part of these models, by the path that the config gives."""
        return {}

    @property
    def frozen(self) -> list[nn.Module]:
        """Models outside of the engine."""
        return []

    def with_frozen_states(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch with the hidden states of the frozen lower layers, where these can be shared."""
        return batch

    @abstractmethod
    def reference(self, batch: MicroBatch, temperature: float) -> TokenOutputs:
        """Outputs of the frozen reference; no values."""

    def token_scores(self, batch: MicroBatch, temperature: float) -> TokenScores:
        """Policy, critic and reference on a micro-batch."""
        mine = self.engine(batch, temperature)
        return TokenScores(mine.logprobs, self.reference(batch, temperature).logprobs, mine.entropies, mine.values)

    def save(self, run: Path, chat: ChatTokenizer, config: PPOConfig) -> None:
        """Write the result into the run folder; every rank calls it."""
        save_result(run, self.policy, chat, config.tuning)


class SeparateModels(Models):
    """A model per role. Without `frozen_reference` the policy with its adapters off is the reference."""

    def __init__(self, engine: Engine, frozen_reference: Any = None) -> None:
        super().__init__(engine)
        self._frozen_reference = frozen_reference

    @property
    def frozen(self) -> list[nn.Module]:
        return [] if self._frozen_reference is None else [self._frozen_reference]

    def reference(self, batch: MicroBatch, temperature: float) -> TokenOutputs:
        outputs: TokenOutputs
        if self._frozen_reference is not None:
            outputs = self._frozen_reference(batch, temperature)
        else:
            with adapters_off(self.policy):
                outputs = self.engine(batch, temperature, values=False)
        return outputs


def load_separate(config: PPOConfig, chat: ChatTokenizer) -> SeparateModels:
    """Policy and critic in one engine, and the frozen reference."""
    path = resolve_model_path(config.model.path)
    policy = config.tuning(load_policy(config.model, path), chat, "causal")
    critic: ScalarModel | None = None
    if config.needs_critic:
        start = resolve_model_path(str(config.reward_model)) if config.critic.init == "reward" else path
        critic = load_scalar(config.model, start, head="small")
        critic.model = config.critic.tuning(critic.model, chat, "scalar")
    if config.gradient_checkpointing:
        for part in [policy] if critic is None else [policy, critic.model]:
            recompute_activations(part, use_reentrant=False)
            part.train()  # transformers recomputes in training mode alone; dropout is off, so nothing else changes
    rates = ((policy, config.optimizer.policy_lr), (critic, config.optimizer.critic_lr))
    groups = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": lr} for m, lr in rates if m is not None]
    module = ActorCritic(policy, critic)
    if config.compile:
        compile_layers(module)
    trained, total = count_parameters(module)
    say(f"Policy{' and critic' if critic else ', no critic'}: {trained:,} of {total:,} parameters are trained")
    engine = make_engine(module, groups, config.optimizer, config.precision, config.deepspeed)
    if config.tuning.row.traits["adapter"]:
        return SeparateModels(engine)
    return SeparateModels(engine, engine.freeze(ActorCritic(load_policy(config.model, path), None)))


# ---- packing -------------------------------------------------------------------------------------------------------


def can_pack(models: Models, vocab_size: int, wanted: bool | None) -> bool:
    """Whether micro-batches are packed; tested on two short sequences. Every rank calls it together.

    If so, models with the attention `sdpa` get `sdpa_packed` on a CPU.

    Args:
        models: The models of the run.
        vocab_size: The policy's vocabulary size.
        wanted: True, False, or None for where it is known to be faster: an attention with variable lengths, or `sdpa`
            on a CPU.

    Raises:
        UserError: Packing is wanted, but packed sequences attend to each other in this model.
    """
    policy, engine = models.policy, models.engine
    attention = policy.config._attn_implementation
    one_by_one = attention == "sdpa" and distributed.device().type == "cpu" and hasattr(torch.ops.aten, KERNEL)
    if wanted is False or (wanted is None and not one_by_one and attention not in VARLEN):
        return False
    switched = [engine.module, *models.frozen] if one_by_one else []
    for model in switched:
        switch(model, "sdpa", PACKED)
    separated = _separated(engine, vocab_size)
    if not separated:
        for model in switched:
            switch(model, PACKED, "sdpa")
    if wanted and not separated:
        raise UserError(
            f"batch.packing: with attention {attention!r}, packed sequences of {type(policy).__name__} attend to each"
            " other",
            remedy="Leave batch.packing out: padding of similar lengths costs little.",
        )
    return separated


@torch.no_grad()
def _separated(engine: Engine, vocab_size: int) -> bool:
    """Whether two packed sequences get the same log-probs and values as one sequence per row."""
    ids = [(place * 37 + 11) % vocab_size for place in range(9)]
    rows = [(ids[:4], [False, True, True, True]), (ids[4:], [False, True, True, True, True])]
    try:
        packed, padded = (
            engine(*TokenRows(rows, 0, vocab_size, packed).micro_batches([[[0, 1]]] * distributed.world_size()), 1.0)
            for packed in (True, False)
        )
    except Exception:  # families raise different errors for lengths in place of a mask
        return False
    precision = max(1e-5, 8 * torch.finfo(engine.dtype).eps)
    pairs = [(packed.logprobs, padded.logprobs), (packed.values, padded.values)]
    return all(torch.allclose(a, b, rtol=0, atol=precision * float(b.abs().max())) for a, b in pairs if b is not None)
