"""The ranking page: one HTML file with its style and script, for the server or to be sent to an annotator."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from data_tools.ranking_page.votes import LONGEST_COMMENT, LONGEST_NAME, RankingItem
from rlhf.core import page
from rlhf.core.errors import UserError

FOLDER = Path(__file__).parent
SCRIPTS = ("ranking.js", "stores.js", "texts.js", "board.js", "main.js")
"""In the order in which they are joined; each uses only what comes before it."""


@dataclass(frozen=True)
class Settings:
    """What the page is made for."""

    fingerprint: str
    """Of the dataset of candidates."""
    mode: str
    """`rank` or `best-worst`."""
    seed: int
    total: int
    """Number of prompts."""
    annotator: str = ""
    """The name that is filled in; an annotator may change it."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"longestName": LONGEST_NAME, "longestComment": LONGEST_COMMENT}


def style() -> str:
    """The page's CSS."""
    return page.STYLE.read_text("utf-8") + (FOLDER / "page.css").read_text("utf-8")


def script() -> str:
    """The page's JavaScript."""
    parts = "\n".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(online: bool) -> str:
    """The page's Content-Security-Policy: this script, this style, and no network but the page's own server."""
    connect = "connect-src 'self'; frame-ancestors 'none'" if online else "connect-src 'none'"
    sources = f"script-src {_hash(script())}; style-src {_hash(style())}; img-src data:"
    return f"default-src 'none'; {sources}; {connect}; base-uri 'none'; form-action 'none'"


def render(settings: Settings, items: Mapping[str, RankingItem] | None = None) -> str:
    """The page's HTML.

    Args:
        settings: What it is made for.
        items: For a file that works without a server, the items that it holds.
    """
    data: dict[str, Any] = {"settings": settings.as_dict(), "items": None}
    if items is not None:
        data["items"] = [item.shown() for item in items.values()]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((FOLDER / "page.html.jinja").read_text("utf-8"))
    return template.render(
        policy="" if items is None else policy(online=False), style=markupsafe.Markup(style()),
        script=markupsafe.Markup(script()), data=markupsafe.Markup(_data(data)),
    )  # fmt: skip


def _data(value: Any) -> str:
    """JSON in ASCII that cannot end the element it is in."""
    text = json.dumps(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def share(path: Path, settings: Settings, items: Mapping[str, RankingItem]) -> None:
    """Write the file that is sent to an annotator.

    Raises:
        UserError: It cannot be written, or the name does not end in .html.
    """
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"--share {path}: the page is written as HTML", remedy="Name a file ending in .html.")
    page.write_page(render(settings, items), path, "--share")
