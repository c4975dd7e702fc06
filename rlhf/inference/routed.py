"""Adapters in the layers of a model, chosen row by row: each row of a batch passes through its own task's adapter.

The rows of a task are brought together, so a layer applies all adapters in two batched matrix products, and reads the
weights of each adapter once, however many tasks are in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.core.errors import UserError
from rlhf.models.bottleneck import ACTIVATIONS


class Rows:
    """Which task each row of the next forward pass belongs to. Shared by all routed layers of a model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tasks: list[int] = []
        self.index = self.gather = self.scatter = self.present = torch.empty(0, dtype=torch.int64, device=device)
        """The task of each row [rows]; rows of each present task in blocks of equal size [present x size]; where each
        row is in them [rows]; the tasks [present]."""

    def select(self, tasks: Sequence[int]) -> None:
        """Set the task of each row."""
        if list(tasks) == self.tasks:
            return
        self.tasks = list(tasks)
        present = sorted(set(self.tasks))
        members = {task: [row for row, one in enumerate(self.tasks) if one == task] for task in present}
        size = max(map(len, members.values()))
        blocks = [rows + rows[-1:] * (size - len(rows)) for rows in members.values()]
        place = {row: index * size + at for index, rows in enumerate(members.values()) for at, row in enumerate(rows)}
        self.gather = torch.tensor(blocks, device=self.device).flatten()
        self.scatter = torch.tensor([place[row] for row in range(len(self.tasks))], device=self.device)
        self.present = torch.tensor(present, device=self.device)
        self.index = torch.tensor(self.tasks, device=self.device)

    def of(self, values: Tensor) -> Tensor:
        """The slices [present, ...] of values [tasks, ...] for the present tasks."""
        return values if len(self.present) == len(values) else values.index_select(0, self.present)

    def blocks(self, x: Tensor) -> Tensor:
        """Rows [rows, ..., width] brought together by task: [present, rows of a task x ..., width]."""
        return x.index_select(0, self.gather).reshape(len(self.present), -1, x.shape[-1])

    def unblocked(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Blocks back in the order of the rows, in the shape of `like`."""
        return blocks.reshape(-1, *like.shape[1:]).index_select(0, self.scatter)

    def check(self, x: Tensor, name: str) -> None:
        """Refuse a layer whose input has lost the rows of the batch, such as an expert's."""
        if x.shape[0] != len(self.tasks):
            raise UserError(
                f"--adapter: the layer {name} gets {x.shape[0]:,} rows for a batch of {len(self.tasks):,}",
                "Adapters of a layer that mixes the rows of a batch (an expert) cannot be chosen row by row.",
                "Use one adapter at a time: the run folder in place of MODEL.",
            )


class AdapterChange:
    """What the adapters of all tasks do to the module `name` of the base: to its input, its output, or both."""

    def __init__(self, rows: Rows, name: str) -> None:
        self.rows, self.name = rows, name

    def before(self, x: Tensor) -> Tensor:
        """The module's input, changed."""
        return x

    def after(self, x: Tensor, out: Any) -> Any:
        """The module's output, changed; `x` is its input."""
        return out


def attach(module: nn.Module, change: AdapterChange) -> None:
    """Have a module's forward pass use `change`."""

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change.before(arguments[0]), *arguments[1:]) if arguments else arguments  # an attention has keywords

    def after(_: nn.Module, arguments: tuple[Any, ...], out: Any) -> Any:
        return change.after(arguments[0] if arguments else out, out)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


# ---- the layers of all tasks ---------------------------------------------------------------------------------------
# Each class takes the tensors of each task's adapter for the module `name` (none if it has no part there), the
# adapters' configs, and the model whose dtype and device the weights get.


