"""The engine of all stages: one optimizer over one module, with plain torch or DeepSpeed behind the same calls.

Callers divide a loss by the global number of its items; the engine sums gradients over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf import distributed
from rlhf.config.base import AdamWConfig
from rlhf.config.optimizers import refuse_optimizer
from rlhf.core.console import is_main
from rlhf.core.errors import UserError
from rlhf.core.freeing import freed_at_once
from rlhf.distributed.deepspeed_json import SET_BY_US, deepspeed_settings, with_sizes
from rlhf.models.load import compute_dtype
from rlhf.training.deepspeed_shares import deepspeed_shares, refresh_weights
from rlhf.training.out_of_memory import free_memory, refuse_other_errors
from rlhf.training.placing import divide, flattened_one_by_one, place
from rlhf.training.saved_state import Share, load_state, save_state

T = TypeVar("T")
Found = TypeVar("Found")


def cast_frozen_linears_(module: nn.Module, dtype: torch.dtype, tied: bool = False) -> list[tuple[nn.Module, Tensor]]:
    """Cast the frozen float32 weights of linear layers to `dtype`, in place.

    Autocast caches the casts of trained weights only. It would cast frozen ones again in every forward pass, that is,
    for every token of a rollout.

    Args:
        module: The module.
        dtype: Nothing is done for float32.
        tied: Give heads that are tied to an embedding a copy of their own, in `dtype`; else leave them as they are.

    Returns:
        The changed layers with their float32 weights.
    """
    before: list[tuple[nn.Module, Tensor]] = []
    if dtype == torch.float32:
        return before
    shared = set() if tied else {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and id(layer.weight) not in shared:
            weight = layer.weight
            if weight.dtype == torch.float32 and not weight.requires_grad:
                layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
                before.append((layer, weight))
    return before


class Engine:
    """Plain torch: an optimizer over float32 weights, with autocast for bfloat16.

    Args:
        module: The module to train.
        groups: Optimizer groups `{"params": [...], "lr": float, "name": str}`.
        config: The optimizer, its settings and the gradient clipping.
        precision: auto, float32 or bfloat16.
    """

    stage = 0
    repeatable = True
    """Whether passes can be repeated before `step`: they need no other rank, and `forget` clears their gradients."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], config: AdamWConfig, precision: str):
        self.config = config
        self.dtype = compute_dtype(precision)
        self.module = self._placed(module)
        self.forward: Callable[..., Any] = self.module
        """Calls the module in the engine's precision."""
        if isinstance(autocast := self.autocast(), torch.autocast):  # one context: calls must not be nested
            self.forward = autocast(self.module.__call__)
        self.optimizer = config.algorithm(groups, **config.model_dump(include={"betas", "eps", "weight_decay"}))
        self.rates = [group["lr"] for group in groups]
        self._parameters = [p for group in groups for p in group["params"]]

    def _placed(self, module: nn.Module) -> nn.Module:
        return module.to(distributed.device())

    def autocast(self) -> Any:
        """A context in which parts of the module that are called directly compute in the engine's precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(distributed.device().type, dtype=self.dtype)

    def accumulate(
        self, batches: Callable[[], Sequence[T]], loss_of: Callable[[int, T], tuple[Tensor, Found]], smaller: str
    ) -> list[Found] | None:
        """Run the forward and backward passes of an optimizer step; every rank calls it.

        Args:
            batches: Builds this rank's micro-batches.
            loss_of: Given a micro-batch's index and the micro-batch: its loss, and what else is wanted of it. Where
                passes are `repeatable` it must not wait for other ranks.
            smaller: A config override that makes the passes smaller, for the error: `batch.micro_batch_size=4`.

        Returns:
            What else `loss_of` gave for each micro-batch. None, on all ranks, if a rank ran out of memory: then the
            gradients and activations of all passes are freed. The weights are unchanged.

        Raises:
            UserError: Memory ran out, and the engine cannot repeat passes.
        """
        found: list[Found] = []
        failed, parts, batch, loss = False, None, None, None
        try:
            parts = batches()
            for i, batch in enumerate(parts):
                loss, one = loss_of(i, batch)
                self.backward(loss, last=i == len(parts) - 1)
                found.append(one)
        except (RuntimeError, MemoryError) as error:
            refuse_other_errors(error, self.stage, self.repeatable, smaller)
            failed, parts, batch, loss = True, None, None, None
        if not self.repeatable or not self._on_any_rank(failed):
            return found
        self.forget()
        free_memory()
        return None

    def _on_any_rank(self, flag: bool) -> bool:
        return flag  # one process

    def largest(self, count: Tensor) -> int:
        """The largest `count` of all ranks where they must make the same passes (ZeRO stage 3; every rank calls it),
        elsewhere this rank's own."""
        return int(distributed.all_max(count)) if self.stage == 3 else int(count)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the last micro-batch before `step`."""
        del last
        loss.backward()

    def forget(self) -> None:
        """Remove the gradients of the passes since the last step; only where `repeatable`."""
        self.optimizer.zero_grad()

    def step(self, scale: float) -> float | None:
        """Clip the gradient, update the weights at `scale` times the peak rates, clear the gradient.

        Returns:
            The gradient's norm before clipping. None, on all ranks, if it is infinite or NaN on any rank: then nothing
            was updated. One check a step suffices: a gradient that is not finite stays so when others are added.
        """
        norm = self._clip()
        if norm is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * scale
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norm

    def _clip(self) -> float | None:
        """Clip the gradient to the largest norm; gives its norm before, None if that is not finite."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not norm.isfinite():
            return None
        nn.utils.clip_grads_with_norm_(self._parameters, self.config.max_grad_norm, norm)
        return float(norm)

    @contextmanager
    def gathered(self, part: nn.Module, whole: bool = True) -> Iterator[None]:
        """Within this context `part` of the module has its whole weights on this process and may be called directly.

        Args:
            part: A part of the module.
            whole: False if it is not called, and its weights are gathered and read one module after another.
        """
        before = cast_frozen_linears_(part, self.dtype, tied=whole)
        try:
            with self.autocast():
                yield
        finally:
            for layer, weight in before:
                layer.weight = weight

    def save(self, folder: Path) -> None:
        """Write the trained weights and the optimizer state; every rank calls it."""
        save_state(folder, self._shares(), self.optimizer, self.stage, self.stage > 0 or is_main())

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read back what `save` wrote, by any number of processes under any ZeRO stage. Every rank calls it.

        Args:
            folder: The checkpoint.
            optimizer: Read the optimizer state too.

        Raises:
            UserError: The checkpoint does not fit the model.
        """
        load_state(folder, [name for name, _ in self._named()], self._shares(), self.optimizer, self.stage, optimizer)

    def _shares(self) -> list[Share]:
        """The parts of the trained parameters that this rank's optimizer updates."""
        return [Share(name, 0, p.numel(), p) for name, p in self._named()]

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [(names[id(parameter)], parameter) for parameter in self._parameters]

    def freeze(self, model: nn.Module) -> Any:
        """Put a frozen model on this process's device, such that it computes exactly as a trained one with its weights.

        Autocast casts only the weights of linear layers, so these are stored in bfloat16 and all others in float32.
        """
        cast_frozen_linears_(model.requires_grad_(False).eval(), self.dtype)
        if self.dtype != torch.float32:
            model.forward = self.autocast()(model.forward)
        return self._placed(model)


