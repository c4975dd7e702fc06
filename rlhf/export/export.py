"""From a finished run to a folder that plain transformers (or PEFT) loads without this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.files import whole_folder
from rlhf.core.table import Pick
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.export.formats import Source
from rlhf.export.model_card import MARK, model_card
from rlhf.runs.model_folder import fingerprint
from rlhf.runs.parents import check_result, refuse_specialist, resolve_model_path
from rlhf.runs.run import is_run, read_run

ROLES = ("policy", "critic", "reward", "reference")
"""Models of a PPO run that can be exported. Any other run has one result."""


def export(
    run: str | Path,
    out: str | Path,
    exporter: Pick,
    *,
    role: str = "policy",
    name: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a finished run's result into the folder `out`, with tokenizer, chat template and model card.

    Args:
        run: The run's folder.
        out: The folder to make; it appears only when it is complete.
        exporter: A row of EXPORTERS with its options.
        role: Which of ROLES of a PPO run. Its reward model and reference are the results of its parent runs.
        name: The hub name of a folder that will be pushed, for the card.
        license: A licence identifier of the hub, for the card.
        overwrite: Replace an earlier export.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        path, format, stage, dtype, parameters, stop_tokens, adapter_base, and the fingerprint of the result.

    Raises:
        UserError: The run is not finished, `out` is taken, or the run has no result in that format.
    """
    run, out = Path(run), Path(out)
    if role in ("reward", "reference"):
        run = _parent_run(run, role)
    stage, model = read_run(run)["stage"], Path(resolve_model_path(run))
    check_result(run)
    refuse_specialist(run)
    check_out(out, run, overwrite)
    from rlhf.models.load import quiet  # imports torch

    quiet()
    config = ModelConfig(path=str(run), trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, str(model))
    if role == "critic":
        stage, model = "critic", _critic_of(run)
    source = Source(run, stage, model, config, chat)
    with _writing(out), whole_folder(out) as folder:
        done = exporter(source, folder)
        if name is not None and done.bottleneck:
            raise UserError(
                "--push-to-hub: a bottleneck adapter is loaded by a file of its folder",
                "The loading snippet works with local folders.",
                "Export without --push-to-hub, and upload the folder with `hf upload`.",
            )
        if name is not None and done.adapter_base is not None and Path(done.adapter_base).is_dir():
            raise UserError(
                f"--push-to-hub: the adapter belongs to the local folder {done.adapter_base}",
                "Nobody else could load it.",
                "Push the whole model: --format hf.",
            )
        (folder / "README.md").write_text(model_card(source, done, name or str(out), license), "utf-8")
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that nobody else may read
        digest = fingerprint(folder)
    return {
        "path": str(out), "format": exporter.name, "stage": stage, "dtype": done.dtype, "parameters": done.parameters,
        "stop_tokens": chat.tokenizer.convert_ids_to_tokens(list(done.stop_ids)), "adapter_base": done.adapter_base,
        "fingerprint": digest,
    }  # fmt: skip


def _parent_run(run: Path, role: str) -> Path:
    """The run whose result is a PPO run's reward model or reference.

    Raises:
        UserError: Not a PPO run, no such role, or the parent is not a run or was trained again.
    """
    info = read_run(run)
    place = ("reference", "reward").index(role)
    if info["stage"] != "ppo" or len(info["parents"]) <= place:
        raise UserError(f"--role {role}: {run} has no {role} model", remedy="Name a PPO run that has one.")
    recorded = info["parents"][place]
    parent = Path(recorded["path"])
    if not is_run(parent):
        raise UserError(
            f"--role {role}: the {role} model is {parent}, which is not a run",
            "There is nothing to merge.",
            "Use it as it is.",
        )
    if read_run(parent).get("model_fingerprint") != recorded.get("fingerprint"):
        raise UserError(f"--role {role}: {parent} was trained again after {run}", "It is another model now.")
    return parent


def _critic_of(run: Path) -> Path:
    folder = run / "critic"
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--role critic: {run} has no critic",
            "PPO runs save their critic only with model.sharing `shared`, as an adapter.",
        )
    return folder


def check_out(out: Path, run: Path, overwrite: bool) -> None:
    """Refuse a folder that is taken. Only an earlier export, recognised by its card, is ever replaced.

    Raises:
        UserError: The folder is taken.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    card = out / "README.md"
    mine = card.is_file() and MARK in card.read_text("utf-8", errors="replace")
    if not mine or out.resolve() in (run.resolve(), *run.resolve().parents):
        raise UserError(f"--out {out}: exists and is not an export", remedy="Name another folder; nothing is deleted.")
    if not overwrite:
        raise UserError(f"--out {out}: holds an export already", remedy="Replace it with --overwrite, or name another.")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written: {error}", remedy="Free disk space, or name another folder."
        ) from None
