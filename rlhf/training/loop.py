"""The training loop of all stages but PPO: epochs over a fixed table, the best checkpoint as the result."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.config.base import SupervisedConfig
from rlhf.core.console import format_number, is_main, say
from rlhf.core.errors import Terminated, UserError
from rlhf.core.files import write_json
from rlhf.models.load import recompute_activations
from rlhf.runs.random_state import load_rng, rng_state, save_rng, set_rng_state
from rlhf.runs.run import Run
from rlhf.runs.sigterm import sigterm_noted
from rlhf.training.engine import Engine, make_engine
from rlhf.training.epoch_order import StepRows
from rlhf.training.reporter import Reporter
from rlhf.training.schedule import lr_scale

Batch = TypeVar("Batch")
SHORT_NAMES = {
    "loss": "train/loss",
    "lr": "optimizer/lr",
    "grad": "optimizer/grad_norm",
    "tokens/s": "throughput/train",
}
"""Console name -> metric, in the order of the console line."""


class Objective(ABC, Generic[Batch]):
    """What a stage minimises: how rows become a batch, the loss of a batch, and what is measured on held-out rows.

    A loss is a sum over *items*: tokens in SFT, rankings times their weights in the reward model. The loop divides it
    by the items of the whole optimizer step, over all micro-batches and ranks.
    """

    means: tuple[str, ...] = ()
    """Names of logged metrics that are means over items; `loss` returns their sums."""

    @abstractmethod
    def batch(self, rows: list[dict[str, Any]]) -> Batch:
        """A micro-batch on this process's device."""

    def training_batch(self, engine: Engine, rows: list[dict[str, Any]], numbers: list[int], step: int) -> Batch:
        """A micro-batch that is trained on; every rank calls it as often as the others.

        Args:
            engine: Over the model as it is before the step.
            rows: Rows of the table.
            numbers: Their row numbers.
            step: Number of earlier steps.
        """
        return self.batch(rows)

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """The items of a micro-batch: a scalar."""

    @abstractmethod
    def tokens(self, batch: Batch) -> Tensor:
        """The tokens of a micro-batch without padding: a scalar."""

    @abstractmethod
    def loss(self, engine: Engine, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The loss summed over the items of a micro-batch, and the sum of each metric in `means`."""

    @abstractmethod
    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Metrics of the held-out records, among them `loss`; the same on every rank, which all call it."""

    def samples(self, engine: Engine) -> list[dict[str, Any]]:
        """Rows for samples.jsonl at an evaluation. Every rank calls it."""
        return []


class Loop(Generic[Batch]):
    """Trains a module on a table: accumulation, evaluations, whole checkpoints, exact resume.

    Args:
        config: The stage's config.
        run: Its run folder.
        engine: Over the module; see `supervised_engine`.
        objective: What is minimised.
        train: A table of rows. Where it has a column `length`, rows of similar length can be batched together.
        held_out: Whether the objective has held-out records to evaluate.

    Raises:
        UserError: The batch does not divide by the processes.
    """

    def __init__(
        self, config: SupervisedConfig, run: Run, engine: Engine, objective: Objective[Batch], train: Any,
        held_out: bool,
    ) -> None:  # fmt: skip
        self.config, self.run, self.engine, self.objective = config, run, engine, objective
        self.train, self.held_out = train, held_out
        self.micro, self.accumulation = config.batch.micro_batches(distributed.world_size())
        lengths = train["length"][:] if config.batch.group_by_length and "length" in train.column_names else None
        self.rows = StepRows(config.seed, len(train), config.batch.batch_size, lengths)
        self.steps = config.batch.max_steps or math.ceil(config.batch.epochs * self.rows.steps)
        self.checkpoints = run.checkpoints(config.checkpoints.keep)
        self.step = 0
        self.best: tuple[int, float] | None = None
        """The step with the lowest held-out loss so far, and that loss."""
        self._open_window()

    @property
    def best_step(self) -> int:
        """The step whose weights are the result: the best on held-out records, or the last without them."""
        return self.best[0] if self.best else self.step

    def fit(self, resume: bool) -> None:
        """Train to the end, from the newest whole checkpoint where `resume` is set, and load the best weights.

        Raises:
            UserError: The checkpoint does not fit this run, or a loss or gradient is not finite.
            Terminated: SIGTERM was received; the step was finished and a checkpoint written.
        """
        self._open_window()
        if resume:
            self._resume()
        self.engine.module.train()
        reporter = Reporter(self.run, self.config.log.report_to, self.steps, self.step, self.config.log.watch)
        try:
            with sigterm_noted() as ended:
                while self.step < self.steps:
                    saved = self._finish_step(reporter, self._train_step())
                    if self.step < self.steps and ended():
                        if not saved:
                            self._save()
                        raise Terminated(f"Step {self.step:,} is in a checkpoint.")
        finally:
            reporter.close()
        self.engine.module.eval()
        if self.best_step != self.step:
            self.engine.load(self.checkpoints.check(self.best_step), optimizer=False)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _train_step(self) -> dict[str, float]:
        """One optimizer step; gives its learning rate and its gradient norm before clipping."""
        while (noted := self._passes()) is None:
            self._take_smaller_micro_batches()
        self._window += noted
        optimizer = self.config.optimizer
        scale = lr_scale(optimizer.schedule, self.step, self.steps, int(optimizer.warmup * self.steps))
        norm = self.engine.step(scale)
        if norm is None:
            raise self._not_finite()
        self.step += 1
        return {"optimizer/grad_norm": norm, "optimizer/lr": scale * optimizer.lr}

    def _passes(self) -> Tensor | None:
        """The forward and backward passes of the next step; returns what they add to the window, or None, with nothing
        changed, if memory ran out."""
        batches = [
            self.objective.training_batch(self.engine, [self.train[row] for row in rows], rows, self.step)
            for rows in self._micro_batches()
        ]
        counts = [self.objective.items(batch) for batch in batches]
        items = distributed.all_sum(sum(counts, torch.zeros_like(counts[0])))
        items = items.where(items > 0, 1)

        def loss_of(index: int, batch: Batch) -> tuple[Tensor, Tensor]:
            total, sums = self.objective.loss(self.engine, batch)
            loss = total / items
            values = (loss, *sums, counts[index], self.objective.tokens(batch))
            return loss, torch.stack([value.detach().double() for value in values])

        smaller = f"batch.micro_batch_size={self._smaller}"
        noted = self.engine.accumulate(lambda: batches, loss_of, smaller)
        return None if noted is None else sum(noted, torch.zeros_like(self._window))

    @property
    def _smaller(self) -> int:
        """The next smaller number of records that divides a micro-batch."""
        return max((size for size in range(1, self.micro) if self.micro % size == 0), default=1)

    def _take_smaller_micro_batches(self) -> None:
        """Divide the following steps into more micro-batches of fewer records.

        Raises:
            UserError: A micro-batch is one record.
        """
        if self.micro == 1:
            raise UserError(
                f"out of memory in a micro-batch of one record, at step {self.step + 1:,}",
                "One record cannot be divided further.",
                "Set gradient_checkpointing=true, train an adapter (tuning=lora), or lower model.max_length. "
                "`rlhf plan` shows what each saves.",
            )
        say(f"Out of memory in a micro-batch: from here on it has {self._smaller} instead of {self.micro} records")
        self._set_micro(self._smaller)

    def _set_micro(self, micro: int) -> None:
        """Divide a step's records of this rank into micro-batches of `micro`, or fewer where that does not divide."""
        share = self.micro * self.accumulation
        self.micro = math.gcd(share, micro)
        self.accumulation = share // self.micro

    def _micro_batches(self) -> list[list[int]]:
        """The rows of this rank's micro-batches in the next step."""
        rows, ranks = self.rows[self.step], distributed.world_size()
        starts = [(i * ranks + distributed.rank()) * self.micro for i in range(self.accumulation)]
        return [rows[start : start + self.micro] for start in starts]

    def _finish_step(self, reporter: Reporter, metrics: dict[str, float]) -> bool:
        """Log, evaluate and save what is due after a step; True if a checkpoint was written."""
        due = lambda every: self.step == self.steps or self.step % every == 0  # noqa: E731
        evaluate, save = self.held_out and due(self.config.eval.every), due(self.config.checkpoints.every)
        if evaluate or save or due(self.config.log.every):
            self._log(reporter, metrics)
        if evaluate and self._evaluate(reporter):
            save = True
        if save:
            self._save()
        if evaluate or save:
            self._open_window()
        return save

    def _not_finite(self) -> UserError:
        loss = distributed.all_sum(self._window)[0]
        last = self.checkpoints.newest(verify=False)
        return UserError(
            f"step {self.step + 1}: the {'gradient' if loss.isfinite() else 'loss'} is not finite",
            "The step was not applied, since it would ruin the weights. "
            + (f"The last checkpoint is {last[1]}." if last else "There is no checkpoint yet."),
            "Lower optimizer.lr, raise optimizer.warmup, or set precision=float32; then start again, or use --resume.",
        )

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def _open_window(self) -> None:
        """Reset the sums to log: loss, metrics, items and tokens."""
        self._window = torch.zeros(len(self.objective.means) + 3, dtype=torch.float64, device=distributed.device())
        self._since, self._logged = time.perf_counter(), self.step

    def _log(self, reporter: Reporter, metrics: dict[str, float]) -> None:
        loss, *sums, items, tokens = distributed.all_sum(self._window).tolist()
        steps, seconds = self.step - self._logged, time.perf_counter() - self._since
        metrics = {"train/loss": loss / steps, **metrics, "train/tokens": int(tokens)}
        metrics |= {name: total / max(items, 1) for name, total in zip(self.objective.means, sums)}
        metrics |= {"train/epoch": self._epoch, "throughput/train": tokens / seconds, "time/step": seconds / steps}
        reporter.log(self.step, metrics)
        line = "  ".join(f"{short} {format_number(metrics[name])}" for short, name in SHORT_NAMES.items())
        reporter.bar.step(self.step, line, seconds / steps)
        self._open_window()

    @property
    def _epoch(self) -> float:
        return self.step / self.rows.steps

    def _evaluate(self, reporter: Reporter) -> bool:
        """Evaluate the held-out records; True if their loss is the lowest so far. Random states are restored."""
        random = rng_state()
        self.engine.module.eval()
        with torch.no_grad():
            metrics = self.objective.evaluate(self.engine, self.step)
            samples = self.objective.samples(self.engine)
        self.engine.module.train()
        set_rng_state(random)
        reporter.log(
            self.step, {f"eval/{name}": value for name, value in metrics.items()} | {"train/epoch": self._epoch}
        )
        reporter.bar.note(
            "  held out: " + "  ".join(f"{name} {format_number(value)}" for name, value in metrics.items())
        )
        reporter.samples(self.step, samples)
        if self.best is not None and not metrics["loss"] < self.best[1]:
            return False
        self.best = (self.step, metrics["loss"])
        return True

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        with self.checkpoints.write(self.step, protect=self.best_step) as folder:
            self.engine.save(folder)
            save_rng(folder)
            # One row per rank, so that a resumed run averages over the same steps: SIGTERM may come at any step.
            window = distributed.all_gather_rows(self._window[None]).tolist()
            if is_main():
                state: dict[str, Any] = {"step": self.step, "best": self.best, "window": window, "logged": self._logged}
                state["seconds"] = time.perf_counter() - self._since
                state |= {"micro": self.micro, "micro_batch_size": self.config.batch.micro_batch_size}
                write_json(folder / "loop.json", state)

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        if newest is None:
            self.run.rewind(0)
            say("No complete checkpoint: starting from the beginning")
            return
        step, folder = newest
        if not (folder / "loop.json").is_file():
            raise UserError(
                f"{folder}: written by an earlier version with a different training loop",
                remedy="Start again with --overwrite, or finish the run with the version that it was started with.",
            )
        self.engine.load(folder)
        state = json.loads((folder / "loop.json").read_text("utf-8"))
        self.step, self.best = step, tuple(state["best"]) if state["best"] else None
        window = torch.tensor(state["window"], dtype=torch.float64, device=distributed.device())
        if len(window) != distributed.world_size():  # written by another number of ranks
            window = torch.cat([window.sum(0)[None], window.new_zeros(distributed.world_size() - 1, window.shape[1])])
        self._window, self._logged = window[distributed.rank()], state["logged"]
        self._since = time.perf_counter() - state["seconds"]
        if state.get("micro_batch_size") == self.config.batch.micro_batch_size and state["micro"] < self.micro:
            self._set_micro(state["micro"])  # memory had run out
        load_rng(folder, self.config.seed, step)
        self.run.rewind(step)
        say(f"Continuing after step {step:,}")


# ---- set-up ----------------------------------------------------------------------------------------------------------


def supervised_engine(config: SupervisedConfig, module: nn.Module) -> Engine:
    """The engine over the trained weights of a module, whose `model` is the transformers model (in a PEFT wrapper).

    Biases and the weights of norms do not decay.
    """
    if config.gradient_checkpointing:
        recompute_activations(module.model, use_reentrant=False)
    norms = {
        id(p) for part in module.modules() if "norm" in type(part).__name__.lower() for p in part.parameters(False)
    }
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (rest if id(parameter) in norms or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "lr": config.optimizer.lr}]
    groups += [{"params": rest, "lr": config.optimizer.lr, "weight_decay": 0.0}]
    return make_engine(module, groups, config.optimizer, config.precision, config.deepspeed)
