"""Replies on disk, so that none is paid for twice: one JSON file each, named by the hash of its request."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.files import sync
from rlhf.core.limits import parse_json
from rlhf.servers.replies import Reply


class ReplyCache:
    """A folder of replies. Threads and processes may share it.

    Args:
        folder: Made with the first reply.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @staticmethod
    def key(*parts: Any) -> str:
        """64 hex digits of the SHA-256 of the parts' canonical JSON."""
        text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """The reply; None if there is none, or a damaged one."""
        try:
            return Reply(**parse_json(self._path(key).read_text("utf-8")), cached=True)
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply. It appears under its name only when it is complete and on the disk.

        Raises:
            UserError: It cannot be written.
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # a name of its own, because another thread or process may write the same reply
            handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                json.dump(reply.as_dict(), file, ensure_ascii=False)
            sync(Path(partial))
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error}", remedy="Free disk space; then go on.") from None
