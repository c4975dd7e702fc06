"""The engine: one optimizer over one module, on one process or under DeepSpeed, with the same few calls.

The callers scale losses by the global number of tokens and the engine sums gradients over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf import distributed
from rlhf.config.base import AdamWConfig
from rlhf.core.errors import UserError
from rlhf.distributed.deepspeed_config import SET_BY_US, read_deepspeed
from rlhf.models.load import compute_dtype


def rate_scale(schedule: str, step: int, steps: int, warmup: int, first: int = 0) -> float:
    """The learning rate as a fraction of its peak: a linear climb, then the schedule, which falls to 0 at `steps`.

    Args:
        schedule: `constant`, `linear` or `cosine`.
        step: From 0.
        steps: Of the whole run.
        warmup: Steps of the climb.
        first: The climb starts at `first` / `warmup`: with 0 the first step has rate 0, with 1 the last step of the
            climb has the peak rate.
    """
    if step < warmup:
        return (step + first) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def cast_frozen_linears_(module: nn.Module, dtype: torch.dtype) -> list[tuple[nn.Module, Tensor]]:
    """Put the frozen float32 weights of matrix products into `dtype`.

    Autocast does the same, and keeps what it has rounded until it ends, but only of weights that are trained: frozen
    ones it would read whole and round again in every pass, for every token of a rollout. A weight that an embedding
    shares stays as it is.

    Returns:
        The layers, with the weights that they had.
    """
    before: list[tuple[nn.Module, Tensor]] = []
    if dtype == torch.float32:
        return before
    shared = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and id(layer.weight) not in shared:
            weight = layer.weight
            if weight.dtype == torch.float32 and not weight.requires_grad:
                layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
                before.append((layer, weight))
    return before


class Engine:
    """Plain torch: AdamW over float32 weights, autocast where the computation is in bfloat16.

    Args:
        module: The module to train; its calls go through `engine(...)`.
        groups: Optimizer groups `{"params": [...], "lr": float, "name": str}`.
        config: AdamW's settings and the gradient clipping.
        precision: auto, float32 or bfloat16.
    """

    stage = 0

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], config: AdamWConfig, precision: str):
        self.module = self._placed(module)
        self.config = config
        self.dtype = compute_dtype(precision)
        # fused: without temporaries as large as the weights, and in fewer operations
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self.rates = [group["lr"] for group in groups]
        self._parameters = [p for group in groups for p in group["params"]]

    def _placed(self, module: nn.Module) -> nn.Module:
        return module.to(distributed.device())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return self.module(*args, **kwargs)

    def autocast(self) -> Any:
        """A context in which parts of the module that are called directly compute in the engine's precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(distributed.device().type, dtype=self.dtype)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the last micro-batch before `step`."""
        del last
        loss.backward()

    def gradients_are_finite(self) -> bool:
        """False if the gradient since the last step is infinite or NaN on any rank. Call it before `step`."""
        # once a step, not once a micro-batch: what is not finite stays so in the sum
        return bool(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]).isfinite())

    def step(self, scale: float) -> float:
        """Clip, move the weights at `scale` times the peak rates, clear gradients; gives the norm before clipping."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * scale
        return self._step()

    def _step(self) -> float:
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    @contextmanager
    def gathered(self, part: nn.Module) -> Iterator[None]:
        """Inside, `part` of the module has its whole weights on this process and may be called by itself."""
        before = cast_frozen_linears_(part, self.dtype)
        try:
            with self.autocast():
                yield
        finally:
            for layer, weight in before:
                layer.weight = weight

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; every rank calls it."""
        trainable = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        torch.save({"weights": trainable, "optimizer": self.optimizer.state_dict()}, folder / "engine.pt")

    def load(self, folder: Path, optimizer: bool = True) -> None:
        """Read back what `save` wrote; without `optimizer` only the weights matter afterwards.

        Raises:
            UserError: The checkpoint does not fit the model.
        """
        # Mapped, not read, where the optimizer state would only take memory.
        state = torch.load(
            folder / "engine.pt", map_location=distributed.device(), weights_only=True, mmap=not optimizer
        )
        unknown = self.module.load_state_dict(state["weights"], strict=False).unexpected_keys
        if unknown:
            raise UserError(f"{folder}/engine.pt: contains parameters that the model does not have: {unknown[:3]}")
        if optimizer:
            self.optimizer.load_state_dict(state["optimizer"])

    def freeze(self, model: nn.Module) -> Any:
        """A frozen model on this process's device, which computes what an equal one in training computes.

        Autocast rounds the weights of matrix products alone. So these are kept rounded and all else in float32: the
        reference then gives the very log-probs of the policy that is its equal, in bfloat16 too.
        """
        cast_frozen_linears_(model.requires_grad_(False).eval(), self.dtype)
        if self.dtype != torch.float32:
            model.forward = self.autocast()(model.forward)
        return self._placed(model)


