"""Config of the SFT stage."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from rlhf.config.base import BatchConfig, DataConfig, EvalConfig, SupervisedConfig
from rlhf.core.table import Pick
from rlhf.models.tuning import TUNING


class SFTBatchConfig(BatchConfig):
    packing: bool = False
    """Fill every row of a batch with several demonstrations, which do not see each other (needs an attention
    implementation with variable lengths, such as flash_attention_2)."""


class SFTEvalConfig(EvalConfig):
    samples: NonNegativeInt = 4
    """Held-out prompts that are answered and written to samples.jsonl at each evaluation."""
    sample_tokens: PositiveInt = 64
    """Longest sample, in tokens."""


class SFTConfig(SupervisedConfig):
    data: DataConfig
    """Datasets of demonstrations; of rankings, the best completions serve."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """What is trained: a row of the tuning table (`full`, `last-layers`, `lora`, ...) with its options."""
    batch: SFTBatchConfig = SFTBatchConfig()
    eval: SFTEvalConfig = SFTEvalConfig()

    renamed_keys: ClassVar[dict[str, str]] = SupervisedConfig.renamed_keys | {
        "packing": "batch.packing",
        "samples": "eval.samples",
        "sample_tokens": "eval.sample_tokens",
    }
