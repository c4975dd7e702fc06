"""The JSON files of a model folder, checked before a library reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.limits import MODEL_PARTS, read_json_object

FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json",
    "model.safetensors.index.json",
)  # fmt: skip
_PARTS = re.compile(r"(^|_)(layers?|blocks?|experts?)(_|$)|^depth$")


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder whose JSON files no library could read, or could not read in finite time.

    transformers makes lists as long as the number of layers while it reads a config, and ends in a traceback at JSON
    that is nested deeply.

    Raises:
        UserError: A file is not a JSON object, is nested too deeply, or names more layers or experts than any model
            has.
    """
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = read_json_object(file)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{file}: cannot be read: {error}", remedy="Download the model again, or restore the file from a copy."
            ) from None
        if name == "config.json":
            _check_size(file, values)


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