class DeepSpeedEngine(Engine):
    """The same over DeepSpeed, ZeRO stage 0 to 3 as its JSON says.

    `settings` are the JSON's; batch sizes, clipping and bfloat16 are set here, since they follow from our config.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        config: AdamWConfig,
        precision: str,
        settings: dict[str, Any],
    ) -> None:
        import deepspeed

        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        super().__init__(module, groups, config, precision)
        # Stage 0 in float32 leaves whole, summed gradients to the optimizer: looked at and clipped as by plain torch.
        self._whole = self.stage == 0 and self.dtype == torch.float32
        self._finite = torch.ones((), device=distributed.device())
        for parameter in self._parameters if not self._whole else ():
            parameter.register_hook(self._watch)
        kept = {key: value for key, value in settings.items() if key not in SET_BY_US}
        self.settings = kept | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self._whole else config.max_grad_norm,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "steps_per_print": 2**31,
        }
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, model_parameters=self._parameters, optimizer=self.optimizer, config=self.settings
        )
        if self.deepspeed.zero_optimization_stage() != self.stage:
            raise UserError(f"DeepSpeed runs ZeRO stage {self.deepspeed.zero_optimization_stage()}, not {self.stage}")
        self.module = self.deepspeed.module

    def _placed(self, module: nn.Module) -> nn.Module:
        # ZeRO-3 moves one parameter at a time, so that no device has to hold the whole.
        return module if self.stage == 3 else super()._placed(module)

    def _watch(self, gradient: Tensor) -> None:
        # The sum is infinite or NaN if any element is; it sees the gradient before any rank or optimizer does.
        self._finite = self._finite * torch.isfinite(gradient.float().sum())

    def gradients_are_finite(self) -> bool:
        if self._whole:
            return super().gradients_are_finite()
        ok = distributed.all_sum(1 - self._finite).item() == 0
        self._finite = torch.ones_like(self._finite)
        return ok

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def autocast(self) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the callers' losses are shares of a global mean, to be summed.
        self.deepspeed.backward(loss * distributed.world_size())
        if not last:
            self.deepspeed.step()  # counts the micro-step; weights move at the boundary only

    def step(self, scale: float) -> float:
        for group, rate in zip(self.deepspeed.optimizer.param_groups, self.rates):
            group["lr"] = rate * scale
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm) if self._whole else None
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm() if norm is None else norm)

    @contextmanager
    def gathered(self, part: nn.Module) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(list(part.parameters())):
            remove_hooks(self.deepspeed)  # ranks stop generating at different lengths; hooks would wait for each other
            try:
                yield
            finally:
                add_hooks(self.deepspeed)

    def save(self, folder: Path) -> None:
        # Frozen weights are read from where the run has them; a base under adapters is most of the model.
        self.deepspeed.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)

    def load(self, folder: Path, optimizer: bool = True) -> None:
        found, _ = self.deepspeed.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        if found is None:
            raise UserError(f"{folder}: DeepSpeed finds no state of its own there", "Was the JSON changed?")

    def freeze(self, model: nn.Module) -> Any:
        # DeepSpeed trains a policy whose weights are all in the computation's dtype; so is what is frozen beside it.
        model = self._placed(model.requires_grad_(False).eval().to(self.dtype))
        if self.stage < 3:
            return model
        import deepspeed

        keep = ("zero_optimization", "bf16", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        settings = {key: self.settings[key] for key in (*keep, "steps_per_print")}
        settings["zero_optimization"] = {
            key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"
        }
        frozen, *_ = deepspeed.initialize(model=model, config=settings)
        return frozen


def make_engine(
    module: nn.Module, groups: Sequence[dict[str, Any]], config: AdamWConfig, precision: str, path: str | None
) -> Engine:
    """The engine for the DeepSpeed JSON at `path`; without one, plain torch for one process, ZeRO 0 for several."""
    kept = [group for group in groups if group["params"]]
    if path is None and distributed.world_size() == 1:
        return Engine(module, kept, config, precision)
    settings = {"zero_optimization": {"stage": 0}} if path is None else read_deepspeed(path)
    return DeepSpeedEngine(module, kept, config, precision, settings)
