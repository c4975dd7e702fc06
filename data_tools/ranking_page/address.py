"""The page keeps its address when the command is run again: open pages and bookmarks go on, and so do drafts, which
browsers keep by address."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlhf.core.errors import UserError
from rlhf.core.loopback import LoopbackServer, Routes

SUFFIX = ".address"
"""Of the file next to the rankings that holds port and token; only its owner can read it."""


def server_at(file: Path, routes: Routes, port: int = 0) -> LoopbackServer:
    """A server at the address in a file, which is written.

    Args:
        file: Where the address is kept. Without it, or if it cannot be read, the address is a new one.
        routes: See `LoopbackServer`.
        port: The port; 0 takes that of the file if it is free, else any.

    Raises:
        UserError: The port that was asked for is not free, or the file cannot be written.
    """
    token, before = _read(file)
    try:
        server = LoopbackServer(routes, port or before, token)
    except UserError:
        if port:
            raise
        server = LoopbackServer(routes, 0, token)
    try:
        file.unlink(missing_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8") as out:
            json.dump({"port": server.port, "token": server.token}, out)
    except OSError as error:
        server.close()
        remedy = "Make the folder writable, or name another place with --out."
        raise UserError(f"{file}: cannot be written: {error}", remedy=remedy) from None
    return server


def _read(file: Path) -> tuple[str | None, int]:
    """Token and port; None and 0 if there are none, or if others could have read or written them."""
    try:
        if file.stat().st_mode & 0o077 or file.stat().st_uid != os.getuid():
            return None, 0
        found = json.loads(file.read_text("utf-8"))
        token, port = found["token"], found["port"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0
    good = isinstance(token, str) and token.isascii() and len(token) >= 22 and "/" not in token
    return (token, port) if good and type(port) is int and 0 < port < 65536 else (None, 0)
