"""The pages of the documentation, the code on them, and what commands print that are typed as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """A page's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def named(page: Path, language: str) -> dict[str, str]:
    """The blocks whose first line is a comment with a file's name -> text."""
    found = [re.match(r"# (\S+)\n", block) for block in blocks(page, language)]
    return {match[1]: match.string for match in found if match}


def typed(folder: Path, script: str) -> str:
    """What commands print that are typed one after the other in a folder with the project's configs."""
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    shell = f'rlhf() {{ "{sys.executable}" -m stages.cli "$@"; }}\n{script}'
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-e", "-c", shell], cwd=folder, env=environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
