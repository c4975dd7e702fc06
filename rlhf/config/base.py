"""Config groups that several stages share.

The text under each field is its documentation: docs/config.md is generated from it. `rlhf.config.load` reads the
files; `rlhf.cli.preflight` checks paths, datasets and devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf.config.optimizers import OPTIMIZERS
from rlhf.core.errors import UserError
from rlhf.core.table import Pick

Fraction = Annotated[float, Field(ge=0, le=1)]
_OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Paths = Annotated[list[str], _OneOrMore]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], _OneOrMore]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, protected_namespaces=(),
        allow_inf_nan=False,
    )  # fmt: skip

    def faults(self) -> Iterator[str]:
        """Faults in combinations of valid values, a sentence without a full stop for each."""
        yield from ()

    @model_validator(mode="after")
    def _values_fit(self) -> Strict:
        if faults := "; ".join(self.faults()):
            raise ValueError(faults)
        return self


class ModelConfig(Strict):
    path: Annotated[str, Field(min_length=1)]
    """The run folder of an earlier stage, a Hugging Face model folder, or the name of a model on the Hub."""
    chat_template: str = "auto"
    """`auto` (the model's own template if it has one, else `default`, for an encoder-decoder `encoder-decoder`),
    `default`, `plain` (no roles: the completion continues the text of the prompt), `encoder-decoder` (the text and the
    end token, as T5 and BART were trained), or the path of a Jinja file."""
    control_tokens_in_text: Literal["as_text", "reject"] = "as_text"
    """How to handle the string of a control token, such as `</s>`, in a record's text. It never becomes that token: it
    is encoded as plain text (`as_text`), or the record is rejected and counted (`reject`)."""
    max_length: PositiveInt | None = None
    """Longest sequence in tokens, prompt and completion together. The default is the model's own limit."""
    resize_embeddings: bool = False
    """Add rows to an embedding that has fewer than the tokenizer has ids; they start at the mean of the others. Without
    it such a model is refused. Rows beyond the tokenizer's ids need no option: their ids are never sampled."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    attn_implementation: str | None = None
    """The attention implementation of transformers: `sdpa`, `eager`, `flash_attention_2`, ... By default transformers
    chooses."""


class DataConfig(Strict):
    train: Paths
    """Training datasets (folders or JSONL files). Their `eval` and `test` splits are never trained on."""
    eval: Paths = []
    """Held-out datasets. The default is the `eval` split of the training datasets."""
    max_eval_records: PositiveInt | None = None
    """Use only the first this many held-out records."""


class CheckpointConfig(Strict):
    every: PositiveInt = 100
    """Optimizer steps (PPO: updates) between checkpoints."""
    keep: PositiveInt = 2
    """How many checkpoints to keep on disk; older ones are deleted."""


class LogConfig(Strict):
    every: PositiveInt = 1
    """Optimizer steps (PPO: updates) between lines in metrics.jsonl and on the console."""
    report_to: Trackers = []
    """Trackers that also receive the metrics: one or a list. Each needs its Python package. TensorBoard's files are
    in the run's `tensorboard/`."""
    watch: bool = True
    """Check the metrics while the run trains, and print a warning with a remedy when something looks wrong. The same
    checks and more: `rlhf doctor RUN`."""


class AdamWConfig(Strict):
    algorithm: Annotated[Pick, OPTIMIZERS] = OPTIMIZERS.pick("adamw")
    """The optimizer: a row of that table with its options. `rlhf plan` counts the bytes of its state."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to zero; `constant` keeps the peak."""
    warmup: Fraction = 0.03
    """Fraction of all steps (PPO: updates) in which the learning rate rises linearly to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, times the learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's two decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum global norm of the gradient; larger gradients are scaled down."""

    def faults(self) -> Iterator[str]:
        for key in self.algorithm.row.traits["unused"]:
            if getattr(self, key) != type(self).model_fields[key].default:
                yield f"{key}: {self.algorithm.name!r} has no such setting; leave it out"


class OptimizerConfig(AdamWConfig):
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""


class BatchConfig(Strict):
    epochs: PositiveFloat = 1.0
    """Passes over the training data."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps. Takes precedence over `epochs`."""
    batch_size: PositiveInt = 32
    """Records (demonstrations, or whole rankings) per optimizer step, summed over all processes."""
    micro_batch_size: PositiveInt = 8
    """Records per forward pass of one process. Gradients are accumulated until `batch_size` is reached."""
    group_by_length: bool = True
    """Put records of similar length into one batch, which saves padding. The order of the batches is still random."""

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Records of a micro-batch, and micro-batches of an optimizer step on each process.

        Raises:
            UserError: The batch does not divide evenly.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise UserError(
                f"batch.batch_size: {self.batch_size} does not divide by {processes} processes",
                remedy=f"Set batch.batch_size={max(share, 1) * processes}.",
            )
        micro = min(self.micro_batch_size, share)
        if share % micro:
            raise UserError(
                f"batch.micro_batch_size: {share} records per process and step are no multiple of {micro}",
                remedy=f"Set batch.micro_batch_size={math.gcd(share, micro)}.",
            )
        return micro, share // micro


class EvalConfig(Strict):
    every: PositiveInt = 100
    """Optimizer steps between evaluations on the held-out records. The checkpoint with the lowest held-out loss becomes
    the result."""


class StageConfig(Strict):
    run: Annotated[str, Field(min_length=1)]
    """The run folder to create."""
    model: ModelConfig
    seed: NonNegativeInt = 0
    """Seed of all random choices."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. `auto` is bfloat16 if the GPU supports it, else float32. Master weights are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory, takes about a third more time."""
    deepspeed: str | None = None
    """Path of a DeepSpeed JSON file (see configs/deepspeed). Without one, several processes use ZeRO stage 0."""
    timeout_seconds: PositiveInt = 600
    """How long a collective operation waits for an unresponsive rank before the run fails."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def faults(self) -> Iterator[str]:
        tuning = getattr(self, "tuning", None)
        if self.model.resize_embeddings and tuning is not None and tuning.row.traits["adapter"]:
            yield (
                f"model.resize_embeddings: {tuning.name} would not train the new rows, and its adapter would not fit "
                "the original model; use `tuning: full`"
            )
        if self.gradient_checkpointing and tuning is not None and tuning.name == "prefix-tuning":
            yield (
                "gradient_checkpointing: does not work with prefix-tuning, since transformers drops the cache, which "
                "holds the prefix, when it recomputes"
            )


class SupervisedConfig(StageConfig):
    """Shared by all stages but PPO: epochs over a fixed table of records."""

    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
