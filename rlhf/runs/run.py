"""The run folder, which is the same for every stage.

runs/NAME/
  config.yaml     the resolved config            run.json        stage, status, parents, data, versions
  metrics.jsonl   one line per logged step       samples.jsonl   completions with their scores
  events.jsonl    what the guard of PPO said      checkpoints/    for --resume
  model/          the result in Hugging Face format
  updates/        recorded PPO updates, for `rlhf replay`
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config
from rlhf.core.command_line import git_commit
from rlhf.core.console import is_main, say
from rlhf.core.errors import UserError
from rlhf.core.files import append_jsonl, write_bytes, write_json, write_text
from rlhf.core.limits import read_json_object
from rlhf.data.schema import READABLE_VERSIONS, SCHEMA_VERSION
from rlhf.data.store import Dataset
from rlhf.distributed.deepspeed_json import zero_stage
from rlhf.runs.changes import check_inputs, extension, moved
from rlhf.runs.checkpoint import Checkpoints
from rlhf.runs.find import no_run
from rlhf.runs.lock import LOCK, check_free, check_kept, lock, unlock
from rlhf.runs.logged import lines_until
from rlhf.runs.model_folder import check_model_folder, no_model

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
        for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
            file = self.path / name
            if file.is_file():
                lines = file.read_bytes().splitlines(keepends=True)
                write_bytes(file, b"".join(lines_until(step, lines, file)))


RUN_FILES = {
    "config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "rejected.jsonl",
    "reward_metrics.json", "specialist_metrics.json", "cache",
    "checkpoints", "updates", "tensorboard", "model", "adapter", "critic", LOCK, ".config.yaml.partial",
    ".run.json.partial", ".metrics.jsonl.partial", ".samples.jsonl.partial", ".events.jsonl.partial",
    ".reward_metrics.json.partial", ".specialist_metrics.json.partial",
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
        base["zero_stage"] = 0 if config.deepspeed is None else zero_stage(config.deepspeed)
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
    notes, note = list(info.get("extended", [])), extension(path, info, config)
    if note is not None and note not in notes:
        notes.append(note)
        say(f"{path} is complete; it is made longer: {note}")
    moves, move = list(info.get("moved", [])), moved(path, info, config, distributed.world_size())
    if move:
        moves.append(move)
        changes = (f"{key} {pair['from']} -> {pair['to']}" for key, pair in move.items())
        say(f"{path} goes on elsewhere: {', '.join(changes)}")
    return ({"extended": notes} if notes else {}) | ({"moved": moves} if moves else {})


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
    try:
        info = read_json_object(file)
        wrong = [key for key, kind in REQUIRED.items() if not isinstance(info.get(key), kind)]
        for key in LISTS:
            value = info.get(key, [])
            wrong += [] if isinstance(value, list) and all(isinstance(one, dict) for one in value) else [key]
        if wrong:
            raise ValueError(f"no valid {', '.join(wrong)}")
    except (ValueError, OSError) as error:
        raise UserError(
            f"{file}: damaged: {error}", remedy="Put the file back, or start the run again with --overwrite."
        ) from None
    return info


def is_run(path: str | Path) -> bool:
    """True for a run folder."""
    return (Path(path) / "run.json").is_file()


def is_complete(config: StageConfig) -> bool:
    """True if the run of this config is finished, and the config does not make it longer.

    Raises:
        UserError: The folder holds the run of another config.
    """
    if not is_run(config.run):
        return False
    info = read_run(config.run)
    return info["status"] == "complete" and extension(Path(config.run), info, config) is None


def resolve_model_path(path: str | Path) -> str:
    """The model folder: `model/` of a finished run; `path` itself for a model folder or a name on the Hub.

    Raises:
        UserError: The run is not finished, there is no model at a local path, or `check_model_folder` refuses it.
    """
    if is_run(path):
        info = read_run(path)
        if info.get("status") != "complete":
            raise UserError(
                f"{path}: this {info.get('stage')} run is not finished (status: {info.get('status')})",
                remedy="Finish it with --resume first.",
            )
        if info.get("schema_version") not in READABLE_VERSIONS:
            raise UserError(
                f"{path}: has schema version {info.get('schema_version')}; this version reads up to {SCHEMA_VERSION}"
            )
        check_model_folder(Path(path) / "model")
        return str(Path(path) / "model")
    text = str(path)
    looks_local = text.startswith((".", "/", "~", "runs/")) or text.count("/") > 1 or Path(path).is_file()
    looks_local = looks_local or text.endswith((".yaml", ".yml", ".json", ".jsonl"))  # no names on the Hub
    if looks_local and not (Path(path) / "config.json").is_file():
        raise no_model(path)
    check_model_folder(Path(path))
    return text


def refuse_specialist(path: str | Path) -> None:
    """Refuse a specialist run where a language model or a reward model is needed.

    Raises:
        UserError: It is one.
    """
    if is_run(path) and read_run(path)["stage"] == "specialist":
        raise UserError(
            f"{path}: a specialist gives labels, tags or spans, not answers or scores",
            remedy=f"Its {Path(path) / 'model'} is a plain model for transformers: see docs/specialists.md.",
        )


def parent_facts(path: str | Path) -> dict[str, Any]:
    """What run.json records about a parent: its path, the fingerprint of its weights, and its stage if it is a run.

    Models on the Hub have no fingerprint.

    Raises:
        UserError: `check_result` refuses the run.
    """
    if not is_run(path):
        local = Path(path).is_dir() and is_main()  # only rank 0 writes run.json, so only it hashes
        return {"path": str(path)} | ({"fingerprint": fingerprint(Path(path))} if local else {})
    if is_main():
        check_result(path)
    info = read_run(path)
    return {"path": str(path), "stage": info["stage"], "fingerprint": info.get("model_fingerprint")}


def check_result(path: str | Path) -> None:
    """Compare the model of a run with the fingerprint that run.json recorded when the run ended; reads all weights.

    Raises:
        UserError: They differ: a damaged file, or one that was changed since.
    """
    recorded = read_run(path).get("model_fingerprint")
    if recorded is not None and fingerprint(Path(path) / "model") != recorded:
        raise UserError(
            f"{path}/model: its weights or config files are not those that the run wrote (SHA-256)",
            "A file is damaged, or was changed since.",
            "Put the files back from a copy or train the run again. If the change is yours, copy the folder to another "
            "place and name that: it is then a model, not the result of this run.",
        )


def template_time(config: StageConfig, resume: bool) -> str:
    """The time at which the chat templates of a run are frozen, in ISO format. Every rank calls it.

    That of the run itself with `resume`, or of its parent, else the present on rank 0: clocks of ranks that start at
    midnight, or on several hosts, would give them other tokens.
    """
    places = [config.run] * resume + [config.model.path]
    infos = [read_run(place) for place in places if is_run(place)]
    keys = ("template_time", "reward_template_time")
    found = [info[key] for info in infos for key in keys if info.get(key)]
    time: str = distributed.from_main(found[0] if found else datetime.now().isoformat(timespec="seconds"))
    return time


def check_same_text(child: str, mine: Mapping[str, Any], parent: str | Path) -> None:
    """Refuse a parent run with a different tokenizer or chat template (fingerprint mismatch).

    Args:
        child: What the message calls this model, such as "the policy".
        mine: Fingerprints `tokenizer` and `chat_template` of this model.
        parent: Path of the parent. Parents that are not runs are not checked.
    """
    if not is_run(parent):
        return
    theirs = read_run(parent)
    for key, word in (("tokenizer", "tokenizer"), ("chat_template", "chat template")):
        if theirs.get(key) != mine.get(key):
            raise UserError(
                f"{parent}: its {word} differs from that of {child} (fingerprint mismatch)",
                "The same text would become different tokens, so its scores and weights would be wrong for them.",
                "Train both stages from the same base model with the same model.chat_template, "
                "or for a reward model set reward.retokenize=true with critic.init=policy.",
            )


def data_facts(datasets: Iterable[Dataset]) -> list[dict[str, Any]]:
    """What run.json records about the datasets."""
    return [{"path": str(d.path), "kind": d.kind, "fingerprint": d.fingerprint} for d in datasets]


ENVIRONMENT_KEYS = {"local_files_only", "transformers_version", "name_or_path", "_name_or_path"}
"""Keys of a model's config files that say how and where it was saved, which does not change the model."""


def fingerprint(folder: Path) -> str:
    """SHA-256 (64 hex digits) of the weights and config files of a model folder, without ENVIRONMENT_KEYS."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    for file in sorted(folder.glob("*config.json")):
        digest.update(file.name.encode() + hashlib.sha256(_config_content(file)).digest())
    return digest.hexdigest()


def _config_content(file: Path) -> bytes:
    try:
        values = read_json_object(file)
    except ValueError:
        return file.read_bytes()
    kept = {key: value for key, value in values.items() if key not in ENVIRONMENT_KEYS}
    return json.dumps(kept, sort_keys=True).encode()


def finish(run: Run, **values: Any) -> None:
    """Mark the run complete and record the fingerprint of its result. Every rank calls it."""
    if is_main():
        run.update(status="complete", model_fingerprint=fingerprint(run.model), **values)
        unlock(run.path)
        say(f"Done: {run.model}")
    distributed.barrier()
