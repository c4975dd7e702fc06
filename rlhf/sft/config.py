"""Config of the SFT stage."""

from __future__ import annotations

from typing import Annotated

from rlhf.config.base import BatchConfig, Count, DataConfig, ModelConfig, OptimizerConfig, Positive, StageConfig
from rlhf.core.table import Pick
from rlhf.models.tuning import TUNING


class SFTConfig(StageConfig):
    model: ModelConfig
    data: DataConfig
    """Datasets of demonstrations; of rankings, the best answers serve."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """What is trained: a row of the tuning table (`full`, `last-layers`, `lora`, ...) with its options."""
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    packing: bool = False
    """Fill every row of a batch with several demonstrations, which do not see each other (needs an attention
    implementation with variable lengths, such as flash_attention_2)."""
    eval_every: Positive = 100
    """Steps between evaluations on the held-out prompts; the checkpoint with the lowest loss becomes the result."""
    samples: Count = 4
    """Held-out prompts that are answered and written to samples.jsonl at each evaluation."""
    sample_tokens: Positive = 64
    """Longest sample answer, in tokens."""
