"""Between our configs and run folders and transformers' Trainer, which SFT and the reward model ride on.

A stage derives its trainer from `StageTrainer` (before TRL's SFTTrainer, where it uses that) and says what `loss`,
`evaluate_records` and `count_items` are. Then `fit` trains, resumes, keeps whole checkpoints, ends with the best.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from rlhf import distributed
from rlhf.config.base import SupervisedConfig
from rlhf.core.console import is_main, say
from rlhf.core.errors import UserError
from rlhf.distributed.deepspeed_config import read_deepspeed
from rlhf.models.load import compute_dtype, recompute_activations
from rlhf.models.merging import put_trained_state, trained_state
from rlhf.models.scalar import ScalarModel
from rlhf.runs.checkpoint import rng_state, set_rng_state, world_size_of
from rlhf.runs.run import Run
from rlhf.training.callback import ReporterCallback
from rlhf.training.epoch_order import EpochSampler

Config = SupervisedConfig
A = TypeVar("A", bound=TrainingArguments)

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


# ---- arguments -----------------------------------------------------------------------------------------------------


def training_arguments(config: Config, run: Run, cls: type[A] = TrainingArguments, **more: Any) -> A:  # type: ignore[assignment]
    """The Trainer's arguments for a stage's config. Make them after the model: they switch DeepSpeed's hooks on.

    Args:
        cls: TrainingArguments or TRL's SFTConfig.
        more: Further arguments of that class.

    Raises:
        UserError: The batch does not divide by the processes, or the DeepSpeed JSON cannot be used.
    """
    share, rest = divmod(config.batch.batch_size, distributed.world_size())
    micro = min(config.batch.micro_batch_size, share)
    if rest or share % max(micro, 1):
        raise UserError(
            f"batch.batch_size: {config.batch.batch_size} records are no multiple of {distributed.world_size()} "
            f"processes x batch.micro_batch_size {config.batch.micro_batch_size}",
            remedy="Change one of the three.",
        )
    optimizer = config.optimizer
    values: dict[str, Any] = {
        "output_dir": str(run.path),
        "seed": config.seed,
        "data_seed": config.seed,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "num_train_epochs": config.batch.epochs,
        "optim": "adamw_torch",
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": SCHEDULES[optimizer.schedule],
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "average_tokens_across_devices": False,  # StageTrainer counts over ranks itself
        "bf16": compute_dtype(config.precision) == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": _deepspeed(config),
        "ddp_timeout": config.timeout_seconds,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "gradient_checkpointing": None,  # StageTrainer switches it on itself; TRL's default is on
        "logging_steps": config.log.every,
        "logging_nan_inf_filter": False,
        "save_steps": config.checkpoints.every,
        "eval_steps": config.eval.every,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": list(config.log.report_to) or "none",
        "run_name": run.path.name,
        "disable_tqdm": True,
        "log_level": "error",
    }
    # It says that DeepSpeed accumulates gradients while accelerate does not, which is how the Trainer wants it.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    return cls(**values | more)


def _deepspeed(config: Config) -> dict[str, Any] | None:
    """The DeepSpeed settings for the Trainer; None for one process that names no file."""
    if config.deepspeed is None and distributed.world_size() == 1:
        return None
    settings = read_deepspeed(config.deepspeed) if config.deepspeed else {"zero_optimization": {"stage": 0}}
    return settings | {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "steps_per_print": 2**31,
    }


# ---- the trainer ---------------------------------------------------------------------------------------------------


class StageTrainer(Trainer):
    """A Trainer whose checkpoints are whole or absent, whose result is the best of them, and that resumes exactly.

    Several processes, and one that names a DeepSpeed JSON, have a process group already
    (`rlhf.distributed.process_group.start`).

    Args:
        config: The stage's config.
        run: Its run folder.
        parts: What transformers' Trainer takes: model, args (of `training_arguments`), train_dataset, data_collator,
            and eval_dataset, which may be empty. A column `length` serves to batch rows of similar length.

    Raises:
        UserError: The Trainer does not see all processes, or the tuning method does not work with the other options.
    """

    loss_is_scaled_for_ga = True  # `loss` gives shares of the whole step's loss
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, config: Config, run: Run, **parts: Any) -> None:
        self.config, self.run = config, run
        self.checkpoints = run.checkpoints(config.checkpoints.keep)
        held_out = parts.pop("eval_dataset", None) or None  # None where it is empty
        args = parts["args"]
        steps = math.ceil(config.batch.epochs * math.ceil(len(parts["train_dataset"]) / config.batch.batch_size))
        args.max_steps = config.batch.max_steps or steps
        args.warmup_steps = int(config.optimizer.warmup * args.max_steps)
        if config.gradient_checkpointing:
            checkpoint_activations(parts["model"], _zero_stage(args) == 3)
        super().__init__(eval_dataset=held_out, **parts)
        args.eval_strategy = IntervalStrategy.STEPS if held_out is not None else IntervalStrategy.NO
        self.tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self.remove_callback(PrinterCallback)
        self.reporter = ReporterCallback(run)
        self.add_callback(self.reporter)
        if self.accelerator.num_processes != distributed.world_size():
            raise UserError(
                f"accelerate sees {self.accelerator.num_processes} of {distributed.world_size()} processes",
                "Each would train by itself on the same data.",
            )

    # ---- what a stage says about its records

    def loss(self, model: Any, inputs: dict[str, Any], items: Tensor) -> Tensor:
        """This micro-batch's share of the step's loss: a sum over its items, divided by `items`.

        Args:
            items: Items of the whole step, over all micro-batches and ranks: what `count_items` gives, summed.

        Returns:
            Scalar; the sum over micro-batches and ranks is the step's loss.
        """
        return super().compute_loss(model, inputs, num_items_in_batch=items)  # type: ignore[return-value]

    def count_items(self, inputs: dict[str, Any]) -> Tensor | int:
        """Items that the loss of a micro-batch is summed over, or their weights: tokens with a label, by default."""
        return inputs["labels"][..., 1:].ne(-100).sum()

    def count_tokens(self, inputs: dict[str, Any]) -> Tensor | int:
        """Tokens of a micro-batch without padding, for the throughput."""
        return inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()

    def evaluate_records(self, model: Any) -> dict[str, float]:
        """Metrics over the held-out records, among them `loss`; the same on every rank."""
        raise NotImplementedError

    def after_evaluation(self, model: Any, step: int) -> None:
        """What else happens at an evaluation, such as sample answers. All ranks come here; random states are kept."""

    # ---- training

    def fit(self, resume: bool) -> None:
        """Train to the end, from the newest whole checkpoint where `resume` is set, and take the best weights.

        Raises:
            UserError: The checkpoint was written by another number of processes, or a loss or gradient is not finite.
        """
        newest = self.checkpoints.newest() if resume else None
        if newest is not None:
            wrote = world_size_of(newest[1])
            if wrote != distributed.world_size():
                raise UserError(
                    f"{newest[1]}: written by {wrote} processes, this run has {distributed.world_size()}",
                    "Each process keeps its share of the optimizer state and its own random numbers.",
                    f"Resume with {wrote} processes.",
                )
        if resume:
            self.run.rewind(newest[0] if newest else 0)
            say(f"Continuing after step {newest[0]:,}" if newest else "No whole checkpoint: starting over")
        distributed.barrier()
        if newest is not None and newest[0] >= self.args.max_steps:
            self.state = TrainerState.load_from_json(str(newest[1] / "trainer_state.json"))
        else:
            try:
                self.train(resume_from_checkpoint=str(newest[1]) if newest else None)
            finally:
                self.reporter.close()
        self.load_weights(self.checkpoints.path(self.best_step))

    @property
    def best_step(self) -> int:
        """The step whose weights are the result: the best on held-out records, the last where there are none."""
        return self.state.best_global_step or self.state.global_step

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        table = self.train_dataset
        grouped = self.config.batch.group_by_length and "length" in table.column_names
        lengths = table["length"][:] if grouped else None
        return EpochSampler(
            self.config.seed, len(table), self.config.batch.batch_size, lengths, lambda: self.state.global_step
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        count = sum(
            (torch.as_tensor(self.count_items(inputs)) for inputs in batch_samples), torch.zeros((), dtype=torch.int64)
        )
        total = distributed.all_sum(count.to(device))
        return total.where(total > 0, 1)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.tokens += torch.as_tensor(self.count_tokens(inputs), device=self.tokens.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = self.loss(model, inputs, num_items_in_batch)
        # All ranks stop together, before any gradient is mixed; one alone would leave the others waiting.
        if distributed.all_max((~torch.isfinite(loss.detach())).float()):
            self._stop("loss")
        return loss * distributed.world_size()  # gradients are averaged over ranks; `loss` gives shares of a sum

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm) or 0.0)
        if not math.isfinite(norm):
            self._stop("gradient")
        return norm

    def _stop(self, what: str) -> None:
        last = self.checkpoints.newest()
        raise UserError(
            f"step {self.state.global_step + 1}: the {what} is not finite",
            "Training on would spoil the weights. "
            + (f"The last checkpoint, {last[1]}, is from before." if last else "There is no checkpoint yet."),
            "Lower optimizer.lr, raise optimizer.warmup, or set precision=float32; then start anew or --resume.",
        )

    # ---- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model = self.model_wrapped
        model.eval()
        random_numbers = rng_state()
        with torch.no_grad():
            found = self.evaluate_records(model)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        with torch.no_grad():
            self.after_evaluation(model, self.state.global_step)
        set_rng_state(random_numbers)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_batches(self) -> Iterator[tuple[dict[str, Any], int]]:
        """This rank's share of the held-out records as collated batches on its device, and how many rows are real.

        Every rank gets the same number of batches, so that collectives inside the model meet; rows after the real
        ones are filler.
        """
        table = self.eval_dataset
        micro, world = self.args.per_device_eval_batch_size, distributed.world_size()
        order = list(range(len(table)))
        if "length" in table.column_names:
            lengths = table["length"][:]
            order.sort(key=lambda row: lengths[row])
        for start in range(0, len(order), micro * world):
            mine = order[start : start + micro * world][distributed.rank() :: world]
            rows = [table[row] for row in mine or order[:1]]
            yield self._prepare_inputs(self.data_collator(rows)), len(mine)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.checkpoints.write(self.state.global_step, protect=self.state.best_global_step) as folder:
            self.save_weights(folder)
            if self.is_deepspeed_enabled:
                self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
            elif is_main():
                torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            if is_main():
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
                self.state.save_to_json(str(folder / "trainer_state.json"))
            torch.save(rng_state(), folder / f"random-{distributed.rank()}.pt")

    def save_weights(self, folder: Path) -> None:
        """Write the trained weights, whole, as `weights.safetensors`; every rank calls it."""
        state = trained_state(self.model)
        if is_main():
            save_file(state, folder / "weights.safetensors")

    def load_weights(self, folder: Path) -> None:
        """Put the trained weights of a checkpoint into the model; every rank calls it."""
        put_trained_state(self.model, load_file(folder / "weights.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            expected, stage = _zero_stage(self.args), self.model_wrapped.zero_optimization_stage()
            if stage != expected:
                raise UserError(f"DeepSpeed runs ZeRO stage {stage}, the JSON says {expected}")
            _keep_gradient_norm(self.model_wrapped)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if self.is_deepspeed_enabled:
                found, _ = self.model_wrapped.load_checkpoint(str(folder), load_module_strict=False)
                if found is None:
                    raise UserError(f"{folder}: DeepSpeed finds no state of its own there", "Was the JSON changed?")
            else:
                self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        return model, loader

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(torch.load(Path(checkpoint) / f"random-{distributed.rank()}.pt", weights_only=True))

    # ---- reporting

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens"] = int(distributed.all_sum(self.tokens.clone()))
            self.tokens.zero_()
        super().log(logs, start_time)


# ---- processes and memory ------------------------------------------------------------------------------------------


def _zero_stage(args: TrainingArguments) -> int:
    settings: Any = args.deepspeed or {}
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def _keep_gradient_norm(engine: Any) -> None:
    """At ZeRO stage 0 in float32 DeepSpeed clips gradients itself and forgets their norm; this keeps it."""

    def clip() -> None:
        engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip


def checkpoint_activations(model: Any, zero3: bool) -> None:
    """Recompute activations in the backward pass.

    Raises:
        UserError: The model has a learned prefix, which recomputation would drop without a word.
    """
    inner = model.model if isinstance(model, ScalarModel) else model
    adapted = hasattr(inner, "peft_config")
    if adapted and any(c.peft_type == "PREFIX_TUNING" for c in inner.peft_config.values()):
        raise UserError(
            "gradient_checkpointing: does not work with prefix-tuning",
            "transformers drops the cache, which holds the prefix, when it recomputes.",
            "Switch one of the two off.",
        )
    # Adapters under ZeRO-3 need the reentrant kind (TRL issue 2514), which needs an input with a gradient.
    if adapted and zero3:
        inner.enable_input_require_grads()
    recompute_activations(inner, use_reentrant=adapted and zero3)
