"""Adapters in the layers of a model, chosen row by row: each row of a batch passes through its own task's adapter.

The rows of a task are brought together, so a layer applies all adapters in two batched matrix products, and reads the
weights of each adapter once, however many tasks are in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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


class Change(Protocol):
    """What a task's adapter does to one module of the base."""

    def before(self, x: Tensor) -> Tensor:
        """The module's input, changed."""
        ...

    def after(self, x: Tensor, out: Any) -> Any:
        """The module's output, changed."""
        ...


class LowRank:
    """LoRA: out + x A_t' B_t' (Hu et al. 2021, eq. 3), with the scale in B."""

    def __init__(self, rows: Rows, name: str, a: Tensor, b: Tensor) -> None:
        """
        Args:
            rows: Which task each row belongs to.
            name: The module.
            a: [tasks, rank, in]; zeros for tasks without it.
            b: [tasks, out, rank].
        """
        self.rows, self.name = rows, name
        self.a, self.b = a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous()

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        self.rows.check(x, self.name)
        change = torch.bmm(torch.bmm(self.rows.blocks(x), self.rows.of(self.a)), self.rows.of(self.b))
        return out + self.rows.unblocked(change, out)


class Bottleneck:
    """A bottleneck adapter after the module: out + up(activation(down(out))) (Houlsby et al. 2019)."""

    def __init__(
        self, rows: Rows, name: str, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor],
        activation: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """
        Args:
            rows: Which task each row belongs to.
            name: The module.
            down: Weights [tasks, width, size] and biases [tasks, 1, size]; zeros for tasks without it.
            up: Weights [tasks, size, width] and biases [tasks, 1, width].
            activation: The nonlinearity of all tasks.
        """
        self.rows, self.name, self.down, self.up, self.activation = rows, name, down, up, activation

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, out: Any) -> Any:
        if isinstance(out, tuple):  # an attention returns its weights as well, experts their router's logits
            return (self.after(x, out[0]), *out[1:])
        self.rows.check(out, self.name)
        (down, down_bias), (up, up_bias) = self.down, self.up
        hidden = torch.baddbmm(self.rows.of(down_bias), self.rows.blocks(out), self.rows.of(down))
        change = torch.baddbmm(self.rows.of(up_bias), self.activation(hidden), self.rows.of(up))
        return out + self.rows.unblocked(change, out)


class Scale:
    """IA3: the module's input or output times a learned vector (Liu et al. 2022)."""

    def __init__(self, rows: Rows, name: str, scales: Tensor, on_input: bool) -> None:
        """
        Args:
            rows: Which task each row belongs to.
            name: The module.
            scales: [tasks, width]; ones for tasks without it.
            on_input: Whether the input is scaled, not the output.
        """
        self.rows, self.name, self.scales, self.on_input = rows, name, scales, on_input

    def _scaled(self, x: Tensor) -> Tensor:
        self.rows.check(x, self.name)
        chosen = self.scales[self.rows.index]
        return x * chosen[(slice(None), *[None] * (x.dim() - 2))]

    def before(self, x: Tensor) -> Tensor:
        return self._scaled(x) if self.on_input else x

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        return out if self.on_input else self._scaled(out)


def attach(module: nn.Module, change: Change) -> None:
    """Have a module's forward pass use `change`."""

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change.before(arguments[0]), *arguments[1:]) if arguments else arguments  # an attention has keywords

    def after(_: nn.Module, arguments: tuple[Any, ...], out: Any) -> Any:
        return change.after(arguments[0] if arguments else out, out)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


# ---- the layers of all tasks ---------------------------------------------------------------------------------------
# Each function takes the tensors of each task's adapter for the module `name` (none if it has no part there), the
# adapters' configs, and the model whose dtype and device the weights get.


def low_rank(rows: Rows, name: str, parts: Sequence[Any], configs: Sequence[Any], model: Any) -> LowRank:
    """A LoRA layer of all tasks: ranks are filled up with zeros, and the scale is in B."""
    some = next(part for part in parts if part)
    rank = max(part["lora_A"].shape[0] for part in parts if part)
    a = torch.zeros(len(parts), rank, some["lora_A"].shape[1], dtype=model.dtype, device=model.device)
    b = torch.zeros(len(parts), some["lora_B"].shape[0], rank, dtype=model.dtype, device=model.device)
    for index, (part, config) in enumerate(zip(parts, configs)):
        if part:
            own = part["lora_A"].shape[0]
            alpha = (config.get("alpha_pattern") or {}).get(name, config["lora_alpha"])
            factor = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
            a[index, :own], b[index, :, :own] = part["lora_A"], part["lora_B"] * factor
    return LowRank(rows, name, a, b)


def scale(rows: Rows, name: str, parts: Sequence[Any], configs: Sequence[Any], model: Any) -> Scale:
    """An IA3 layer of all tasks."""
    width = next(part["ia3_l"].numel() for part in parts if part)
    # PEFT stores [out, 1] where the output is scaled, and [1, in] where the input is
    kinds = {part["ia3_l"].shape[0] == 1 for part in parts if part}
    if len(kinds) > 1:
        raise UserError(
            f"--adapter: some tasks scale the input of {name} and others its output", remedy="Use one kind."
        )
    scales = torch.ones(len(parts), width, dtype=model.dtype, device=model.device)
    for index, part in enumerate(parts):
        if part:
            scales[index] = part["ia3_l"].flatten()
    return Scale(rows, name, scales, on_input=kinds.pop())


def bottleneck(rows: Rows, name: str, parts: Sequence[Any], configs: Sequence[Any], model: Any) -> Bottleneck:
    """A bottleneck layer of all tasks: sizes are filled up with zeros, which every activation maps to zero."""
    kinds = {config["activation"] for part, config in zip(parts, configs) if part}
    if len(kinds) > 1:
        raise UserError(
            f"--adapter: the tasks' bottlenecks have the activations {', '.join(sorted(kinds))}",
            remedy="Mix tasks of one activation.",
        )
    size = max(part["bottleneck_down"].shape[0] for part in parts if part)
    width = next(part["bottleneck_down"].shape[1] for part in parts if part)
    shapes = {"bottleneck_down": (width, size), "bottleneck_up": (size, width)}
    found = {}
    for key, (wide, narrow) in shapes.items():
        weight = torch.zeros(len(parts), wide, narrow, dtype=model.dtype, device=model.device)
        bias = torch.zeros(len(parts), 1, narrow, dtype=model.dtype, device=model.device)
        for index, part in enumerate(parts):
            if part:
                own = part[key].T
                weight[index, : own.shape[0], : own.shape[1]] = own
                bias[index, 0, : own.shape[1]] = part[f"{key}.bias"]
        found[key] = (weight, bias)
    return Bottleneck(rows, name, found["bottleneck_down"], found["bottleneck_up"], ACTIVATIONS[kinds.pop()])


IN_LAYERS: dict[str, Callable[..., Change]] = {"LORA": low_rank, "IA3": scale, "BOTTLENECK": bottleneck}
"""PEFT's type of an adapter -> what makes a layer of all tasks."""
