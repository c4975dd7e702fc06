"""Policy and critic as one module: one engine, one forward pass, one summed loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.models.logprobs import causal_lm, has_virtual_tokens, token_logprobs
from rlhf.models.scalar import ScalarModel
from rlhf.ppo.types import MicroBatch


class TokenOutputs(NamedTuple):
    """Outputs for the tokens that a micro-batch asks for, row after row. float32 [n]."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    """None without a critic."""
    ptx_logprobs: Tensor | None
    """[m] log-probs of the demonstrations' tokens at temperature 1, where demonstrations were given."""


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
        if role == "critic":
            assert self.critic is not None
            return critic_values(self.critic, batch)
        if role == "base":
            with adapters_off(self.policy) as base:
                return TokenOutputs(*policy_logprobs(base, batch, temperature), None, None)
        logprobs, entropies = policy_logprobs(self.policy, batch, temperature)
        values = critic_values(self.critic, batch) if role == "policy" and self.critic is not None else None
        ptx_logprobs = None if ptx is None else policy_logprobs(self.policy, ptx, temperature=1.0)[0]
        return TokenOutputs(logprobs, entropies, values, ptx_logprobs)


def policy_logprobs(policy: nn.Module, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (nats) of the response tokens of a micro-batch, float32 [n] each."""
    ids, mask, wanted = batch.input_ids, batch.attention_mask, batch.response_mask
    return token_logprobs(policy, ids, mask, wanted, temperature, batch.chunks, batch.position_ids)


def critic_values(critic: ScalarModel, batch: MicroBatch) -> Tensor:
    """Values of the states in which the response tokens of a micro-batch were chosen, float32 [n]."""
    return critic.response_values(batch.input_ids, batch.attention_mask, batch.response_mask, batch.position_ids)


def compile_layers(module: nn.Module) -> None:
    """Compile each decoder layer in place, for any batch and length; names of weights stay as they are.

    Rollouts must run in `torch.compiler.set_stance("force_eager")`: a growing cache would be compiled again and again.
    """
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # the base class of transformers' decoder layers
            layer.compile(dynamic=True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context adapter layers pass their input through the base alone: the policy is its own reference.

    Gives the model to call: the base itself where virtual tokens precede the text. Unlike PEFT's `disable_adapter` this
    leaves requires_grad unchanged, because an engine depends on it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield causal_lm(model) if has_virtual_tokens(model) else model
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value
