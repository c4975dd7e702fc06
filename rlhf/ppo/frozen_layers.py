"""The frozen trunk: where all adapters sit in the upper layers, what enters these is alike for all roles and epochs.

It is computed once per rollout, in one pass of the lower layers, and kept in the host's memory: tokens x hidden size x
bytes of a number. All other passes run the upper layers alone. The model's own body is called all the same, so
positions, masks and norms stay its own; layers that are not to run have stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf import distributed
from rlhf.models.logprobs import causal_lm, hidden_states
from rlhf.models.packed_attention import sequence_lengths
from rlhf.models.tuning import layers_of
from rlhf.ppo.types import MicroBatch


class _StandIn(nn.Module):
    """In the place of a layer that is not to run: gives `states`, or what it got."""

    def __init__(self, layer: nn.Module, states: Tensor | None = None) -> None:
        super().__init__()
        self.states, self.seen = states, torch.empty(0)
        self.__dict__["layer"] = layer  # not a child

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.states is None else self.states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # what a body asks of its layers, such as `attention_type`


class FrozenLayers:
    """The lower layers of a model with adapters.

    Args:
        model: PEFT's wrapper around a causal LM, with all of its adapters.
    """

    def __init__(self, model: Any) -> None:
        self.layers: Any = layers_of(causal_lm(model))[1]
        self.depth = self._frozen(model)
        if self.depth and not self._agrees(model):
            self.depth = 0

    depth: int
    """How many layers it has; 0 where the first layer has an adapter, or the model cannot go on from the middle."""

    def states(self, encode: Callable[[], Any]) -> Tensor:
        """The hidden states that enter the upper layers when `encode` calls the model. [B, L, H]"""
        stand_ins = {i: _StandIn(self.layers[i]) for i in range(self.depth, len(self.layers))}
        with self._replaced(stand_ins):
            encode()
        return stand_ins[self.depth].seen

    @contextmanager
    def known(self, states: Tensor | None) -> Iterator[None]:
        """Inside, the model goes on from `states` [B, L, H], whatever it is called with; from the start where None."""
        if states is None:
            yield
            return
        with self._replaced({i: _StandIn(self.layers[i], states) for i in range(self.depth)}):
            yield

    @contextmanager
    def _replaced(self, stand_ins: Mapping[int, nn.Module]) -> Iterator[None]:
        own = {i: self.layers[i] for i in stand_ins}
        try:
            for i, module in stand_ins.items():
                self.layers[i] = module
            yield
        finally:
            for i, module in own.items():
                self.layers[i] = module

    def _frozen(self, model: nn.Module) -> int:
        """Layers below the first one with an adapter; 0 where an adapter is outside of the layers."""
        adapted = {module for module in model.modules() if isinstance(module, BaseTunerLayer)}
        inside = [adapted & set(layer.modules()) for layer in self.layers]
        if set().union(*inside) != adapted:
            return 0
        return next(i for i, found in enumerate(inside) if found)

    @torch.no_grad()
    def _agrees(self, model: Any) -> bool:
        """Whether this architecture can go on from the middle, tried out on two short texts."""
        weights = next(model.parameters())
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3], device=weights.device)
        ids = (torch.arange(18, device=weights.device).view(2, 9) * 37 + 11) % model.config.get_text_config().vocab_size
        ids, real = ids * mask, mask.bool()
        training = model.training
        model.eval()
        try:
            whole = hidden_states(model, ids, mask)[real]
            middle = self.states(lambda: hidden_states(model, ids, mask)).masked_fill(~real[..., None], 0)
            with self.known(middle):
                upper = hidden_states(model, ids, mask)[real]
            close = 8 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
            return torch.allclose(whole, upper, rtol=0, atol=close)
        except Exception:  # each family refuses a missing layer with an error of its own
            return False
        finally:
            model.train(training)


def rows_of(batch: MicroBatch) -> list[Tensor]:
    """The trunk's hidden states [tokens, H] of each sequence of a micro-batch that has them, padded or packed."""
    assert batch.trunk is not None
    if batch.attention_mask is not None:
        return [states[:size] for states, size in zip(batch.trunk, batch.attention_mask.sum(1).tolist())]
    assert batch.position_ids is not None
    return list(batch.trunk[0].split(sequence_lengths(batch.position_ids).tolist()))


def gather_states(batch: MicroBatch) -> dict[int, Tensor]:
    """The trunk's hidden states of this micro-batch's episodes on all ranks: episode -> [tokens, H] on the CPU.

    Every rank calls it, since in a later epoch any rank may be given any episode.
    """
    found = rows_of(batch)
    mine = [[episode, len(states)] for episode, states in zip(batch.rows, found)]
    facts = distributed.all_gather_rows(torch.tensor(mine, dtype=torch.int64, device=found[0].device).view(-1, 2))
    flat = torch.cat([states[: 0 if not batch.rows else None] for states in found])  # nothing of a filler
    flat = distributed.all_gather_rows(flat).cpu()
    episodes, lengths = facts.cpu().unbind(1)
    return dict(zip(episodes.tolist(), flat.split(lengths.tolist())))
