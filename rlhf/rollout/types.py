"""Input and output of the samplers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    batch_size: int = 64
    logprobs: bool = False
    """Whether `hf` reports log-probs; the other samplers do where the distribution is not truncated."""
    merge_adapters: bool = False
    """Whether `vllm` and `vllm-server` get the weights with a LoRA adapter merged instead of only the adapter."""

    @property
    def plain(self) -> bool:
        """Whether tokens come from the model's whole distribution at the temperature, without any truncation."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1 and self.min_new_tokens == 0


@dataclass(frozen=True)
class Completion:
    """A sampled completion."""

    ids: list[int]
    """Token ids, including the end token."""
    ended: bool
    """True if an end token or a stop string ended it, False if it was cut off at max_new_tokens."""
    logprobs: list[float] | None = None
    """The sampler's log-prob of each token at the sampling temperature, in nats, under the whole distribution. None if
    the sampler reports none: `hf` unless asked to, others for a truncated one (see `SamplingParams.plain`)."""


class RowAdapters(Protocol):
    """Adapters of the model that differ from row to row; see `rlhf.inference.task_adapters`."""

    def key(self, request: int) -> Hashable:
        """Requests with equal prompts and equal keys may share a prefill."""
        ...

    def virtual_tokens(self, request: int) -> int:
        """Number of virtual tokens before a request's prompt."""
        ...

    def select(self, requests: Sequence[int | None]) -> None:
        """Use the adapters of these requests in the rows of the next forward passes; None: any adapter."""
        ...

    def fill(self, cache: Any, requests: Sequence[int]) -> int:
        """Write the virtual tokens of these requests into an empty cache, one row each, padded on the left.

        Returns:
            The columns written.
        """
        ...
