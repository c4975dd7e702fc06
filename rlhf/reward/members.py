"""The reward models of an ensemble. Adapters on one base share one copy of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.config.base import ModelConfig
from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.models.adapters import adapter_has_head
from rlhf.models.scalar import ScalarModel, load_scalar, reward_scale
from rlhf.runs.parents import resolve_model_path
from rlhf.runs.run import is_run
from rlhf.tuning.merging import attribute_set
from rlhf.tuning.origin import adapter_folder, base_of, tuning_of, weights_of


class ScalarGroup(nn.Module):
    """Several scalar models in one module, so that shared weights are moved or divided once."""

    def __init__(self, members: Sequence[ScalarModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores float32 [B, M] of the texts int64 [B, T], padded on the right."""
        return torch.stack([member(input_ids, attention_mask) for member in self.members], 1)


class AdapterScalar(ScalarModel):
    """A reward model that is one of several adapters with heads on one base in PEFT's wrapper.

    Args:
        model: PEFT's wrapper.
        adapter: PEFT's name of the adapter.
        scale: Mean and standard deviation of the scores.
    """

    def __init__(self, model: Any, adapter: str, scale: tuple[float, float]) -> None:
        super().__init__(model)
        self.adapter = adapter
        self.mean, self.std = scale

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """As `ScalarModel.forward`, with this adapter and its head."""
        # PEFT's own `set_adapter` would change requires_grad, on which an engine depends
        layers = [part for part in self.model.modules() if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper)]
        with attribute_set(layers, "_active_adapter", [self.adapter]):
            return super().forward(*inputs, **named)


def load_members(
    config: ModelConfig, paths: Sequence[str], tokens: Callable[[str], int | None], as_stored: bool = False
) -> list[ScalarModel]:
    """The reward models of an ensemble, in the order of `paths`.

    Runs of LoRA or bottleneck adapters on the same base become adapters on one copy of it, if the base has not changed
    since. All others are loaded whole, adapters merged. A warning names members whose scores were not normalised after
    training, because their scale may differ from that of the others.

    Args:
        config: Loading options; `path` is replaced.
        paths: Runs of the reward stage or model folders.
        tokens: Path of a model -> the number of ids that it must encode; see `load_scalar`.
        as_stored: See `load_scalar`.

    Raises:
        UserError: One of them cannot be loaded, or is not a reward model.
    """
    found: dict[str, ScalarModel] = {}
    for base, runs in _shared_bases(paths).items():
        found |= _on_one_base(config, base, runs, tokens, as_stored)
    for path in paths:
        if path not in found:
            one = config.model_copy(update={"path": path})
            folder = resolve_model_path(path)
            found[path] = load_scalar(one, folder, head="trained", tokens=tokens(path), as_stored=as_stored)
    raw = [path for path, member in found.items() if (member.mean, member.std) == (0.0, 1.0)]
    if raw and len(paths) > 1:
        warn(
            f"scores of {', '.join(raw)} were not normalised after training: their scale may differ from that of other"
            " members. Train with `normalize: completions`."
        )
    return [found[path] for path in paths]


def _shared_bases(paths: Sequence[str]) -> dict[str, list[str]]:
    """Base model -> the runs that are adapters on it and can share it, where there are at least two."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        tuning = tuning_of(path) if is_run(path) else None
        if tuning is None or not tuning.row.traits["roles"] or tuning.row.traits["quantized"]:
            continue
        resolve_model_path(path)  # refuses an unfinished run
        folder = adapter_folder(path)
        if (folder / "adapter_model.safetensors").is_file() and adapter_has_head(folder):
            base = base_of(path)
            groups.setdefault((base["path"], base["weights"]), []).append(path)
    return {base: runs for (base, weights), runs in groups.items() if len(runs) > 1 and _is_still(base, weights)}


def _is_still(base: str, weights: str) -> bool:
    try:
        resolve_model_path(base)
        return weights_of(base) == weights
    except UserError:  # it is not there any more
        return False


def _on_one_base(
    config: ModelConfig, base: str, runs: Sequence[str], tokens: Callable[[str], int | None], as_stored: bool
) -> dict[str, ScalarModel]:
    most = max((count for count in map(tokens, runs) if count is not None), default=None)
    one = config.model_copy(update={"path": base})
    scalar = load_scalar(one, resolve_model_path(base), tokens=most, as_stored=as_stored)
    wrapped: Any = None
    for index, run in enumerate(runs):
        folder, name = adapter_folder(run), f"member-{index}"
        settings: Any = peft.PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = False
        if wrapped is None:
            wrapped = peft.get_peft_model(scalar.model, settings, adapter_name=name)
        else:
            wrapped.add_adapter(name, settings)
        peft.set_peft_model_state_dict(
            wrapped, load_file(Path(folder) / "adapter_model.safetensors"), adapter_name=name
        )
    scales = [reward_scale(resolve_model_path(run)) for run in runs]
    return {run: AdapterScalar(wrapped, f"member-{i}", scale) for i, (run, scale) in enumerate(zip(runs, scales))}
