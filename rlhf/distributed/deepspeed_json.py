"""DeepSpeed JSON files, read and checked without importing DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError, blame
from rlhf.core.limits import read_json_object

SET_BY_US = {
    "train_batch_size": "batch.batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "precision",
    "fp16": "precision",
}
"""DeepSpeed keys that the stages set -> the config key to use instead."""


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """The settings in a DeepSpeed JSON.

    Raises:
        UserError: No such file, not a JSON object, no ZeRO stage from 0 to 3, a value other than `auto` for a key that
            the stages set, or an offload that DeepSpeed does not support with our optimizer.
    """
    with blame(f"deepspeed: {path}", remedy="Files to copy are in configs/deepspeed."):
        settings = read_json_object(path)
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"deepspeed: {path}: zero_optimization needs a `stage` of 0, 1, 2 or 3, got {zero!r}")
    for key, ours in SET_BY_US.items():
        value = settings.get(key, "auto")
        value = value.get("enabled", value) if isinstance(value, dict) else value
        if value != "auto" and (key, value) != ("fp16", False):
            raise UserError(
                f"deepspeed: {path}: {key} is {value!r}",
                "The stages set it from their own config, and the two could contradict each other.",
                f'Remove it or set it to "auto", and set `{ours}` in the config of the stage.',
            )
    if "offload_optimizer" in zero and settings.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"deepspeed: {path}: offload_optimizer without zero_force_ds_cpu_optimizer: false",
            "Without it DeepSpeed requires its own compiled Adam; here `optimizer.algorithm` chooses.",
            'Add "zero_force_ds_cpu_optimizer": false at the top level of the file.',
        )
    return settings


BUCKET, SUB_GROUP = 500_000_000, 1_000_000_000
"""DeepSpeed's sizes, in elements, of the gradients that are reduced together and of a part of stage 3's optimizer."""


def with_sizes(settings: dict[str, Any], trained: int, largest: int) -> dict[str, Any]:
    """The settings with buffers for this number of trained weights, where the file names no sizes.

    DeepSpeed's defaults suit models of some ten billion weights. With a smaller one, all gradients wait in one bucket
    for the end of the backward pass, and building stage 3's optimizer takes 4 bytes for each whole weight.

    Args:
        settings: From a DeepSpeed JSON.
        trained: Trained elements.
        largest: Elements of the largest trained parameter.
    """
    zero = dict(settings.get("zero_optimization", {}))
    part = max(largest, trained // 16, 1)
    sizes = {"reduce_bucket_size": min(BUCKET, part), "sub_group_size": min(SUB_GROUP, part)}
    for key, size in sizes.items():
        if zero.get("stage", 0) and zero.get(key, "auto") == "auto":
            zero[key] = size
    return settings | {"zero_optimization": zero}


def deepspeed_settings(path: str | Path | None, processes: int) -> dict[str, Any] | None:
    """The settings that a run uses: those of its file, ZeRO stage 0 for several processes without one, else None."""
    if path is None:
        return {"zero_optimization": {"stage": 0}} if processes > 1 else None
    return read_deepspeed(path)


def zero_stage(path: str | Path | None) -> int:
    """The ZeRO stage of a DeepSpeed JSON, 0 to 3; 0 without one. Raises what `read_deepspeed` raises."""
    return 0 if path is None else int(read_deepspeed(path).get("zero_optimization", {}).get("stage", 0))
