"""The JSON files and safetensors headers of a model folder, checked before a library reads them; its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

from rlhf.core.errors import UserError, blame
from rlhf.core.limits import MODEL_PARTS, parse_json, read_json_object
from rlhf.runs.find import runs_nearby

FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json",
    "model.safetensors.index.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA")
"""Kinds of PEFT adapters whose weights can be merged into the model's."""
_PARTS = re.compile(r"(^|_)(layers?|blocks?|experts?)(_|$)|^depth$")


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder whose JSON files or weights no library could read, or could not read in finite time.

    transformers makes lists as long as the number of layers while it reads a config, and ends in a traceback at JSON
    that is nested deeply.

    Raises:
        UserError: A file is not a JSON object, is nested too deeply, names more layers or experts than any model
            has, or is no whole safetensors file; or the weights are a pickle.
    """
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        with blame(f"{file}: cannot be read", remedy="Download the model again, or restore the file from a copy."):
            values = read_json_object(file)
        if name == "config.json":
            _check_size(file, values)
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        read_safetensors_header(file)
    check_adapter_weights(folder)
    pickles = [file for suffix in PICKLES for file in sorted(folder.glob(f"*{suffix}"))]
    if pickles and not weights and (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: its weights are a pickle ({pickles[0].name}), which is never loaded",
            "A pickle can run any code when it is read.",
            f"If you trust its author, convert it once, for instance with: {_conversion(folder)}",
        )


def check_adapter_weights(folder: Path) -> None:
    """Refuse an adapter whose weights are a pickle, which PEFT would load.

    Raises:
        UserError: The folder has adapter_model.bin and no adapter_model.safetensors.
    """
    file = folder / "adapter_model.bin"
    whole = file.with_suffix(".safetensors")
    if file.is_file() and not whole.is_file():
        code = (
            "import torch, safetensors.torch as s; "
            f"s.save_file({{k: v.contiguous() for k, v in torch.load({str(file)!r}, weights_only=True).items()}}, "
            f"{str(whole)!r})"
        )
        raise UserError(
            f"{folder}: the adapter's weights are a pickle ({file.name}), which is never loaded",
            "A pickle can run any code when it is read.",
            f"Convert it once, which reads tensors alone: {shlex.join(['python', '-c', code])}",
        )


def _conversion(folder: Path) -> str:
    """The command that writes the folder's weights as safetensors."""
    names = read_json_object(folder / "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names and str(names[0]).isidentifier() else "AutoModelForCausalLM"
    path = str(folder)
    code = f"from transformers import {name} as M; M.from_pretrained({path!r}).save_pretrained({path!r})"
    return shlex.join(["python", "-c", code])


def refuse_no_model(path: str | Path) -> NoReturn:
    """Refuse a local path without a model; says what to do with an adapter that another tool has saved.

    Raises:
        UserError: Always.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        what = "no model there (no run.json and no config.json)"
        if not Path(path).is_dir():
            there = Path(path).exists()
            what = "a file, not a run or a model folder" if there else "there is no such run, model or file"
        raise UserError(f"{path}: {what}", remedy=runs_nearby(Path(path)) or "Check the path.")
    with blame(f"{file}: cannot be read", remedy="Restore the folder from a copy."):
        values = read_json_object(file)
    check_adapter_weights(Path(path))
    kind = values.get("peft_type")
    what = f"{path}: is an adapter ({kind}) for {values.get('base_model_name_or_path')}, not a model"
    if kind not in MERGEABLE:
        why = "An adapter of this kind has no weights that could be merged into the model."
        raise UserError(what, why, "Start from a model, and train such an adapter with `tuning`.")
    code = (
        f"from peft import AutoPeftModelForCausalLM as M; m = M.from_pretrained({str(path)!r}).merge_and_unload(); "
        f"m.save_pretrained({str(path) + '-merged'!r})"
    )
    raise UserError(
        what,
        "It has to be merged into that model first.",
        f"{shlex.join(['python', '-c', code])}; then copy the tokenizer's files to {path}-merged and name that folder.",
    )


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> `{"dtype": ..., "shape": [...], "data_offsets": [...]}` of a safetensors file.

    Raises:
        UserError: It is no safetensors file, or a part of it is missing.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > size - 8:
                raise ValueError(_what_else(start))
            header = parse_json(handle.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        for tensor in header.values():
            math.prod(tensor["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        what = str(error) if isinstance(error, ValueError) else "its header does not describe tensors"
        raise UserError(f"{file}: not a safetensors file: {what}", remedy="Download or copy the model again.") from None
    if end != size - 8 - length:
        raise UserError(
            f"{file}: has {size:,} bytes, its header describes {end + 8 + length:,}",
            "It was cut off or damaged.",
            "Download or copy the model again.",
        )
    return dict(header)


def tensor_sizes(folder: Path) -> list[int]:
    """Numbers of elements of the tensors in a folder's safetensors files, from their headers.

    Raises:
        UserError: See `read_safetensors_header`.
    """
    headers = map(read_safetensors_header, sorted(folder.glob("*.safetensors")))
    return [math.prod(tensor["shape"]) for header in headers for tensor in header.values()]


def _what_else(start: bytes) -> str:
    if start.startswith(b"version "):
        return "it is a Git LFS pointer; `git lfs pull` downloads the file"
    if start.startswith((b"PK", b"\x80")):
        return "it is a pickle, which is never loaded"
    return "its header is damaged"


def _check_size(file: Path, values: Any, inside: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_size(file, value, f"{inside}{key}.")
        elif isinstance(value, int) and value > MODEL_PARTS and _PARTS.search(key):
            raise UserError(
                f"{file}: {inside}{key} is {value:,}; the limit is {MODEL_PARTS:,}",
                "No model has that many; loading it would not end.",
                "Download the model again, or restore the file from a copy.",
            )


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
