"""Self-contained HTML pages: no script, font or image from another place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from rlhf.core.console import printable
from rlhf.core.errors import blame

STYLE = Path(__file__).with_name("page.css")
LONGEST = 3000
"""Characters of a text that are shown."""


def render_page(template: Path, clean: Callable[[str], str] | None = None, **values: Any) -> str:
    """A page from a Jinja template. All texts are escaped, and control characters replaced.

    Args:
        template: The file, which may import others of its folder. `style` is the common CSS; the filter `code` shows
            words in backticks as code.
        clean: Applied to every text before it is escaped.
        values: What the template uses.
    """
    style = markupsafe.Markup(STYLE.read_text("utf-8"))
    return printable(_environment(template.parent, clean).get_template(template.name).render(style=style, **values))


@lru_cache(maxsize=16)
def _environment(folder: Path, clean: Callable[[str], str] | None) -> jinja2.Environment:
    """Keeps the templates that it compiled, for the next page."""

    def finalize(value: Any) -> Any:
        return clean(value) if clean is not None and type(value) is str else value

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(folder), finalize=finalize,
    )  # fmt: skip
    environment.filters["code"] = _code
    return environment


def drawings(plots: Mapping[str, str]) -> dict[str, markupsafe.Markup]:
    """Plots of `rlhf.core.plot` as values that a template shows unescaped, without the empty ones."""
    return {name: markupsafe.Markup(svg) for name, svg in plots.items() if svg}


def cut(text: str) -> str:
    """A text as a page shows it: shortened if it is very long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"


def write_page(text: str, path: Path, option: str) -> None:
    """Write a page, and its folder if it is not there.

    Raises:
        UserError: The file cannot be written.
    """
    with blame(f"{option} {path}: cannot be written", remedy="Name another file."):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def _code(text: str) -> markupsafe.Markup:
    """The text escaped, with words in backticks as code."""
    parts = [str(markupsafe.escape(part)) for part in text.split("`")]
    return markupsafe.Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))
