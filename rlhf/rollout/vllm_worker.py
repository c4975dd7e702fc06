"""What vLLM's workers can do for a trainer: take new weights. vLLM mixes this class into its own (worker extension)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class WeightUpdates:
    """Methods for `LLM.collective_rpc`."""

    def replace_weights(self, weights: Iterable[tuple[str, Any]] | None = None, folder: str | None = None) -> None:
        """Put new weights in the place of the old ones.

        Args:
            weights: Names as in a checkpoint of transformers, and tensors; or else
            folder: A folder with safetensors files. Each worker reads its part of them.
        """
        worker: Any = self
        worker.reload_weights(weights_iterator=weights, weights_path=folder)
        worker.model_runner.get_model().apply(_repack)


def _repack(layer: Any) -> None:
    """Renew a head's copy of its weight. vLLM's CPU kernels have copies in a layout of their own, and vLLM 0.32 does
    not renew that of a head whose weight is the embedding's."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if isinstance(layer, ParallelLMHead) and current_platform.is_cpu():
        layer.quant_method.process_weights_after_loading(layer)
