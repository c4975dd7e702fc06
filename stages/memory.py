"""`rlhf plan`: whether a run fits into memory, before it runs, and the cheapest change that makes it fit.

Nothing is loaded or downloaded: models are built on fake tensors from their config.json (see `rlhf.memory.predict`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli.options import ConfigFile, Overrides
from rlhf.cli.stage_configs import TRAINING
from rlhf.config.load import check_config, override_values, read_values
from rlhf.config.optimizers import OPTIMIZERS, refuse_optimizer
from rlhf.core.console import say, table
from rlhf.core.errors import UserError, nearest
from rlhf.distributed.deepspeed_json import deepspeed_settings
from rlhf.ppo.config import PPOConfig
from rlhf.runs.run import is_run, read_run

GIB = 2**30
MARGIN, CONTEXT = 0.08, 1.0 * GIB
"""Fraction that an allocator adds by rounding, and bytes that CUDA and NCCL use besides tensors."""
TRACED = 3
"""Micro-batches of 1 to 4 sequences are traced; memory is linear in their number, and larger ones take minutes."""
FILES = {
    "0": None,
    "1": "configs/deepspeed/zero1.json",
    "2": "configs/deepspeed/zero2.json",
    "2, offload": "configs/deepspeed/zero2-offload.json",
    "3": "configs/deepspeed/zero3.json",
    "3, offload": "configs/deepspeed/zero3-offload.json",
}
"""ZeRO stage -> the DeepSpeed JSON of the table. Stage 0 is what several processes without a file use."""


def command(
    config: ConfigFile,
    gpus: Annotated[
        int, typer.Option("--gpus", min=0, help="GPUs on each host, one process per GPU; 0: one process on the CPU.")
    ],
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="GIB", help="Memory of a GPU, such as 80.")
    ] = None,
    overrides: Overrides = None,
    hosts: Annotated[int, typer.Option("--hosts", min=1, help="Number of hosts.")] = 1,
    stage: Annotated[
        str | None, typer.Option("--stage", help="sft, reward, dpo, ppo or specialist, if the config does not show it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Folder with the config.json of models that are not trained yet.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option("--longest", min=1, help="Longest prompt (ppo) or row in tokens, if known.")
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=2, help="Answers in a ranking (reward, dpo).")] = 4,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", metavar="TOKENS,...", help="Also for prompts (ppo) or rows of 4096,16384,... tokens."
        ),
    ] = None,
) -> None:
    """Predict a run's peak memory on GPUs by phase, part and ZeRO stage; say what fits and the cheapest change.

    With --gpus 0: the range in which the peak of one process on the CPU lies.
    """
    if (gpus == 0) == (gpu_memory is not None):
        raise UserError(f"--gpus {gpus}: give --gpu-memory GIB with GPUs, and only then")
    values = read_values(config)
    override_values(values, overrides or ())
    chosen = stage or stage_of(values, config)
    if gpu_memory is None:
        checked = _checked(chosen, values, str(config))
        report_on_cpu(checked, str(config), base, longest, candidates)
        return
    size = memory_of(gpu_memory)
    plan = MemoryPlan(values, chosen, str(config), gpus * hosts, size, base, longest, candidates)
    report(plan, gpus, hosts)
    if lengths is not None:
        report_lengths(plan, lengths_of(lengths))


def _checked(stage: str, values: dict[str, Any], where: str) -> Any:
    if stage not in TRAINING:
        raise UserError(f"--stage {stage}: {nearest(stage, TRAINING)}")
    return check_config(TRAINING[stage], values, where)


def memory_of(text: str) -> float:
    """Bytes from a number of GiB.

    Raises:
        UserError: Not a number of GiB that a GPU could have.
    """
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found <= 1024:
        raise UserError(
            f"--gpu-memory {text}: expected a number of GiB between 0 and 1024, without a unit",
            remedy="An 80 GB GPU: --gpu-memory 80.",
        )
    return found * GIB


def lengths_of(text: str) -> list[int]:
    """Numbers of tokens from a list with commas.

    Raises:
        UserError: Something else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise UserError(f"--lengths {text}: expected numbers of tokens with commas, such as 4096,16384")
    return [int(word) for word in words]


def stage_of(values: dict[str, Any], config: Path) -> str:
    """The stage of a config, by its keys, its file name, or the run that it belongs to.

    Raises:
        UserError: Neither shows it.
    """
    if "reward" in values or "rollout" in values:
        return "ppo"
    if is_run(config.parent) and config.name == "config.yaml":
        return str(read_run(config.parent)["stage"])
    if "task" in values:
        return "specialist"
    if "beta" in values or "sft_coef" in values:
        return "dpo"
    name = next((name for name in ("reward", "dpo", "sft") if name in config.stem), None)
    if name is None:
        remedy = "Add --stage sft, reward or dpo."
        raise UserError(f"{config}: its stage is not clear from its keys or name", remedy=remedy)
    return name


