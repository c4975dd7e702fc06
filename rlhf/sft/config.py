"""Config of the SFT stage."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from rlhf.config.base import BatchConfig, DataConfig, EvalConfig, SupervisedConfig
from rlhf.core.table import Pick
from rlhf.tuning.methods import TUNING


class SFTBatchConfig(BatchConfig):
    packing: bool = False
    """Concatenate demonstrations into rows without padding; they do not attend to each other. Needs an attention
    implementation for variable lengths, such as flash_attention_2."""


class SFTEvalConfig(EvalConfig):
    samples: NonNegativeInt = 4
    """Held-out prompts to complete at each evaluation; the completions go to samples.jsonl."""
    sample_tokens: PositiveInt = 64
    """Longest of these completions, in tokens."""


class SFTConfig(SupervisedConfig):
    data: DataConfig
    """Datasets of demonstrations. In datasets of rankings, the best candidate of each is the demonstration."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """Which weights to train: a row of the tuning table (`full`, `last-layers`, `lora`, ...) with its options."""
    batch: SFTBatchConfig = SFTBatchConfig()
    eval: SFTEvalConfig = SFTEvalConfig()

    renamed_keys: ClassVar[dict[str, str]] = SupervisedConfig.renamed_keys | {
        "packing": "batch.packing",
        "samples": "eval.samples",
        "sample_tokens": "eval.sample_tokens",
    }
