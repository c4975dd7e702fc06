"""The run folder, which is the same for every stage.

runs/NAME/
  config.yaml     the resolved config            run.json        stage, status, parents, data, versions
  metrics.jsonl   one line per logged step       samples.jsonl   completions with their scores
  events.jsonl    alarms of PPO's guard          checkpoints/    for --resume
  model/          the result in Hugging Face format
  updates/        recorded PPO updates, for `rlhf replay`
"""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config
from rlhf.core.command_line import git_commit
from rlhf.core.console import is_main, say
from rlhf.core.errors import UserError, blame
from rlhf.core.files import append_jsonl, write_bytes, write_json, write_text
from rlhf.core.limits import read_json_object
from rlhf.data.schema import SCHEMA_VERSION
from rlhf.data.store import Dataset
from rlhf.distributed.deepspeed_json import zero_stage
from rlhf.runs.changes import check_inputs, extension, moved
from rlhf.runs.checkpoint import Checkpoints
from rlhf.runs.find import no_run
from rlhf.runs.lock import LOCK, check_free, check_kept, lock, unlock
from rlhf.runs.logged import lines_until
from rlhf.runs.model_folder import fingerprint

REQUIRED = {"stage": str, "status": str}
"""Keys that every run.json has, and their types."""
LISTS = ("parents", "onlookers", "data", "extended", "moved")
"""Keys of run.json that are lists of objects, where they are given."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")


_version = functools.cache(importlib.metadata.version)  # it parses a package's whole metadata


@dataclass(frozen=True)
class Run:
    """An open run folder. Every rank may call the methods; only rank 0 writes."""

    path: Path
    stage: str

    @property
    def model(self) -> Path:
        return self.path / "model"

    def checkpoints(self, keep: int) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", keep)

    def info(self) -> dict[str, Any]:
        """The content of run.json."""
        return read_run(self.path)

    def update(self, **values: Any) -> None:
        """Set keys of run.json."""
        if is_main():
            check_kept(self.path)
            write_json(self.path / "run.json", {**self.info(), **values})

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `metrics.jsonl`, `samples.jsonl`, `events.jsonl`, `rejected.jsonl`, ...

        Raises:
            UserError: The folder was taken away.
        """
        if is_main():
            check_kept(self.path)
            append_jsonl(self.path / name, rows)

    def rewind(self, step: int) -> None:
        """Delete the logged lines after `step`; the run continues from there and logs them again.

        Raises:
            UserError: A line up to `step` is damaged.
        """
        if not is_main():
            return
        for name in LOGS:
            file = self.path / name
            if file.is_file():
                lines = file.read_bytes().splitlines(keepends=True)
                write_bytes(file, b"".join(lines_until(step, lines, file)))


LOGS = ("metrics.jsonl", "samples.jsonl", "events.jsonl")
WRITTEN_WHOLE = ("config.yaml", "run.json", *LOGS, "reward_metrics.json", "specialist_metrics.json")
RUN_FILES = {
    *WRITTEN_WHOLE, *(f".{name}.partial" for name in WRITTEN_WHOLE), "rejected.jsonl", "cache", "checkpoints",
    "updates", "tensorboard", "model", "adapter", "critic", LOCK,
}  # fmt: skip
"""What stages write into a run folder."""


def open_run(config: StageConfig, stage: str, resume: bool, overwrite: bool, facts: Mapping[str, Any]) -> Run:
    """Create the run folder, or reopen it with `resume`, and lock it for this process. Every rank calls it.

    Args:
        config: The resolved config; with `resume` it must be the one that the run was started with, or make a complete
            run longer, or differ in where it runs (`changes.PLACE`).
        stage: sft, reward, dpo, ppo or specialist.
        resume: Continue from the newest complete checkpoint, or from the start if there is none.
        overwrite: Delete an existing run of that name first.
        facts: More for run.json: parents, data, fingerprints of tokenizer and chat template.

    Raises:
        UserError: The folder is in use, or holds a run of another stage, config or other inputs.
    """
    run = Run(Path(config.run), stage)
    check_run_folder(config, stage, resume, overwrite)
    distributed.barrier()
    if is_main():
        run.path.mkdir(parents=True, exist_ok=True)
        lock(run.path)
        before = _checked_again(config, stage, resume, overwrite, facts)
        (run.path / "rejected.jsonl").unlink(missing_ok=True)
        (run.path / "metrics.jsonl").touch()
        base: dict[str, Any] = {"stage": stage, "status": "running", "schema_version": SCHEMA_VERSION}
        base |= {"packages": {name: _version(name) for name in PACKAGES}, "git": git_commit()}
        base |= {"processes": distributed.world_size(), "device": distributed.device().type, **facts, **before}
        base["zero_stage"] = zero_stage(config.deepspeed)
        new = not is_run(run.path)
        if new:  # first, since a folder with run.json is a run and must have its config, whenever a kill comes
            write_text(run.path / "config.yaml", dump_config(config))
        write_json(run.path / "run.json", base)
        if not new:  # last, since `extension` needs the note in run.json
            write_text(run.path / "config.yaml", dump_config(config))
    distributed.barrier()
    return run


