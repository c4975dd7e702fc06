"""Which answers of a teacher are unusable: cut off, empty, refusing, repeating. Reasons are counted by their words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from data_tools.annotate.candidates import normalised, too_similar
from rlhf.data.schema import BadRecord

REFUSAL = re.compile(
    r"""\s*(?:(?:oh,?\s+)?(?:i['’]?m|i\ am)?\s*(?:very\s+|really\s+|so\s+)?(?:sorry|afraid)[,.;:!]?\s*(?:but|that)?\s*
        |i\s+apologi[sz]e[,.;:!]?\s*(?:but)?\s*|unfortunately,?\s*
        |as\ an?\ (?:ai|artificial|large\ language)[^,.]*,?\s*)*
        (?:i\s*(?:can['’]?t|cannot|can\ not|won['’]?t|will\ not|am\ (?:unable|not\ able)|do\ not\ have\ the\ ability)
        |i['’]?m\ (?:unable|not\ able)
        |as\ an?\ (?:ai|artificial\ intelligence|large\ language)\ (?:language\ )?model)""",
    re.IGNORECASE | re.VERBOSE,
)
"""How chat models decline, at the start of an answer. "I'm sorry to hear that" is not one."""
FEWEST_CHARACTERS, SMALLEST_RATIO = 200, 0.12
"""A text that is this long and packs to less than this share of its bytes says the same again and again."""
SAME = 0.95


def fault(text: str, finish_reason: str, refusal: str, prompt: str, earlier: Sequence[str]) -> BadRecord | None:
    """Why an answer cannot be used; None if it can.

    Args:
        text: The answer.
        finish_reason: `stop`, `length`, or the server's own word.
        refusal: The server's field for a model that declines.
        prompt: The last user message.
        earlier: The answers to the same prompt that are used already.
    """
    if refusal or finish_reason == "content_filter" or REFUSAL.match(text):
        return BadRecord("the teacher refused to answer", remedy="Leave out the prompt, or ask another teacher.")
    if not text.strip():
        return BadRecord("the answer is empty", remedy="Ask again with another --seed, or another teacher.")
    if finish_reason == "length":
        return BadRecord("the answer is cut off at the length limit", remedy="Raise --max-new-tokens.")
    if normalised(prompt) == normalised(text) or (len(text.split()) > 5 and too_similar(text, prompt, SAME)):
        return BadRecord(
            "the answer repeats the prompt", remedy="Ask another teacher: this one may not be a chat model."
        )
    data = text.encode("utf-8", "replace")
    if len(data) >= FEWEST_CHARACTERS and len(zlib.compress(data)) < SMALLEST_RATIO * len(data):
        return BadRecord("the answer repeats itself", remedy="Raise --temperature, or ask another teacher.")
    if any(normalised(text) == normalised(other) for other in earlier):
        return BadRecord("the answer is the same as another one to the prompt", remedy="Raise --temperature.")
    return None
