"""Config of the SFT stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import BatchConfig, DataConfig, EvalConfig, Fraction, Strict, SupervisedConfig
from rlhf.tasks.answers import answer_pattern
from rlhf.tuning.methods import TUNING, Tuning

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


class SFTBatchConfig(BatchConfig):
    packing: bool = False
    """Concatenate demonstrations into rows without padding; they do not attend to each other. Needs an attention
    implementation for variable lengths, such as flash_attention_2."""


class SFTEvalConfig(EvalConfig):
    samples: NonNegativeInt = 4
    """Held-out prompts to complete at each evaluation; the completions go to samples.jsonl."""
    sample_tokens: PositiveInt = 64
    """Longest of these completions, in tokens."""


class LogitsConfig(Strict):
    teacher: Annotated[str, Field(min_length=1)]
    """A larger model with the student's tokenizer: a run, a model folder or a hub name. It is frozen."""
    divergence: Divergence = "forward-kl"
    """Divergence between the next-token distributions of teacher and student: `forward-kl` covers all modes of the
    teacher, `reverse-kl` seeks its main modes, `jsd` lies between them."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """For `jsd`: the teacher's weight in the mixture. Near 0 it is like forward KL, near 1 like reverse KL."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions in the divergence."""
    on_policy: Fraction = 0.0
    """Fraction of demonstrations whose answer is replaced by one that the student samples at that step (GKD's lambda).
    0 needs no sampling; 1 uses only the prompts."""
    max_new_tokens: PositiveInt = 128
    """Longest sampled answer in tokens."""
    sampling_temperature: PositiveFloat = 1.0
    """Temperature of the sampled answers."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of SFT's own loss on the demonstrations, added to the divergence."""


class StepByStepConfig(Strict):
    pattern: Annotated[str, Field(min_length=1)] = "the-answer-is"
    """Where a demonstration's text has its answer: gsm8k, the-answer-is, number, letter, boxed, last-line, or a regular
    expression. The sentence with the answer is the label, and the text before it the rationale."""
    rationale_weight: NonNegativeFloat = 1.0
    """Weight of the rationale's loss; the label's is 1. With 0, only labels are learned."""
    label_prefix: str = ""
    """Prefix of prompts of the label task, and so of the prompts of the served model. The paper has `[label] `."""
    rationale_prefix: str = "[rationale] "
    """Prefix of prompts of the rationale task, which only training uses."""

    def faults(self) -> Iterator[str]:
        answer_pattern(self.pattern)
        if self.label_prefix == self.rationale_prefix:
            yield "distillation.step_by_step: label_prefix and rationale_prefix must differ"


class DistillationConfig(Strict):
    logits: LogitsConfig | None = None
    """Learn the next-token distributions of a local teacher (Hinton 2015; GKD, Agarwal 2024)."""

    step_by_step: StepByStepConfig | None = None
    """Learn a teacher's rationales as a second task, next to the labels (Hsieh 2023, Distilling Step-by-Step)."""

    def faults(self) -> Iterator[str]:
        if (self.logits is None) == (self.step_by_step is None):
            yield "distillation: needs `logits` or `step_by_step`, and not both"


class SFTConfig(SupervisedConfig):
    data: DataConfig
    """Datasets of demonstrations. In datasets of rankings, the best candidate of each is the demonstration."""
    tuning: Tuning = TUNING.pick("full")
    """Which weights to train: a row of the tuning table (`full`, `last-layers`, `lora`, ...) with its options."""
    distillation: DistillationConfig | None = None
    """How to learn from a teacher; see docs/distillation.md. Without it, the loss is that of the demonstrations."""
    batch: SFTBatchConfig = SFTBatchConfig()
    eval: SFTEvalConfig = SFTEvalConfig()

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.distillation and self.batch.packing:
            yield "distillation: does not work with batch.packing; set batch.packing=false"
        logits = self.distillation.logits if self.distillation else None
        if logits and logits.on_policy and self.tuning.row.traits["prompt_learning"]:
            yield (
                f"distillation.logits.on_policy: {self.tuning.name} cannot be sampled from in training, because only "
                "PEFT's own forward pass adds virtual tokens; set on_policy=0, or use `tuning: lora`"
            )
