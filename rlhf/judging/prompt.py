"""The text that a judge is sent, and the verdict in its reply. A verdict is read strictly, or counted as unreadable."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.core.errors import UserError

Kind = Literal["pairwise", "rating"]
PLACES: dict[str, tuple[str, ...]] = {"pairwise": ("prompt", "answer_a", "answer_b"), "rating": ("prompt", "answer")}
"""What each kind of prompt must contain once, in braces."""
TO_BE_READABLE = "Raise max_tokens, or change the prompt, so that every reply holds one verdict: see docs/judges.md."
LOWEST, HIGHEST = 1, 10
"""The scale of ratings."""
_VERSION = re.compile(r"# version: ([\w.-]+)")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class JudgePrompt:
    """A template with its version."""

    kind: Kind
    version: str
    text: str
    fingerprint: str
    """The start of the SHA-256 of the file's content."""

    def render(self, **values: str) -> str:
        """The text with the values in place. Braces in the values stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.text)


def read_prompt(kind: Kind, path: str = "") -> JudgePrompt:
    """The judge's prompt of a file, or ours.

    Raises:
        UserError: There is no such file, it names no version in its first line, or a place is missing.
    """
    file = Path(path) if path else Path(__file__).parent / "prompts" / f"{kind}.txt"
    try:
        content = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge's prompt {file}: cannot be read: {error}") from None
    first, _, text = content.partition("\n")
    version = _VERSION.fullmatch(first.strip())
    if version is None:
        raise UserError(
            f"judge's prompt {file}: the first line is not `# version: NAME`",
            "Results are recorded with the version of the prompt.",
            "Add that line, and change the name whenever you change the text.",
        )
    if missing := [name for name in PLACES[kind] if text.count(f"{{{name}}}") != 1]:
        places = ", ".join(f"{{{name}}}" for name in missing)
        raise UserError(f"judge's prompt {file}: a {kind} prompt needs each of these once: {places}")
    return JudgePrompt(kind, version[1], text, hashlib.sha256(content.encode()).hexdigest()[:16])


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """A prompt's messages as text: `role: content`, separated by empty lines."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def read_verdict(reply: str) -> Literal["A", "B", "C"] | None:
    """The verdict of a reply to a pairwise prompt: the only one in it, repeated or not. C is a tie.

    Returns:
        None if there is no verdict, or several that differ.
    """
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def read_rating(reply: str) -> float | None:
    """The rating in a reply, from LOWEST to HIGHEST; None if there is none on that scale, or several that differ."""
    found = {float(text) for text in _RATING.findall(reply)}
    rating = found.pop() if len(found) == 1 else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None
