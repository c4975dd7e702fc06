"""The run folder, which is the same for every stage.

runs/NAME/
  config.yaml     the resolved config            run.json        stage, status, parents, data, versions
  metrics.jsonl   one line per logged step       samples.jsonl   completions with their scores
  checkpoints/    for --resume                   model/          the result in Hugging Face format
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.config.base import StageConfig
from rlhf.config.load import dump_config
from rlhf.core.console import is_main, say
from rlhf.core.errors import UserError
from rlhf.core.files import append_jsonl, write_json, write_text
from rlhf.data.schema import READABLE_VERSIONS, SCHEMA_VERSION
from rlhf.data.store import Dataset
from rlhf.runs.checkpoint import Checkpoints
from rlhf.runs.model_folder import check_model_folder

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")


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
            write_json(self.path / "run.json", {**self.info(), **values})

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `metrics.jsonl`, `samples.jsonl`, `rejected.jsonl`, ..."""
        if is_main():
            append_jsonl(self.path / name, rows)

    def rewind(self, step: int) -> None:
        """Delete the logged lines after `step`; the run continues from there and logs them again."""
        if not is_main():
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            if not file.is_file():
                continue
            kept = [line for line in file.read_text("utf-8").splitlines(keepends=True) if _step_of(line) <= step]
            write_text(file, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a crash cut off


def open_run(config: StageConfig, stage: str, resume: bool, overwrite: bool, facts: Mapping[str, Any]) -> Run:
    """Create the run folder, or reopen it with `resume`. Every rank calls it.

    Args:
        config: The resolved config; with `resume` it must be the one that the run was started with.
        stage: sft, reward or ppo.
        resume: Continue from the newest complete checkpoint, or from the start if there is none.
        overwrite: Delete an existing run of that name first.
        facts: More for run.json: parents, data, fingerprints of tokenizer and chat template.

    Raises:
        UserError: The folder is in use, or holds a run of another stage or config.
    """
    run = Run(Path(config.run), stage)
    check_run_folder(config, stage, resume, overwrite)
    distributed.barrier()
    if is_main():
        if overwrite:
            shutil.rmtree(run.path, ignore_errors=True)
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / "rejected.jsonl").unlink(missing_ok=True)
        (run.path / "config.yaml").write_text(dump_config(config), "utf-8")
        base = {"stage": stage, "status": "running", "schema_version": SCHEMA_VERSION}
        base |= {"packages": {name: importlib.metadata.version(name) for name in PACKAGES}, "git": git_commit()}
        write_json(run.path / "run.json", {**base, "processes": distributed.world_size(), **facts})
    distributed.barrier()
    return run


def check_run_folder(config: StageConfig, stage: str, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that is in use, before anything is loaded. See `open_run`."""
    path = Path(config.run)
    if path.exists() and not path.is_dir():
        raise UserError(f"run: {path} is a file", remedy="Name a folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "run.json").is_file():
        raise UserError(f"run: {path} exists and is not a run", remedy="Name another folder. Nothing was deleted.")
    if overwrite:
        return
    if not resume:
        raise UserError(
            f"run: {path} already holds a run (status: {read_run(path).get('status')})",
            remedy="Continue it with --resume, replace it with --overwrite, or name another folder: run=...",
        )
    if read_run(path)["stage"] != stage:
        raise UserError(f"run: {path} is a {read_run(path)['stage']} run, not a {stage} run")
    old = (path / "config.yaml").read_text("utf-8")
    changed = sorted(set(old.splitlines()) ^ set(dump_config(config).splitlines()))
    if changed:
        raise UserError(
            f"run: {path} was started with a different config, so --resume would not continue the same run",
            "Lines that differ: " + "; ".join(line.strip() for line in changed[:6]),
            f"Resume with --config {path}/config.yaml, or start a new run under another name.",
        )


def read_run(path: str | Path) -> dict[str, Any]:
    """The content of run.json in a run folder.

    Raises:
        UserError: It does not exist, or is damaged.
    """
    file = Path(path) / "run.json"
    if not file.is_file():
        raise UserError(f"{path}: not a run folder (no run.json)", remedy="Name the folder of a finished stage.")
    try:
        info: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged: {error}") from None
    return info


def is_run(path: str | Path) -> bool:
    """True for a run folder."""
    return (Path(path) / "run.json").is_file()


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
    looks_local = text.startswith((".", "/", "~", "runs/")) or text.count("/") > 1
    if looks_local and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: no model there (no run.json and no config.json)", remedy="Check the path.")
    check_model_folder(Path(path))
    return text


def parent_facts(path: str | Path) -> dict[str, Any]:
    """What run.json records about a parent: its path, the fingerprint of its weights, and its stage if it is a run.

    Models on the Hub have no fingerprint.
    """
    if not is_run(path):
        local = Path(path).is_dir() and is_main()  # only rank 0 writes run.json, so only it hashes
        return {"path": str(path)} | ({"fingerprint": fingerprint(Path(path))} if local else {})
    info = read_run(path)
    return {"path": str(path), "stage": info["stage"], "fingerprint": info.get("model_fingerprint")}


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


def fingerprint(folder: Path) -> str:
    """SHA-256 (64 hex digits) of the weights and config of a model folder."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with open(file, "rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def finish(run: Run, **values: Any) -> None:
    """Mark the run complete and record the fingerprint of its result. Every rank calls it."""
    if is_main():
        run.update(status="complete", model_fingerprint=fingerprint(run.model), **values)
        say(f"Done: {run.model}")
    distributed.barrier()


def git_commit() -> str | None:
    """The git commit of the code, with '+changes' if files were changed; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
