"""A model written file by file: each file of weights is gathered and merged, written, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlhf.core.console import is_main, say
from rlhf.core.files import write_json
from rlhf.core.freeing import freed_at_once
from rlhf.models.load import count_parameters
from rlhf.models.mapped import makes_weights
from rlhf.tuning import merging

SHARD_BYTES = 2_000_000_000
"""The largest file of weights, unless one tensor is larger; rank 0 holds as much while it writes."""


def save_weights(folder: Path, model: Any) -> None:
    """Write config, weights and generation config as transformers' `save_pretrained`, adapters merged. Every rank
    calls it; rank 0 writes, and holds the weights of one file at a time.

    Where transformers makes several tensors of the file from one of the model (experts, for instance), rank 0 holds the
    whole model.

    Args:
        folder: Is made if it is not there.
        model: A transformers model, maybe wrapped by PEFT, maybe divided by ZeRO-3.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if makes_weights(base):
        say(f"Saving: rank 0 gathers all of {type(base).__name__}, whose weights transformers converts together")
        state = merging.merged_state(model)
        if is_main():
            base.save_pretrained(folder, state_dict=state)
        return
    plan = _plan(base)
    if is_main():
        base.save_pretrained(folder, state_dict={})  # all but the weights
    places: dict[str, str] = {}
    with freed_at_once():
        for file, weights in _files(model, plan):
            named = revert_weight_conversion(base, weights)
            save_file(named, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(named, file)
            del named, weights
    if is_main() and plan.is_sharded:
        counts = {"total_parameters": count_parameters(base)[1], **plan.metadata}
        write_json(folder / "model.safetensors.index.json", {"metadata": counts, "weight_map": places})


def _plan(base: Any) -> Any:
    """Which tensor goes into which file. Tied weights are written once, under the name that transformers expects."""
    shapes = merging.merged_shapes(base)
    ignored = base._keys_to_ignore_on_save or ()
    marks = {name: mark for name, (mark, _) in shapes.items() if name not in ignored}
    names = remove_tied_weights_from_state_dict(marks, base)
    return split_torch_state_dict_into_shards({name: shapes[name][1] for name in names}, max_shard_size=SHARD_BYTES)


def _files(model: Any, plan: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each file with its weights, as soon as they are complete; on rank 0 alone. Every rank goes through it."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for part in merging.merged_parts(model):
        for name, weight in part.items():
            file = plan.tensor_to_filename.get(name)
            if file is None:  # tied to another
                continue
            waiting.setdefault(file, {})[name] = weight.contiguous()
            if len(waiting[file]) == len(plan.filename_to_tensors[file]):
                yield file, waiting.pop(file)
        del part
    assert not waiting, f"weights that no file got: {list(waiting)}"
