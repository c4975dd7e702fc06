"""The manifest of a dataset folder: read and checked, with the hashes of its shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError, nearest
from rlhf.data.schema import KINDS, READABLE_VERSIONS, SCHEMA_VERSION

RESTORE = "Import the data again, or restore the file from a copy."
"""What to do about a damaged dataset."""


def read_manifest(path: Path) -> tuple[str, str, dict[str, Any]]:
    """The kind of a dataset folder's records, its fingerprint (SHA-256 of its shards' hashes), and its manifest.

    Raises:
        UserError: It is not a manifest, is of another schema version, or names a shard outside of the folder.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        version, kind = int(manifest["schema_version"]), str(manifest["kind"])
        shards = [(shard["file"], shard["sha256"], shard["rows"]) for shard in manifest["shards"]]
        if not all((type(f), type(h), type(n)) == (str, str, int) for f, h, n in shards):
            raise TypeError("a shard needs `file`, `sha256` and `rows`")
        if not isinstance(manifest.get("splits", {}), dict) or not isinstance(manifest.get("count", 0), int):
            raise TypeError("`splits` and `count` are not what an import writes")
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path}/manifest.json: not a dataset manifest ({error!r})") from None
    for file, _, _ in shards:
        if not _is_inside(path, file):
            raise UserError(
                f"{path}/manifest.json: the shard {file!r} is not a file of this folder",
                "A dataset is a folder that can be copied whole; its manifest cannot name files elsewhere.",
                RESTORE,
            )
    if version not in READABLE_VERSIONS or kind not in KINDS:
        raise UserError(
            f"{path}: schema version {version}, kind {kind!r}; this version reads up to {SCHEMA_VERSION}",
            remedy="Import the data again with this version.",
        )
    fingerprint = hashlib.sha256("".join(sha256 for _, sha256, _ in shards).encode()).hexdigest()
    return kind, fingerprint, manifest


def _is_inside(folder: Path, name: str) -> bool:
    """True if `name` is a plain file name, and not a symbolic link to something outside of the folder."""
    if not name or name != Path(name).name or "\0" in name:
        return False
    # The folder itself may be linked to, and a tool may keep the content of its files elsewhere in the same folder.
    return (folder / name).resolve().is_relative_to(folder.resolve())


def shard_fault(file: Path, sha256: str | None) -> str | None:
    """What is wrong with a shard: it is missing or, with a hash to compare, damaged; None if nothing."""
    if not file.is_file():
        return "missing"
    if sha256 is not None and file_hash(file) != sha256:
        return "damaged: its SHA-256 differs from the manifest"
    return None


def file_hash(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_kind(kind: str) -> str:
    """The kind of record of this name.

    Raises:
        UserError: There is none.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of record {kind!r}", remedy=nearest(kind, KINDS))
    return kind
