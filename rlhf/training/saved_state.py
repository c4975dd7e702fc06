"""Weights and optimizer state on disk, readable by any number of processes under any ZeRO stage.

Each rank writes the elements that its optimizer updates: `state-PART-RANK.safetensors` has tensors
`KIND/PARAMETER@START`, where KIND is `weights` or a key of the optimizer state, and START the offset in the flattened
parameter. When loading, each rank reads the elements that it needs from all files, so no rank holds a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf import distributed
from rlhf.core.console import is_main
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.core.limits import read_json_object

WEIGHTS = "weights"
STEP = "step"
"""The optimizer's step count: one number for each of its tensors."""
PART_BYTES = 2**30
"""Approximate size limit of a file, because a GPU's tensors are copied to the host file by file."""
LAYOUT = "state.json"


@dataclass(frozen=True)
class Share:
    """Elements `start` to `start + count` of a trained parameter, flattened: those that this rank's optimizer updates.

    They are the elements from `offset` on of `flat`, a float32 tensor of the optimizer.
    """

    name: str
    start: int
    count: int
    flat: Tensor
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The share's elements [count] of a tensor shaped as `flat`; a view where that is contiguous."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.count]


def save_state(
    folder: Path, shares: Sequence[Share], optimizer: torch.optim.Optimizer, stage: int, writes: bool
) -> None:
    """Write weights and optimizer state; every rank calls it.

    Args:
        folder: The checkpoint.
        shares: This rank's.
        optimizer: Over the shares' `flat` tensors.
        stage: The ZeRO stage.
        writes: False on ranks whose elements another rank writes.
    """
    divisible = _divisible(shares, optimizer)
    if is_main():
        layout = {"processes": distributed.world_size(), "zero_stage": stage, "divisible": divisible}
        write_json(folder / LAYOUT, layout)
    if not writes:
        return
    for part, tensors in enumerate(_parts(_tensors(shares, optimizer, divisible))):
        save_file(tensors, folder / f"state-{part:03d}-{distributed.rank()}.safetensors")
    if not divisible:
        states = [optimizer.state.get(flat, {}) for flat in _flats(shares)]
        torch.save(states, folder / f"optimizer-{distributed.rank()}.pt")


def load_state(
    folder: Path,
    names: Sequence[str],
    shares: Sequence[Share],
    optimizer: torch.optim.Optimizer,
    stage: int,
    with_optimizer: bool,
) -> None:
    """Read what `save_state` wrote into the shares' `flat` tensors and the optimizer's state.

    Args:
        folder: The checkpoint.
        names: Names of all trained parameters.
        shares: This rank's.
        optimizer: Over the shares' `flat` tensors.
        stage: The ZeRO stage.
        with_optimizer: Read the optimizer's state too.

    Raises:
        UserError: The checkpoint does not fit the model, or its optimizer state cannot be divided differently.
    """
    try:
        layout = read_json_object(folder / LAYOUT)
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: has no {LAYOUT}, so an earlier version wrote it",
            remedy="Start again with --overwrite, or finish the run with the version that it was started with.",
        ) from None
    whole = stage == 0 and layout["zero_stage"] == 0
    same = (distributed.world_size(), stage) == (layout["processes"], layout["zero_stage"])
    if with_optimizer and not (layout["divisible"] or whole or same):
        processes, before = layout["processes"], layout["zero_stage"]
        raise UserError(
            f"{folder}: written by {processes} processes under ZeRO stage {before}, this run has "
            f"{distributed.world_size()} under stage {stage}",
            f"The state of {type(optimizer).__name__} cannot be divided differently.",
            f"Resume with --num-processes {processes} and ZeRO stage {before}.",
        )
    with ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("state-*.safetensors"))]
        saved = _Saved(folder, files)
        saved.check_names(set(names))
        for flat in _flats(shares):
            mine = [share for share in shares if share.flat is flat]
            _fill(flat, mine, saved, WEIGHTS)
            if with_optimizer and layout["divisible"]:
                _load_optimizer(flat, mine, saved, optimizer)
    if with_optimizer and not layout["divisible"]:
        file = folder / f"optimizer-{0 if whole else distributed.rank()}.pt"
        states = torch.load(file, map_location=distributed.device(), weights_only=True)
        for flat, state in zip(_flats(shares), states, strict=True):
            optimizer.state[flat] = state


