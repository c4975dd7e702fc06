"""The commands of the pages on preparing data and on tasks work when they are typed, and print what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_doc_examples import DOCS, blocks, typed


@pytest.mark.parametrize("page", ["prepare.md", "tasks.md", "label-studio.md"])
def test_the_commands_of_the_page_print_what_stands_there(page: str, tmp_path: Path) -> None:
    printed = lines(typed(tmp_path, "\n".join(blocks(DOCS / page, "bash"))))
    shown = lines("".join(blocks(DOCS / page, "text")))
    assert shown and [line for line in shown if line not in printed] == []


def lines(text: str) -> list[str]:
    """The lines, without the figures of fingerprints, which another version of pyarrow changes."""
    return [re.sub(r"\b[0-9a-f]{12}\b", "fingerprint", line).rstrip() for line in text.splitlines()]