def _checked_again(
    config: StageConfig, stage: str, resume: bool, overwrite: bool, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the locked folder, since another process may have used it until now, and clear it for a new run.

    Returns:
        What run.json keeps of an earlier start: notes of how the run was extended, and moved to other processes.
    """
    path = Path(config.run)
    check_run_folder(config, stage, resume, overwrite)
    if overwrite or not is_run(path):
        _clear(path)
        return {}
    info = read_run(path)
    check_inputs(path, info, facts)
    if not (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path}/metrics.jsonl: deleted, so the metrics of the run would have a hole",
            remedy="Put it back, or make an empty file of that name to continue without the earlier metrics.",
        )
    kept = {key: list(info.get(key, [])) for key in ("extended", "moved")}
    note = extension(path, info, config)
    if note is not None and note not in kept["extended"]:
        kept["extended"].append(note)
        say(f"{path} is complete; it is made longer: {note}")
    if move := moved(path, info, config, distributed.world_size()):
        kept["moved"].append(move)
        changes = (f"{key} {pair['from']} -> {pair['to']}" for key, pair in move.items())
        say(f"{path} continues elsewhere: {', '.join(changes)}")
    return {key: notes for key, notes in kept.items() if notes}


def check_run_folder(config: StageConfig, stage: str, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that is in use, before anything is loaded. See `open_run`."""
    path = Path(config.run)
    if path.is_symlink() and not path.exists():
        raise UserError(f"run: {path} is a link to {path.readlink()}, which does not exist", remedy="Remove the link.")
    if path.exists() and not path.is_dir():
        raise UserError(f"run: {path} is a file", remedy="Name a folder.")
    if path.is_dir():
        check_free(path)
    if not is_run(path):
        _check_no_run(path, resume)
        return
    if overwrite:
        return
    info = read_run(path)
    if not resume:
        raise UserError(
            f"run: {path} already holds a run (status: {info['status']})",
            remedy="Continue it with --resume, replace it with --overwrite, or name another folder: run=...",
        )
    if info["stage"] != stage:
        raise UserError(f"run: {path} is a {info['stage']} run, not a {stage} run", remedy="Name another folder.")
    extension(path, info, config)


def _check_no_run(path: Path, resume: bool) -> None:
    """A folder without run.json must be absent, empty, or what a start or a deletion left that did not end."""
    names = {inner.name for inner in path.iterdir()} if path.is_dir() else set()
    started = RUN_FILES if LOCK in names else {"config.yaml", "rejected.jsonl", ".run.json.partial"}
    if names - started:
        raise UserError(f"run: {path} exists and is not a run", remedy="Name another folder. Nothing was deleted.")
    if resume and not names:
        raise UserError(f"run: there is no run in {path} to continue", remedy="Leave out --resume to start it.")


def delete_run(path: str | Path) -> None:
    """Delete what is in a run folder; the folder stays, also where it is a link.

    Raises:
        UserError: Another process uses it, or something in it cannot be deleted.
    """
    path = Path(path)
    if is_run(path):
        lock(path)
        try:
            _clear(path)
        finally:
            unlock(path)


def _clear(path: Path) -> None:
    """Delete what is in a locked run folder: run.json first, since what is left without it is not taken for a run."""
    for inner in sorted(path.iterdir(), key=lambda inner: inner.name != "run.json"):
        if inner.name == LOCK:
            continue
        try:
            shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
        except OSError as error:
            raise UserError(f"run: {inner} cannot be deleted: {error.strerror}", remedy="Delete it by hand.") from None


def read_run(path: str | Path) -> dict[str, Any]:
    """The content of run.json in a run folder.

    Raises:
        UserError: It does not exist, or is damaged.
    """
    file = Path(path) / "run.json"
    if not file.is_file():
        raise no_run(Path(path))
    with blame(f"{file}: damaged", remedy="Put the file back, or start the run again with --overwrite."):
        info = read_json_object(file)
        wrong = [key for key, kind in REQUIRED.items() if not isinstance(info.get(key), kind)]
        for key in LISTS:
            value = info.get(key, [])
            wrong += [] if isinstance(value, list) and all(isinstance(one, dict) for one in value) else [key]
        if wrong:
            raise ValueError(f"no valid {', '.join(wrong)}")
    return info


def is_run(path: str | Path) -> bool:
    """True for a run folder."""
    return (Path(path) / "run.json").is_file()


def stage_of(path: str | Path) -> str | None:
    """The stage of a run; None for a path that is no run folder."""
    return str(read_run(path)["stage"]) if is_run(path) else None


def is_finished(path: str | Path) -> bool:
    """True for the folder of a run that is complete."""
    return is_run(path) and read_run(path)["status"] == "complete"


def is_complete(config: StageConfig) -> bool:
    """True if the run of this config is finished, and the config does not make it longer.

    Raises:
        UserError: The folder holds the run of another config.
    """
    return is_finished(config.run) and extension(Path(config.run), read_run(config.run), config) is None


def data_facts(datasets: Iterable[Dataset]) -> list[dict[str, Any]]:
    """What run.json records about the datasets."""
    return [{"path": str(d.path), "kind": d.kind, "fingerprint": d.fingerprint} for d in datasets]


def finish(run: Run, **values: Any) -> None:
    """Mark the run complete and record the fingerprint of its result. Every rank calls it."""
    if is_main():
        run.update(status="complete", model_fingerprint=fingerprint(run.model), **values)
        unlock(run.path)
        say(f"Done: {run.model}")
    distributed.barrier()