class LowRank(AdapterChange):
    """LoRA: out + x A_t' B_t' (Hu et al. 2021, eq. 3), with the scale in B. Ranks are filled up with zeros."""

    def __init__(self, rows: Rows, name: str, parts: Sequence[Any], configs: Sequence[Any], model: Any) -> None:
        super().__init__(rows, name)
        self.a = _stacked([part and part["lora_A"].T for part in parts], model)
        self.b = _stacked(
            [part and part["lora_B"].T * self._scale(part, one) for part, one in zip(parts, configs)], model
        )

    def _scale(self, part: Any, config: Any) -> float:
        rank = part["lora_A"].shape[0]
        alpha = (config.get("alpha_pattern") or {}).get(self.name, config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        self.rows.check(x, self.name)
        change = torch.bmm(torch.bmm(self.rows.blocks(x), self.rows.of(self.a)), self.rows.of(self.b))
        return out + self.rows.unblocked(change, out)


class Scale(AdapterChange):
    """IA3: the module's input or output times a learned vector (Liu et al. 2022); ones for tasks without it."""

    def __init__(self, rows: Rows, name: str, parts: Sequence[Any], configs: Sequence[Any], model: Any) -> None:
        super().__init__(rows, name)
        # PEFT stores [out, 1] where the output is scaled, and [1, in] where the input is
        kinds = {part["ia3_l"].shape[0] == 1 for part in parts if part}
        if len(kinds) > 1:
            raise UserError(
                f"--adapter: some tasks scale the input of {name} and others its output", remedy="Use one kind."
            )
        self.on_input = kinds.pop()
        self.scales = _stacked([part and part["ia3_l"].flatten() for part in parts], model, fill=1.0)

    def _scaled(self, x: Tensor) -> Tensor:
        self.rows.check(x, self.name)
        chosen = self.scales[self.rows.index]
        return x * chosen[(slice(None), *[None] * (x.dim() - 2))]

    def before(self, x: Tensor) -> Tensor:
        return self._scaled(x) if self.on_input else x

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        return out if self.on_input else self._scaled(out)


class Bottleneck(AdapterChange):
    """A bottleneck adapter after the module: out + up(activation(down(out))) (Houlsby et al. 2019).

    Sizes are filled up with zeros, which every activation maps to zero.
    """

    def __init__(self, rows: Rows, name: str, parts: Sequence[Any], configs: Sequence[Any], model: Any) -> None:
        super().__init__(rows, name)
        kinds = {config["activation"] for part, config in zip(parts, configs) if part}
        if len(kinds) > 1:
            raise UserError(
                f"--adapter: the tasks' bottlenecks have the activations {', '.join(sorted(kinds))}",
                remedy="Mix tasks of one activation.",
            )
        self.activation = ACTIVATIONS[kinds.pop()]
        self.down, self.up = (
            (
                _stacked([part and part[key].T for part in parts], model),
                _stacked([part and part[f"{key}.bias"][None] for part in parts], model),
            )
            for key in ("bottleneck_down", "bottleneck_up")
        )

    def after(self, x: Tensor, out: Any) -> Any:
        if isinstance(out, tuple):  # an attention returns its weights as well, experts their router's logits
            return (self.after(x, out[0]), *out[1:])
        self.rows.check(out, self.name)
        (down, down_bias), (up, up_bias) = self.down, self.up
        hidden = torch.baddbmm(self.rows.of(down_bias), self.rows.blocks(out), self.rows.of(down))
        change = torch.baddbmm(self.rows.of(up_bias), self.activation(hidden), self.rows.of(up))
        return out + self.rows.unblocked(change, out)


def _stacked(tensors: Sequence[Tensor | None], model: Any, fill: float = 0.0) -> Tensor:
    """One tensor [tasks, ...]: each task's own, filled up to the largest sizes; `fill` alone for a task without one."""
    sizes = map(max, zip(*(one.shape for one in tensors if one is not None)))
    found = torch.full((len(tensors), *sizes), fill, dtype=model.dtype, device=model.device)
    for row, one in zip(found, tensors):
        if one is not None:
            row[tuple(map(slice, one.shape))] = one
    return found


IN_LAYERS: dict[str, Callable[..., AdapterChange]] = {"LORA": LowRank, "IA3": Scale, "BOTTLENECK": Bottleneck}
"""PEFT's type of an adapter -> what makes a layer of all tasks."""
