"""Frozen lower layers: if only the upper layers have adapters, the hidden states that enter these are the same for all
roles and epochs.

These states are computed once per rollout and cached in host memory (tokens x hidden size x bytes per number). All
other passes run the model's own body, with its positions, masks and norms, and placeholders for the lower layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf import distributed
from rlhf.models.forward import causal_lm, hidden_states, sequence_lengths
from rlhf.ppo.types import MicroBatch
from rlhf.tuning.layers import layers_of


class _Placeholder(nn.Module):
    """Replaces a layer that must not run; returns `states`, or its input if there are none."""

    def __init__(self, layer: nn.Module, states: Tensor | None = None) -> None:
        super().__init__()
        self.states, self.seen = states, torch.empty(0)
        self.__dict__["layer"] = layer  # not a child

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.states is None else self.states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # a body reads attributes of its layers, such as `attention_type`


class FrozenLayers:
    """The layers of a model below its first adapter.

    Args:
        model: PEFT's wrapper around a causal LM, with all of its adapters.
    """

    def __init__(self, model: Any) -> None:
        self.layers: Any = layers_of(causal_lm(model))[1]
        self.depth = self._frozen(model)
        if self.depth and not self._agrees(model):
            self.depth = 0

    depth: int
    """The number of frozen layers; 0 if the first has an adapter, or if the model cannot start from the middle."""

    def states(self, encode: Callable[[], Any]) -> Tensor:
        """The hidden states [B, L, H] that enter the first layer with an adapter when `encode` calls the model."""
        placeholders = {i: _Placeholder(self.layers[i]) for i in range(self.depth, len(self.layers))}
        with self._replaced(placeholders):
            encode()
        return placeholders[self.depth].seen

    @contextmanager
    def starting_from(self, states: Tensor | None) -> Iterator[None]:
        """Within this context the model starts from `states` [B, L, H], whatever its input; from the input if None."""
        if states is None:
            yield
            return
        with self._replaced({i: _Placeholder(self.layers[i], states) for i in range(self.depth)}):
            yield

    @contextmanager
    def _replaced(self, placeholders: Mapping[int, nn.Module]) -> Iterator[None]:
        own = {i: self.layers[i] for i in placeholders}
        try:
            for i, module in placeholders.items():
                self.layers[i] = module
            yield
        finally:
            for i, module in own.items():
                self.layers[i] = module

    def _frozen(self, model: nn.Module) -> int:
        """Layers below the first one with an adapter; 0 if there is an adapter outside of the layers."""
        adapted = {module for module in model.modules() if isinstance(module, BaseTunerLayer)}
        inside = [adapted & set(layer.modules()) for layer in self.layers]
        if set().union(*inside) != adapted:
            return 0
        return next(i for i, found in enumerate(inside) if found)

    @torch.no_grad()
    def _agrees(self, model: Any) -> bool:
        """Whether this architecture can start from the middle, tested on two short sequences."""
        weights = next(model.parameters())
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3], device=weights.device)
        ids = (torch.arange(18, device=weights.device).view(2, 9) * 37 + 11) % model.config.get_text_config().vocab_size
        ids, real = ids * mask, mask.bool()
        training = model.training
        model.eval()
        try:
            whole = hidden_states(model, ids, mask)[real]
            middle = self.states(lambda: hidden_states(model, ids, mask)).masked_fill(~real[..., None], 0)
            with self.starting_from(middle):
                upper = hidden_states(model, ids, mask)[real]
            close = 8 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
            return torch.allclose(whole, upper, rtol=0, atol=close)
        except Exception:  # families raise different errors when a layer is missing
            return False
        finally:
            model.train(training)


def states_per_sequence(batch: MicroBatch) -> list[Tensor]:
    """The cached states [tokens, H] of each sequence of a micro-batch that has them, padded or packed."""
    assert batch.frozen_states is not None
    if batch.attention_mask is not None:
        sizes = batch.attention_mask.sum(1).tolist()
        return [states[:size] for states, size in zip(batch.frozen_states, sizes)]
    assert batch.position_ids is not None
    return list(batch.frozen_states[0].split(sequence_lengths(batch.position_ids).tolist()))


def gather_states(batch: MicroBatch) -> dict[int, Tensor]:
    """The cached states of this micro-batch's episodes on all ranks: episode -> [tokens, H] on the CPU.

    Every rank calls it, because in a later epoch any rank may get any episode.
    """
    found = states_per_sequence(batch)
    mine = [[episode, len(states)] for episode, states in zip(batch.episodes, found)]
    facts = distributed.all_gather_rows(torch.tensor(mine, dtype=torch.int64, device=found[0].device).view(-1, 2))
    flat = torch.cat([states[: None if batch.episodes else 0] for states in found])  # a filler contributes nothing
    flat = distributed.all_gather_rows(flat).cpu()
    episodes, lengths = facts.cpu().unbind(1)
    return dict(zip(episodes.tolist(), flat.split(lengths.tolist())))