class MemoryPlan:
    """Predictions for a config on a machine, also with some keys changed.

    Args:
        values: The config's keys and values.
        stage: sft, reward, dpo, ppo or specialist.
        where: The config's file, for messages.
        processes: Number of processes, one per GPU.
        size: Memory of a GPU in bytes.
        base: Folder with the config.json of models that are not trained yet.
        longest: Longest prompt or row in tokens, if known.
        candidates: Number of answers in a ranking.
    """

    def __init__(
        self, values: dict[str, Any], stage: str, where: str, processes: int, size: float, base: str | None = None,
        longest: int | None = None, candidates: int = 4,
    ) -> None:  # fmt: skip
        self.values, self.stage, self.where = values, stage, where
        self.processes, self.size, self.base, self.longest, self.candidates = processes, size, base, longest, candidates
        self.config: Any = self.changed()
        self.bfloat16 = self.config.precision != "float32"
        self._traced: dict[Any, tuple[Any, Any]] = {}

    @property
    def budget_key(self) -> str:
        return "batch.micro_batch_tokens" if self.stage == "ppo" else "batch.micro_batch_size"

    def changed(self, *changes: str) -> Any:
        """The config with `key=value` changes."""
        values = _copy(self.values)
        override_values(values, changes)
        return _checked(self.stage, values, self.where)

    def predict(self, *changes: str) -> Any:
        """The prediction for one process, with `key=value` changes."""
        config = self.changed(*changes)
        settings = self._settings(config)
        from rlhf.memory.predict import ZeroLayout, predict  # imports torch

        traced, layout = self._trace(config, settings is not None), ZeroLayout.of(settings)
        return predict(traced, layout, self.processes, gpu=True, optimizer=config.optimizer.algorithm)

    def _trace(self, config: Any, deepspeed: bool) -> Any:
        """The config's traced model; traced for one and for several sequences, and linear in their number."""
        from rlhf.memory.traced_model import TracedModel  # imports torch

        shape = self._batch_shape(config)
        kind = (deepspeed, config.gradient_checkpointing, str(config.tuning), str(getattr(config, "critic", "")))
        if kind not in self._traced:
            ends, budgets = [], self.budgets()[:TRACED]
            for budget, share in ((budgets[0], 8), (budgets[-1], 1)):
                values = config.model_copy(update=_nested(config, self.budget_key, budget))
                if isinstance(config, PPOConfig):
                    few = max(1, config.rollout.batch_size // share)
                    values = values.model_copy(update=_nested(config, "rollout.batch_size", few))
                ends.append(TracedModel(values, self._batch_shape(values), self.bfloat16, deepspeed, base=self.base))
            self._traced[kind] = (ends[0], ends[1])
        few, many = self._traced[kind]
        return few.extrapolate_to(many, shape)

    def _batch_shape(self, config: Any) -> Any:
        from rlhf.memory.workload import batch_shape, limit_of  # imports torch

        limit = limit_of(config, self.base)
        return batch_shape(config, limit, self.processes, self.longest, self.candidates)

    def with_length(self, tokens: int) -> MemoryPlan:
        """The same for prompts (ppo) or rows of this many tokens, with `model.max_length` raised where it is less."""
        changes, most = [], tokens
        if isinstance(self.config, PPOConfig):
            changes, most = [f"data.max_prompt_tokens={tokens}"], tokens + self.config.rollout.max_new_tokens
        if most > (self.config.model.max_length or most):
            changes.append(f"model.max_length={most}")
        values = _copy(self.values)
        override_values(values, changes)
        return MemoryPlan(values, self.stage, self.where, self.processes, self.size, self.base, tokens, self.candidates)

    def needs(self, *changes: str) -> float:
        """Peak bytes on a GPU, including margin and CUDA context."""
        return float(self.predict(*changes).peak * (1 + MARGIN) + CONTEXT)

    def works(self, *changes: str) -> bool:
        """Whether the optimizer works with the rest of the config."""
        try:
            self._settings(self.changed(*changes))
        except UserError:
            return False
        return True

    def _settings(self, config: Any) -> dict[str, Any] | None:
        """DeepSpeed's settings, which the optimizer must work with."""
        settings = deepspeed_settings(config.deepspeed, self.processes)
        refuse_optimizer(config.optimizer.algorithm, settings, self.bfloat16, installed=False)
        return settings

    def fits(self, *changes: str) -> bool:
        return self.needs(*changes) <= self.size

    def budgets(self) -> list[int]:
        """Values of the budget key for micro-batches of 1, 2, 4, ... sequences, ascending."""
        config = self.config
        if isinstance(config, PPOConfig):
            episodes = config.rollout.prompts_per_update * config.rollout.samples_per_prompt
            most = math.ceil(episodes / config.batch.minibatches / self.processes)
            unit = self._batch_shape(config).width
        else:
            most, unit = max(1, config.batch.batch_size // self.processes), 1
        return [unit * rows for rows in sorted({*itertools.takewhile(most.__gt__, _powers()), most})]

    def largest_budget(self, *changes: str) -> int | None:
        """The largest value of the budget key that fits; None if none does."""
        found = None
        for budget in self.budgets():
            if not self.fits(*changes, f"{self.budget_key}={budget}"):
                break
            found = budget
        return found

    def cheapest(self) -> list[str] | None:
        """The cheapest change of the config that makes it fit, as overrides; None if none is known.

        From cheap to expensive: smaller micro-batches and fewer sequences decoded together, then also recomputed
        activations, a higher ZeRO stage, offload, 8-bit optimizer state, and LoRA.
        """
        recompute: list[list[str]] = (
            [[]] if self.config.gradient_checkpointing else [[], ["gradient_checkpointing=true"]]
        )
        files: list[list[str]] = [[], *([f"deepspeed={file}"] for file in self._other_files())]
        lora = ["tuning=lora", *(["critic.tuning=lora"] if getattr(self.config, "needs_critic", False) else [])]
        adapters: list[list[str]] = [[]] if self.config.tuning.row.traits["adapter"] else [[], lora]
        small: list[list[str]] = [[], ["optimizer.algorithm=adamw-8bit"]]
        ways = list(itertools.product(*(enumerate(part) for part in (adapters, small, files, recompute))))
        ways.sort(key=lambda way: 40 * way[0][0] + 20 * way[1][0] + 2 * way[2][0] + way[3][0])
        for way in ways:
            changes = [change for _, part in way for change in part]
            if not self.works(*changes):
                continue
            for smaller in ([], self._smaller_rollout(changes)):
                if changes + smaller and self.fits(*changes, *smaller):
                    return changes + smaller
                budget = self.largest_budget(*changes, *smaller)
                if budget is not None:
                    return [*changes, *smaller, f"{self.budget_key}={budget}"]
        return None

    def _smaller_rollout(self, changes: list[str]) -> list[str]:
        """The most sequences decoded together that fit, as an override; nothing if the stage decodes none."""
        if not isinstance(self.config, PPOConfig):
            return []
        sizes = [[f"rollout.batch_size={max(1, self.config.rollout.batch_size // share)}"] for share in (2, 4, 8)]
        fitting = (way for way in sizes if self.rollout_fits([*changes, *way]))
        return next(fitting, sizes[-1])

    def rollout_fits(self, changes: list[str]) -> bool:
        """Whether the phase in which completions are sampled fits."""
        return float(self.predict(*changes).phases["rollout"].total * (1 + MARGIN) + CONTEXT) <= self.size

    def _other_files(self) -> list[str]:
        """DeepSpeed files that partition more than the config's own; on one GPU, those that offload."""
        names = [file for name, file in FILES.items() if file and (self.processes > 1 or "offload" in name)]
        own = self.config.deepspeed
        return names[names.index(own) + 1 :] if own in names else names


def _powers() -> Iterator[int]:
    return (2**n for n in itertools.count())


def _powers_down(largest: int) -> Iterator[int]:
    """A number and its halves, down to 1."""
    while largest:
        yield largest
        largest //= 2


def _nested(config: Any, key: str, value: Any) -> dict[str, Any]:
    """A change of a dotted key in the form of pydantic's `model_copy(update=...)`."""
    group, _, name = key.partition(".")
    return {group: getattr(config, group).model_copy(update={name: value})}


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, dict) else values


# ---- output ------------------------------------------------------------------------------------------------------


def report(plan: MemoryPlan, gpus: int, hosts: int) -> None:
    """Print the tables and the advice."""
    own = plan.predict()
    digits = 1 if own.peak >= GIB else 3
    gib = lambda size: f"{size / GIB:.{digits}f}"  # noqa: E731
    phases = list(own.phases)
    from rlhf.memory.predict import PARTS  # imports torch

    parts = [part for part in PARTS if any(snapshot.parts.get(part) for snapshot in own.phases.values())]
    rows = [[phase, *(gib(own.phases[phase].parts.get(part, 0.0)) for part in parts), gib(own.phases[phase].total)]
            for phase in phases]  # fmt: skip
    table(f"{plan.where} as configured: GiB on each GPU at each phase's peak", ["phase", *parts, "all"], rows)
    ways: dict[str, list[str]] = {"as configured": []}
    offers = {name: file for name, file in FILES.items() if plan.processes > 1 or "offload" in name}
    ways |= {f"ZeRO {name}": [f"deepspeed={file or 'null'}"] for name, file in offers.items()}
    ways |= {row.name: [f"optimizer.algorithm={row.name}"] for row in OPTIMIZERS}
    own_name = plan.config.optimizer.algorithm.name
    ways = {name: changes for name, changes in ways.items() if name != own_name and plan.works(*changes)}
    rows = []
    for name, changes in ways.items():
        found = plan.predict(*changes)
        needs = plan.needs(*changes)
        budget = plan.largest_budget(*changes)
        rows.append([
            name, *(gib(found.phases[phase].total) for phase in phases), gib(needs),
            "yes" if needs <= plan.size else "no", "-" if budget is None else f"{budget:,}",
            gib(found.host * gpus + found.writer),
        ])  # fmt: skip
    title = f"{gpus * hosts} GPUs of {plan.size / GIB:g} GiB on {hosts} host{'s' * (hosts > 1)}: GiB on each GPU"
    columns = ["", *phases, "needs", "fits", "budget", "host"]
    table(title, columns, rows)
    say(f"needs: the highest phase, plus {MARGIN:.0%} for the allocator and {CONTEXT / GIB:g} GiB for CUDA itself")
    say(f"budget: the largest {plan.budget_key} that fits; host: GiB of a host's main memory")
    for line in advice(plan):
        say(line)


def report_lengths(plan: MemoryPlan, lengths: list[int]) -> None:
    """Print what longer prompts or rows need, and the largest micro-batch and rollout that fit."""
    rows, samples = [], isinstance(plan.config, PPOConfig)
    for tokens in lengths:
        longer = plan.with_length(tokens)
        sizes = _powers_down(plan.config.rollout.batch_size) if samples else ()
        fitting = (size for size in sizes if longer.rollout_fits([f"rollout.batch_size={size}"]))
        decoded = next(fitting, None)
        smaller = [f"rollout.batch_size={decoded}"] if decoded else []
        budget = longer.largest_budget(*smaller)
        rows.append([
            f"{tokens:,}", f"{longer.needs() / GIB:.1f}", "yes" if longer.fits() else "no",
            *([str(decoded or "-")] if samples else []), "-" if budget is None else f"{budget:,}",
        ])  # fmt: skip
    columns = ["tokens", "needs", "fits", *(["rollout.batch_size"] if samples else []), plan.budget_key]
    table(f"Longest {'prompt' if samples else 'row'}: GiB on each GPU, and the largest values that fit", columns, rows)


def report_on_cpu(config: Any, where: str, base: str | None, longest: int | None, candidates: int) -> None:
    """Print the range of the peak of one process on the CPU, and its tensors by phase and part."""
    from rlhf.memory.cpu_range import on_cpu, size_in_words  # imports torch
    from rlhf.memory.predict import PARTS

    found = on_cpu(config, config.precision == "bfloat16", 1, longest, 1 if longest is None else None, candidates, base)
    phases = found.tensors.phases
    parts = [part for part in PARTS if any(snapshot.parts.get(part) for snapshot in phases.values())]
    rows = [
        [phase, *(size_in_words(one.parts.get(part, 0.0)) for part in parts), size_in_words(one.total)]
        for phase, one in phases.items()
    ]
    table(
        f"{where} on a CPU: one process with the longest batches, at each phase's peak", ["phase", *parts, "all"], rows
    )
    say(f"Peak memory of a process: {found}")
    say("From short batches, tensors alone, to the longest ones with what glibc keeps and libraries load at work.")


def advice(plan: MemoryPlan) -> Iterator[str]:
    """Whether it fits, and what to change."""
    needs, peak = plan.needs(), plan.predict().peak_phase
    usage = f"{needs / GIB:.1f} of {plan.size / GIB:g} GiB on each GPU at the peak, in the phase {peak}"
    if needs <= plan.size:
        yield f"It fits: {usage}."
        return
    yield f"It does not fit: it needs {usage}."
    changes = plan.cheapest()
    if changes is None:
        yield "No change of micro-batches, ZeRO stage, offload or LoRA makes it fit: use more or larger GPUs."
    else:
        yield f"The cheapest change: {' '.join(changes)}  ({plan.needs(*changes) / GIB:.1f} GiB)"
