"""The run folders that a path of `rlhf report` means: a run, a folder of runs, or a pipeline's YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import load_stage_config
from rlhf.core.errors import UserError
from rlhf.runs.find import no_run, run_folders
from rlhf.runs.run import is_run


@dataclass(frozen=True)
class PlannedRun:
    """A run that a pipeline makes."""

    stage: str
    path: Path


def is_pipeline(path: Path) -> bool:
    """Whether a path is a YAML file, and no folder."""
    return path.suffix in (".yaml", ".yml") and path.is_file()


def planned_runs(file: Path) -> list[PlannedRun]:
    """The runs of a pipeline file in the order in which they are made, rounds included, whether they have begun or not.

    Raises:
        UserError: A fault in the file, or in a config that it names.
    """
    config = load_stage_config(PipelineConfig, file)
    named = [(stage, kind, path) for stage, kind in STAGES.items() if (path := getattr(config, stage)) is not None]
    first = [PlannedRun(stage, Path(load_stage_config(kind, path).run)) for stage, kind, path in named]
    rounds = config.rounds.count if config.rounds is not None else 0
    later = [
        PlannedRun(one.stage, Path(f"{one.path}-round-{number}"))
        for number in range(1, rounds + 1) for one in first if one.stage != "sft"
    ]  # fmt: skip
    return first + later


def pipeline_name(file: Path) -> str:
    """The name of a pipeline.

    Raises:
        UserError: A fault in the file.
    """
    return load_stage_config(PipelineConfig, file).name


def folders_of(path: Path) -> list[Path]:
    """The run folders that exist now of a run, a folder of runs, or a pipeline file.

    Raises:
        UserError: There is none, or the pipeline file has a fault.
    """
    if is_pipeline(path):
        planned = planned_runs(path)
        if found := [one.path for one in planned if is_run(one.path)]:
            return found
        names = ", ".join(str(one.path) for one in planned)
        raise UserError(
            f"{path}: none of its runs has begun", f"They are {names}, seen from this folder.",
            "Start it with `rlhf pipeline`, or name the run folders if the command line gave them other names.",
        )  # fmt: skip
    found = [path] if is_run(path) else list(run_folders(path))
    if not found:
        raise no_run(path)
    return found