# ---- writing ---------------------------------------------------------------------------------------------------------


def _flats(shares: Sequence[Share]) -> list[Tensor]:
    """The optimizer's tensors, each once."""
    return list({id(share.flat): share.flat for share in shares}.values())


def _divisible(shares: Sequence[Share], optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer's state is one number per weight, except the step count. The same on every rank."""
    odd = [
        flat
        for flat in _flats(shares)
        for kind, value in optimizer.state.get(flat, {}).items()
        if kind != STEP and not (type(value) is Tensor and value.numel() == flat.numel())
    ]
    return not distributed.all_max(torch.tensor(float(len(odd)), device=distributed.device())).item()


def _tensors(
    shares: Sequence[Share], optimizer: torch.optim.Optimizer, divisible: bool
) -> Iterator[tuple[str, Tensor]]:
    for share in shares:
        place = f"{share.name}@{share.start}"
        yield f"{WEIGHTS}/{place}", share.of(share.flat)
        for kind, value in optimizer.state.get(share.flat, {}).items() if divisible else ():
            # a count may be a Python number or a tensor; a tensor of its own, since shares of one flat tensor share it
            yield f"{kind}/{place}", torch.as_tensor(value).clone() if kind == STEP else share.of(value)


def _parts(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if size >= PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.contiguous()
        size += tensor.numel() * tensor.element_size()
    yield part


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Saved:
    """The tensors of all ranks' files: kind -> parameter -> [(start, file, key)]."""

    def __init__(self, folder: Path, files: Sequence[Any]) -> None:
        self.folder = folder
        self.tensors: dict[str, dict[str, list[tuple[int, Any, str]]]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                kind, place = key.split("/", 1)
                name, start = place.rsplit("@", 1)
                self.tensors.setdefault(kind, {}).setdefault(name, []).append((int(start), file, key))

    def check_names(self, names: set[str]) -> None:
        saved = self.tensors.get(WEIGHTS, {}).keys()
        if unknown := saved - names:
            raise UserError(f"{self.folder}: has weights that the model does not train: {sorted(unknown)[:3]}")
        if missing := names - saved:
            raise UserError(f"{self.folder}: has no weights for {sorted(missing)[:3]}, which the model trains")

    def elements(self, kind: str, share: Share) -> Tensor | None:
        """The share's elements [count] of a kind; None where nothing was saved, as for a parameter without gradient."""
        found = self.tensors.get(kind, {}).get(share.name)
        if found is None:
            return None
        pieces, at = [], share.start
        for start, file, key in sorted(found, key=lambda piece: piece[0]):
            piece = file.get_slice(key)
            end = min(start + piece.get_shape()[0], share.start + share.count)
            if start <= at < end:
                pieces.append(piece[at - start : end - start])
                at = end
        if at != share.start + share.count:
            raise UserError(
                f"{self.folder}: {share.name} has no {kind} from element {at:,} on", remedy="The checkpoint is damaged."
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def steps(self, share: Share) -> Tensor | None:
        """The largest step count of a parameter's pieces."""
        found = [file.get_tensor(key) for _, file, key in self.tensors.get(STEP, {}).get(share.name, ())]
        return max(found) if found else None


def _fill(target: Tensor, shares: Sequence[Share], saved: _Saved, kind: str) -> None:
    """Copy a kind's elements into a tensor shaped as the shares' `flat`; elements without saved values stay."""
    whole = target.data.contiguous()
    for share in shares:
        elements = saved.elements(kind, share)
        if elements is not None:
            share.of(whole).copy_(elements)
    if whole.data_ptr() != target.data_ptr():
        target.data.copy_(whole)


def _load_optimizer(flat: Tensor, shares: Sequence[Share], saved: _Saved, optimizer: torch.optim.Optimizer) -> None:
    steps = [step for share in shares if (step := saved.steps(share)) is not None]
    if not steps:
        return
    state, step = optimizer.state[flat], max(steps)
    if not step.is_floating_point():
        state[STEP] = int(step)  # DeepSpeed's optimizers count with Python's numbers
    else:
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state[STEP] = step.to(flat.device if on_device else "cpu")
    for kind in saved.tensors.keys() - {WEIGHTS, STEP}:
        if kind not in state:
            state[kind] = torch.zeros_like(flat.detach())
        _fill(state[kind], shares, saved, kind)