class DeepSpeedEngine(Engine):
    """The same with DeepSpeed, at the ZeRO stage of its JSON.

    `settings` are those of the JSON. Batch sizes, clipping and bfloat16 are set here, from the stage's config.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        config: AdamWConfig,
        precision: str,
        settings: dict[str, Any],
    ) -> None:
        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        self.repeatable = self.stage == 0
        dtype = compute_dtype(precision)
        # Stage 0 in float32 has whole, summed gradients, which are checked and clipped as with plain torch.
        self._whole = self.stage == 0 and dtype == torch.float32
        sizes = [parameter.numel() for group in groups for parameter in group["params"]]
        settings = with_sizes(settings, sum(sizes), max(sizes, default=0))
        kept = {key: value for key, value in settings.items() if key not in SET_BY_US}
        self.settings = kept | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self._whole else config.max_grad_norm,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,  # OPTIMIZERS says which ones work, and tests run them
        }
        with freed_at_once():
            self._build(module, groups, config, precision)

    def _build(self, module: nn.Module, groups: list[dict[str, Any]], config: AdamWConfig, precision: str) -> None:
        import deepspeed

        super().__init__(module, groups, config, precision)
        self._finite = torch.ones((), device=distributed.device())
        for parameter in self._parameters if not self._whole else ():
            parameter.register_hook(self._watch)
        with flattened_one_by_one():
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, model_parameters=self._parameters, optimizer=self.optimizer, config=self.settings
            )
        if self.deepspeed.zero_optimization_stage() != self.stage:
            raise UserError(f"DeepSpeed runs ZeRO stage {self.deepspeed.zero_optimization_stage()}, not {self.stage}")
        self.forward, self.module = self.deepspeed, self.deepspeed.module

    def _placed(self, module: nn.Module) -> nn.Module:
        return divide(module, self.dtype, self.settings) if self.stage == 3 else place(module, self.dtype)

    def _watch(self, gradient: Tensor) -> None:
        # The sum is infinite or NaN if any element is. Hooks run before gradients are reduced over ranks.
        self._finite = self._finite * torch.isfinite(gradient.float().sum())

    def autocast(self) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        # At stage 0 it is `step` that sums gradients over ranks, so that no rank waits for one whose pass has failed.
        self.deepspeed.set_gradient_accumulation_boundary(last and self.stage > 0)
        # DeepSpeed averages over ranks, but the losses of the ranks are parts of a global mean, to be summed.
        self.deepspeed.backward(loss * distributed.world_size())
        if not last:
            self.deepspeed.step()  # counts the micro-step; weights move at the boundary only

    def _on_any_rank(self, flag: bool) -> bool:
        return distributed.any_rank(flag)

    def forget(self) -> None:
        self.deepspeed.optimizer.zero_grad()
        self._finite = torch.ones_like(self._finite)

    def step(self, scale: float) -> float | None:
        if self.stage == 0:
            self.deepspeed.set_gradient_accumulation_boundary(True)
            self.deepspeed.allreduce_gradients()
        norm = self._clip() if self._whole else None  # elsewhere DeepSpeed clips in its own step
        if norm is None if self._whole else self._some_rank_is_not_finite():
            return None
        for group, rate in zip(self.deepspeed.optimizer.param_groups, self.rates):
            group["lr"] = rate * scale
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm()) if norm is None else norm

    def _some_rank_is_not_finite(self) -> bool:
        count = distributed.all_sum(1 - self._finite).item()
        self._finite = torch.ones_like(self._finite)
        return count > 0

    @contextmanager
    def gathered(self, part: nn.Module, whole: bool = True) -> Iterator[None]:
        if self.stage < 3 or not whole:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(list(part.parameters())):
            remove_hooks(self.deepspeed)  # ranks generate different lengths, and hooks would wait for each other
            try:
                yield
            finally:
                add_hooks(self.deepspeed)

    def load(self, folder: Path, optimizer: bool = True) -> None:
        super().load(folder, optimizer)
        if not self._whole:
            refresh_weights(self.deepspeed.optimizer, self.stage)

    def _shares(self) -> list[Share]:
        if self._whole:
            return super()._shares()
        return deepspeed_shares(self._named(), self.deepspeed.optimizer, self.stage)

    def freeze(self, model: nn.Module) -> Any:
        # DeepSpeed trains a policy whose weights are all in the compute dtype, so frozen models are too.
        with freed_at_once():
            return self._frozen(model.requires_grad_(False).eval())

    def _frozen(self, model: nn.Module) -> Any:
        if self.stage < 3:
            return place(model, self.dtype)
        import deepspeed

        keep = ("zero_optimization", "bf16", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        settings = {key: self.settings[key] for key in (*keep, "steps_per_print")}
        settings["zero_optimization"] = {
            key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"
        }
        frozen, *_ = deepspeed.initialize(model=divide(model, self.dtype, settings), config=settings)
        return frozen


def make_engine(
    module: nn.Module, groups: Sequence[dict[str, Any]], config: AdamWConfig, precision: str, path: str | None
) -> Engine:
    """The engine for the DeepSpeed JSON at `path`; without one, plain torch for one process, ZeRO-0 for several."""
    kept = [group for group in groups if group["params"]]
    settings = deepspeed_settings(path, distributed.world_size())
    refuse_optimizer(config.algorithm, settings, compute_dtype(precision) == torch.bfloat16)
    if settings is None:
        return Engine(module, kept, config, precision)
    return DeepSpeedEngine(module, kept, config, precision, settings)
