"""`rlhf plan`: whether a run fits into memory, before it runs, and the cheapest change that makes it fit.

Nothing is loaded or downloaded: models are built on fake tensors from their config.json (see `rlhf.memory.predict`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options
from rlhf.cli.options import ConfigFile, Overrides
from rlhf.cli.stage_configs import TRAINING
from rlhf.config.load import check_config, override_values, read_values
from rlhf.config.optimizers import OPTIMIZERS
from rlhf.core.console import format_number, say, table
from rlhf.core.errors import UserError, nearest
from rlhf.memory.plan import CONTEXT, FILES, GIB, MARGIN, MemoryPlan
from rlhf.ppo.config import PPOConfig
from rlhf.runs.run import is_run, read_run


def command(
    *,
    config: ConfigFile,
    gpus: options.NotNegative,
    gpu_memory: str | None = None,
    overrides: Overrides = None,
    hosts: options.Positive = 1,
    stage: str | None = None,
    base: str | None = None,
    longest: options.PositiveOrNone = None,
    candidates: Annotated[int, typer.Option(min=2)] = 4,
    lengths: str | None = None,
) -> None:
    """Predict a run's peak GPU memory by phase, part and ZeRO stage; say what fits and the cheapest change.

    With --gpus 0: the range of the peak of one process on the CPU.

    Args:
        gpus: GPUs on each host, one process per GPU; 0: one process on the CPU.
        gpu_memory (GIB): Memory of a GPU, such as 80.
        hosts: Number of hosts.
        stage: sft, reward, dpo, ppo or specialist, if the config does not determine it.
        base: Folder with the config.json of models that are not trained yet.
        longest: Longest prompt (ppo) or row in tokens, if known.
        candidates: Answers in a ranking (reward, dpo).
        lengths (TOKENS,...): Also for prompts (ppo) or rows of 4096,16384,... tokens.
    """
    if (gpus == 0) == (gpu_memory is not None):
        raise UserError(f"--gpus {gpus}: give --gpu-memory GIB with GPUs, and only then")
    values = read_values(config)
    override_values(values, overrides or ())
    chosen = stage or stage_of(values, config)
    if chosen not in TRAINING:
        raise UserError(f"--stage {chosen}: {nearest(chosen, TRAINING)}")
    kind = TRAINING[chosen]
    if gpu_memory is None:
        report_on_cpu(check_config(kind, values, str(config)), str(config), base, longest, candidates)
        return
    size = memory_of(gpu_memory)
    plan = MemoryPlan(kind, values, str(config), gpus * hosts, size, base, longest, candidates)
    report(plan, gpus, hosts)
    if lengths is not None:
        report_lengths(plan, lengths_of(lengths))


def memory_of(text: str) -> float:
    """Bytes from a number of GiB.

    Raises:
        UserError: Not a plausible number of GiB for a GPU.
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
        UserError: None of these determines it.
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


# ---- output ------------------------------------------------------------------------------------------------------


def report(plan: MemoryPlan, gpus: int, hosts: int) -> None:
    """Print the tables and the advice."""
    own = plan.predict()
    digits = 1 if own.peak >= GIB else 3
    gib = lambda size: f"{size / GIB:.{digits}f}"  # noqa: E731
    show_phases(f"{plan.where} as configured: GiB on each GPU at each phase's peak", own.phases, gib)
    ways: dict[str, list[str]] = {"as configured": []}
    offers = {name: file for name, file in FILES.items() if plan.processes > 1 or "offload" in name}
    ways |= {f"ZeRO {name}": [f"deepspeed={file or 'null'}"] for name, file in offers.items()}
    ways |= {row.name: [f"optimizer.algorithm={row.name}"] for row in OPTIMIZERS}
    own_name = plan.config.optimizer.algorithm.name
    ways = {name: changes for name, changes in ways.items() if name != own_name and plan.works(*changes)}
    rows = []
    for name, changes in ways.items():
        found, needs = plan.predict(*changes), plan.needs(*changes)
        rows.append([
            name, *(gib(one.total) for one in found.phases.values()), gib(needs), "yes" if needs <= plan.size else "no",
            format_number(plan.largest_budget(*changes)), gib(found.host * gpus + found.writer),
        ])  # fmt: skip
    title = f"{gpus * hosts} GPUs of {plan.size / GIB:g} GiB on {hosts} host{'s' * (hosts > 1)}: GiB on each GPU"
    table(title, ["", *own.phases, "needs", "fits", "budget", "host"], rows)
    say(f"needs: the highest phase, plus {MARGIN:.0%} for the allocator and {CONTEXT / GIB:g} GiB for CUDA itself")
    unit = "whole sequences" if isinstance(plan.config, PPOConfig) else "records"
    say(f"budget: the largest {plan.budget_key} that fits, of 1, 2, 4, ... {unit}; host: GiB of a host's main memory")
    for line in advice(plan):
        say(line)


def report_lengths(plan: MemoryPlan, lengths: list[int]) -> None:
    """Print what longer prompts or rows need, and the largest micro-batch and rollout that fit."""
    rows, samples = [], isinstance(plan.config, PPOConfig)
    for tokens in lengths:
        longer = plan.with_length(tokens)
        most = plan.config.rollout.batch_size if samples else 0
        sizes = [most >> halvings for halvings in range(most.bit_length())]  # down to 1
        decoded = next((size for size in sizes if longer.rollout_fits([f"rollout.batch_size={size}"])), None)
        smaller = [f"rollout.batch_size={decoded}"] if decoded else []
        rows.append([
            f"{tokens:,}", f"{longer.needs() / GIB:.1f}", "yes" if longer.fits() else "no",
            *[str(decoded or "-")] * samples, format_number(longer.largest_budget(*smaller)),
        ])  # fmt: skip
    columns = ["tokens", "needs", "fits", *(["rollout.batch_size"] if samples else []), plan.budget_key]
    table(f"Longest {'prompt' if samples else 'row'}: GiB on each GPU, and the largest values that fit", columns, rows)


def report_on_cpu(config: Any, where: str, base: str | None, longest: int | None, candidates: int) -> None:
    """Print the range of the peak of one process on the CPU, and its tensors by phase and part."""
    from rlhf.memory.cpu_range import on_cpu, size_in_words  # imports torch

    found = on_cpu(config, config.precision == "bfloat16", 1, longest, 1 if longest is None else None, candidates, base)
    title = f"{where} on a CPU: one process with the longest batches, at each phase's peak"
    show_phases(title, found.tensors.phases, size_in_words)
    say(f"Peak memory of a process: {found}")
    say("Low: tensors only, short batches. High: longest batches, with memory kept by glibc and loaded by libraries.")


def show_phases(title: str, phases: dict[str, Any], words: Callable[[float], str]) -> None:
    """Print the memory of each phase by part, in `words`."""
    from rlhf.memory.predict import PARTS  # imports torch

    parts = [part for part in PARTS if any(one.get(part) for one in phases.values())]
    rows = [[name, *(words(one.get(part, 0.0)) for part in parts), words(one.total)] for name, one in phases.items()]
    table(title, ["phase", *parts, "all"], rows)


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
