"""Policy and critic as one module: one engine, one forward, one summed loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.models.logprobs import token_logprobs
from rlhf.models.scalar import ScalarModel
from rlhf.ppo.types import MicroBatch


class TokenOutputs(NamedTuple):
    """What a forward pass says of the asked-for tokens, row after row. float32 [n]. (ZeRO-3 looks into tuples.)"""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    """None where there is no critic."""
    ptx_logprobs: Tensor | None
    """[m] log-probs of the demonstrations' tokens at temperature 1, where demonstrations were given."""


class ActorCritic(nn.Module):
    """The policy, and beside it the critic where the advantage estimator needs one.

    One backward pass through one engine serves both: alternating backward passes over parts of one ZeRO-3 engine
    would train on stale gradients. With `critic=None` it also serves as the frozen reference.
    """

    def __init__(self, policy: nn.Module, critic: ScalarModel | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(self, batch: MicroBatch, temperature: float, ptx: MicroBatch | None = None) -> TokenOutputs:
        """Log-probs, entropies and values of the response tokens of a micro-batch; log-probs of a ptx batch."""
        ids, mask, wanted = batch.input_ids, batch.attention_mask, batch.response_mask
        positions = batch.position_ids
        logprobs, entropies = token_logprobs(self.policy, ids, mask, wanted, temperature, batch.chunks, positions)
        values = None
        if self.critic is not None:
            # The state in which token t is chosen ends at token t - 1.
            values = self.critic.token_values(ids, mask, positions)[:, :-1][wanted[:, 1:]]
        ptx_logprobs = None
        if ptx is not None:
            more = (ptx.input_ids, ptx.attention_mask, ptx.response_mask, 1.0, ptx.chunks, ptx.position_ids)
            ptx_logprobs, _ = token_logprobs(self.policy, *more)
        return TokenOutputs(logprobs, entropies, values, ptx_logprobs)


def compile_layers(module: nn.Module) -> None:
    """Compile each decoder layer where it stands, for any batch and length; names of weights stay as they are.

    Rollouts must run in `torch.compiler.set_stance("force_eager")`: a cache that grows would be compiled anew.
    """
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what transformers makes its models of
            layer.compile(dynamic=True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, adapter layers pass their input through the base alone: the policy is its own reference.

    Unlike PEFT's `disable_adapter` this leaves requires_grad as it is, which an engine has fixed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value
