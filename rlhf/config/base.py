"""The configs of the stages, typed and checked.

The text under each field is its documentation: docs/config.md is generated from it. `rlhf.config.load` reads the
files; `rlhf.cli.preflight` checks what depends on the disk.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Paths = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, protected_namespaces=(),
        allow_inf_nan=False,
    )  # fmt: skip


class ModelConfig(Strict):
    path: Annotated[str, Field(min_length=1)]
    """A run folder of an earlier stage, a Hugging Face model folder, or a hub name."""
    chat_template: str = "auto"
    """`auto` (the model's own, else `default`), `default`, `plain` (no roles: the answer continues the prompt's
    text), or the path of a Jinja file."""
    max_length: PositiveInt | None = None
    """Longest sequence in tokens, prompt and answer together; the model's own limit when left out."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you have read that code."""
    attn_implementation: str | None = None
    """What transformers calls so: `sdpa`, `eager`, `flash_attention_2`, ...; its own choice when left out."""


class DataConfig(Strict):
    train: Paths
    """Datasets (folders or JSONL files). Records of the splits `eval` and `test` are never trained on."""
    eval: Paths = []
    """Held-out datasets; when left out, the `eval` split of the training datasets."""
    max_eval_records: PositiveInt | None = None
    """At most so many held-out records, taken from the front."""


class CheckpointConfig(Strict):
    every: PositiveInt = 100
    """Steps (updates in PPO) between checkpoints."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""


class LogConfig(Strict):
    every: PositiveInt = 1
    """Steps between lines in metrics.jsonl and on the console."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides metrics.jsonl; each needs its own package."""


class AdamWConfig(Strict):
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to zero (`constant` stays)."""
    warmup: Fraction = 0.03
    """Fraction of all steps (updates in PPO) over which the learning rate climbs to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's two decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class OptimizerConfig(AdamWConfig):
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""


class BatchConfig(Strict):
    epochs: PositiveFloat = 1.0
    """Passes over the training data."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; takes precedence over `epochs`."""
    batch_size: PositiveInt = 32
    """Records (demonstrations, or whole rankings) per optimizer step over all processes."""
    micro_batch_size: PositiveInt = 8
    """Records per forward pass and process; the rest of a batch is accumulated."""
    group_by_length: bool = True
    """Batch records of similar length, so that less is padded. The order stays random between groups."""


class EvalConfig(Strict):
    every: PositiveInt = 100
    """Steps between evaluations on the held-out records; the checkpoint with the lowest loss becomes the result."""


class StageConfig(Strict):
    run: Annotated[str, Field(min_length=1)]
    """The run folder to make."""
    model: ModelConfig
    seed: NonNegativeInt = 0
    """Seeds every random choice."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. `auto`: bfloat16 if the GPU supports it, else float32. Optimizer (master) weights are always
    float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    deepspeed: str | None = None
    """A DeepSpeed JSON (see configs/deepspeed). Several processes without one use ZeRO stage 0."""
    timeout_seconds: PositiveInt = 600
    """How long a collective operation waits for a rank that does not answer before the run ends."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    renamed_keys: ClassVar[dict[str, str]] = {}
    """Old key -> new key, for the error that refuses the old one."""


class SupervisedConfig(StageConfig):
    """What SFT and the reward model share: epochs over a fixed table of records."""

    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()

    renamed_keys: ClassVar[dict[str, str]] = {
        "eval_every": "eval.every",
        "batch.gradient_checkpointing": "gradient_checkpointing",
    }
