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
            UserError: It does not compile, or it is not clear which group is the answer.
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
        found = self._match(text)
        return None if found is None else found[self._group(found)].strip()

    def sentence(self, text: str, answer: str | None = None) -> str | None:
        """The sentence or line that holds the answer, without the reasoning before it; None without a match.

        Args:
            text: Reasoning and answer.
            answer: Written in place of the answer that is there.

        Raises:
            UserError: See `__call__`.
        """
        found = self._match(text)
        if found is None:
            return None
        start, end = found.span(self._group(found))
        ends = [match.end() for match in re.finditer(r"\n|[.!?]\s", text[: found.start()])]
        begin = ends[-1] if ends else 0
        stop = text.find("\n", end)
        stop = len(text) if stop < 0 else stop
        return (text[begin:start] + (text[start:end] if answer is None else answer) + text[end:stop]).strip()

    def parts(self, text: str) -> tuple[str, str] | None:
        """The reasoning before the sentence that holds the answer, which may be empty, and that sentence.

        Raises:
            UserError: See `__call__`.
        """
        sentence = self.sentence(text)
        return None if sentence is None else (text[: text.rindex(sentence)].strip(), sentence)

    def _group(self, found: re.Match[str]) -> str | int:
        return "answer" if "answer" in found.re.groupindex else min(1, found.re.groups)

    def _match(self, text: str) -> re.Match[str] | None:
        """The match that counts, among those whose answer is not empty."""
        chosen = None
        try:
            with time_limit(SECONDS):
                for match in re.compile(self.pattern).finditer(text):
                    if (match[self._group(match)] or "").strip():
                        chosen = match
                        if self.take == "first":
                            break
        except TimeIsUp:
            raise UserError(
                f"pattern {self.pattern!r}: takes longer than {SECONDS:g} s for a text of {len(text):,} characters",
                "Nested repetitions such as (a+)+ take exponential time.",
                "Write it without them.",
            ) from None
        return chosen


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
