"""The formats of an export: one table, EXPORTERS. Imports no torch until a model is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from rlhf.core.errors import UserError
from rlhf.core.table import Table
from rlhf.export.types import Exported, Source, base_of

EXPORTERS = Table("export format")


@EXPORTERS.row("hf")
def hf(source: Source, folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto") -> Exported:
    """The whole model, adapters merged, for `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.

    `dtype` is that of the weights; `auto` leaves them as the run has them.
    """
    if source.stage != "critic" and (source.model / "adapter_config.json").is_file():
        raise UserError(
            f"{source.run}: learned virtual tokens cannot be merged into a model's weights",
            "They precede every prompt, and only PEFT adds them.",
            "Export the adapter: --format adapter.",
        )
    import torch  # slow; the table is read for the help of `rlhf export`

    from rlhf.export.weights import write_policy, write_reward

    write = write_reward if source.stage in ("reward", "critic") else write_policy
    return write(source, folder, None if dtype == "auto" else getattr(torch, dtype))


@EXPORTERS.row("adapter")
def adapter(source: Source, folder: Path) -> Exported:
    """The PEFT adapter alone, for `PeftModel.from_pretrained` on the model that it was trained on."""
    from safetensors import safe_open

    from rlhf.models.scalar import reward_scale  # imports torch

    places = [source.model] if source.stage == "critic" else [source.run / "adapter", source.model]
    found = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{source.run}: this run has no adapter",
            "Its tuning method changed the model's own weights.",
            "Export the whole model: --format hf.",
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(found / name, folder / name)
    source.chat.tokenizer.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118 - not a mapping
    return Exported(
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        parameters=sum(tensor.numel() for tensor in tensors),
        stop_ids=(source.chat.end_id,),
        scale=reward_scale(source.model) if source.stage in ("reward", "critic") else (0.0, 1.0),
        adapter_base=base_of(folder),
    )
