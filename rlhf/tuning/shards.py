"""Write a model file by file: the weights of each file are gathered, merged, written, and freed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlhf.core.console import is_main
from rlhf.core.files import write_json
from rlhf.core.freeing import freed_at_once, give_back
from rlhf.models.load import count_parameters
from rlhf.tuning import merging

SHARD_BYTES = 2_000_000_000
"""Largest file of weights, unless one tensor is larger; rank 0 holds as much while it writes."""


def save_weights(folder: Path, model: Any) -> None:
    """Write config, weights and generation config as transformers' `save_pretrained`, adapters merged. Every rank
    calls it; rank 0 writes, and holds the weights of one file at a time.

    Args:
        folder: Created if missing.
        model: A transformers model, maybe wrapped by PEFT, maybe divided by ZeRO-3.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    groups = _groups(base)
    plan = _plan(groups)
    if is_main():
        base.save_pretrained(folder, state_dict={})  # all but the weights
    places: dict[str, str] = {}
    with freed_at_once():
        for file, weights in _files(model, groups, plan):
            save_file(weights, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(weights, file)
            del weights
    if is_main() and plan.is_sharded:
        counts = {"total_parameters": count_parameters(base)[1], **plan.metadata}
        write_json(folder / "model.safetensors.index.json", {"metadata": counts, "weight_map": places})


def _groups(base: Any) -> dict[str, dict[str, Tensor]]:
    """Groups of the model's tensors that transformers converts together when saving: a name -> name and empty tensor
    of each.

    Most groups are one tensor. One tensor of experts becomes several in the file; queries, keys and values of some
    families become one. Tied weights are included once, under the name that transformers expects.
    """
    shapes = merging.merged_shapes(base)
    ignored = base._keys_to_ignore_on_save or ()
    marks = {name: mark for name, (mark, _) in shapes.items() if name not in ignored}
    done = [c.reverse_transform() for c in reversed(getattr(base, "_weight_conversions", None) or ())]
    converters = [conversion for conversion in done if isinstance(conversion, WeightConverter)]
    found: dict[str, dict[str, Tensor]] = {}
    for name in remove_tied_weights_from_state_dict(marks, base):
        renamed = (converter.rename_source_key(name) for converter in converters)
        key = next((key for key, pattern in renamed if pattern is not None), name)
        found.setdefault(key, {})[name] = shapes[name][1]
    return found


def _plan(groups: dict[str, dict[str, Tensor]]) -> Any:
    """Which group goes into which file. A group is never divided, since it is converted as a whole."""
    bytes_of = {key: sum(empty.nbytes for empty in group.values()) for key, group in groups.items()}
    sizes = {key: torch.empty(count, dtype=torch.uint8, device="meta") for key, count in bytes_of.items()}
    return split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)


def _files(model: Any, groups: dict[str, dict[str, Tensor]], plan: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each file with its weights, as soon as they are complete; on rank 0 only. Every rank must iterate over it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    key_of = {name: key for key, group in groups.items() for name in group}
    gathered: dict[str, dict[str, Tensor]] = {}
    waiting: dict[str, dict[str, Tensor]] = {}
    left = {file: len(keys) for file, keys in plan.filename_to_tensors.items()}
    for part in merging.merged_parts(model):
        while part:
            name, weight = part.popitem()
            key = key_of.get(name)
            if key is None:  # tied to another
                continue
            group = gathered.setdefault(key, {})
            group[name] = weight.contiguous()
            del weight
            if len(group) == len(groups[key]):
                file = plan.tensor_to_filename[key]
                waiting.setdefault(file, {}).update(revert_weight_conversion(base, gathered.pop(key)))
                del group
                left[file] -= 1
                if not left[file]:
                    yield file, waiting.pop(file)
        give_back()
    assert not waiting and not gathered, f"weights that no file got: {[*waiting, *gathered]}"
