"""What a run starts from: the models of other runs, and model folders. They are checked, and noted in run.json."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.config.base import StageConfig
from rlhf.core.console import is_main
from rlhf.core.errors import UserError
from rlhf.data.schema import READABLE_VERSIONS, SCHEMA_VERSION
from rlhf.runs.model_folder import check_model_folder, fingerprint, refuse_no_model
from rlhf.runs.run import is_run, read_run, stage_of


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
        refuse_no_model(path)
    check_model_folder(Path(path))
    return text


def refuse_specialist(path: str | Path) -> None:
    """Refuse a specialist run where a language model or a reward model is needed.

    Raises:
        UserError: It is one.
    """
    if stage_of(path) == "specialist":
        raise UserError(
            f"{path}: a specialist gives labels, tags or spans, not answers or scores",
            remedy=f"Its {Path(path) / 'model'} is a plain model for transformers: see docs/specialists.md.",
        )


def parent_facts(path: str | Path) -> dict[str, Any]:
    """The record of a parent in run.json: its path, the fingerprint of its weights, and its stage if it is a run.

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

    With `resume` the run's own, else its parent's, else the time on rank 0: clocks of ranks that start at midnight, or
    on several hosts, could give different tokens.
    """
    places = [config.run] * resume + [config.model.path]
    infos = [read_run(place) for place in places if is_run(place)]
    keys = ("template_time", "reward_template_time")
    found = [info[key] for info in infos for key in keys if info.get(key)]
    return distributed.from_main(found[0] if found else datetime.now().isoformat(timespec="seconds"))


def check_same_text(mine: Mapping[str, Any], parent: str | Path) -> None:
    """Refuse a run whose tokenizer or chat template is not the policy's (fingerprint mismatch).

    Args:
        mine: Fingerprints `tokenizer` and `chat_template` of the policy.
        parent: Path of the run. What is not a run is not checked.
    """
    if not is_run(parent):
        return
    theirs = read_run(parent)
    for key, word in (("tokenizer", "tokenizer"), ("chat_template", "chat template")):
        if theirs.get(key) != mine.get(key):
            raise UserError(
                f"{parent}: its {word} differs from that of the policy (fingerprint mismatch)",
                "The same text would become different tokens, so its scores and weights would be wrong for them.",
                "Train both stages from the same base model with the same model.chat_template, "
                "or for a reward model set reward.retokenize=true with critic.init=policy.",
            )
