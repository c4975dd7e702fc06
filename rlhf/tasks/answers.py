"""The answer in a text: which part of it counts, and which answers are the same."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from rlhf.core.errors import UserError
from rlhf.core.time_limit import TimeIsUp, time_limit

Normalise = Literal["none", "text", "squad", "number"]
Take = Literal["first", "last"]
PATTERNS = {
    "gsm8k": r"#### *([^\n]+)",
    "the-answer-is": r"(?i:answer is):? *([^\n]+?)(?=[.!](?:\s|$)|\n|$)",
    "number": r"[-+]?\$?\d[\d,]*(?:\.\d+)?",
    "letter": r"\(?\b([A-Z])\b\)?",
    "boxed": r"\\boxed\{([^{}]*)\}",
    "last-line": r"([^\n]*\S)\s*$",
}
"""Names of patterns for answers; any other value is a regular expression itself."""
LONGEST_NUMBER = 1000
"""Digits; a number with more is compared as text."""
SECONDS = 5.0
"""Longest time that a pattern may take for one text."""


@dataclass(frozen=True)
class AnswerPattern:
    """Which part of a text is the answer: group `answer`, else the first group, else the whole match."""

    pattern: str
    """A regular expression of Python's `re`."""
    take: Take = "last"
    """Which match counts, if there are several."""

    def __post_init__(self) -> None:
        """Check the pattern.

        Raises:
            UserError: It does not compile, or matches the empty text.
        """
        try:
            found = re.compile(self.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"pattern {self.pattern!r}: is not a regular expression: {error}",
                remedy=f"Correct it, or name one of {', '.join(PATTERNS)}.",
            ) from None
        if found.groups > 1 and "answer" not in found.groupindex:
            raise UserError(
                f"pattern {self.pattern!r}: has {found.groups} groups, so it is not clear which one is the answer",
                remedy="Call one of them (?P<answer>...), or write the others as (?:...).",
            )

    def __call__(self, text: str) -> str | None:
        """The answer, without white space around it; None where the pattern does not match.

        Raises:
            UserError: The pattern takes longer than `SECONDS` for this text.
        """
        matches = re.compile(self.pattern).finditer(text)
        try:
            with time_limit(SECONDS):
                found = next(matches, None)
                for later in matches if self.take == "last" else ():
                    found = later
        except TimeIsUp:
            raise UserError(
                f"pattern {self.pattern!r}: takes longer than {SECONDS:g} s for a text of {len(text):,} characters",
                "Nested repetitions such as (a+)+ take exponential time.",
                "Write it without them.",
            ) from None
        if found is None:
            return None
        groups = found.re.groups
        part = found["answer"] if "answer" in found.re.groupindex else found[1] if groups else found[0]
        return (part or "").strip() or None


def answer_pattern(given: str | None, take: Take = "last") -> AnswerPattern | None:
    """A pattern by its name in `PATTERNS` or as a regular expression; None for none.

    Raises:
        UserError: See `AnswerPattern`.
    """
    return None if not given else AnswerPattern(PATTERNS.get(given, given), take)


def normalised(text: str, how: Normalise = "text") -> str:
    """A form in which two answers are equal if they count as the same.

    `none` keeps the text; `text` ignores case, the amount of white space, and full stops, commas, quotes and the like
    around the answer; `squad` also ignores all punctuation and English articles (Rajpurkar et al. 2016,
    `normalize_answer`); `number` compares numbers by value ($1,000.0 is 1000), and other texts as `text` does.
    """
    if how == "none":
        return text
    if how == "squad":
        kept = "".join(c for c in text.casefold() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())
    plain = " ".join(text.casefold().split())
    if how == "number":
        digits = plain.strip(" .").replace(",", "").replace("$", "").removesuffix("%").strip()
        try:
            value = Decimal(digits)
        except InvalidOperation:
            value = Decimal("NaN")
        if value.is_finite() and abs(value.adjusted()) < LONGEST_NUMBER:
            exact = format(value, "f")
            exact = exact.rstrip("0").rstrip(".") if "." in exact else exact
            return "0" if exact in ("-0", "") else exact
    return plain.lstrip(" \"'`*([").rstrip(" .,;:!\"'`*)]") or plain
