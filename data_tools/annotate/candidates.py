"""Comparing candidates: whether two are too similar to rank, and how far reward models disagree on them; which
answers of a teacher are unusable. Reasons are counted by their words."""

from __future__ import annotations

import difflib
import math
import re
import statistics
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import combinations

from rlhf.data.schema import BadRecord


def normalised(text: str) -> str:
    """The text without differences in letter case, white space and compatibility forms (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def too_similar(one: str, other: str, threshold: float) -> bool:
    """Whether two answers are too similar to be worth ranking against each other.

    They are if they are equal after `normalised`, or if their similarity as sequences of words reaches the threshold.
    The similarity is 2 M / T (Ratcliff and Obershelp, `difflib`): M words in matching blocks, T words in both answers
    together. Words are runs of letters, digits and underscores; answers without any (emoji) are similar only if equal.

    Args:
        threshold: From 0 (any shared word will do) to 1 (the same words in the same order).
    """
    one, other = normalised(one), normalised(other)
    if one == other:
        return True
    words, others = re.findall(r"\w+", one), re.findall(r"\w+", other)
    if not words or not others:
        return False
    match = difflib.SequenceMatcher(None, words, others, autojunk=False)
    return match.quick_ratio() >= threshold and match.ratio() >= threshold


def disagreement(scores: Sequence[Sequence[float]]) -> float:
    """How far reward models disagree about the answers to one prompt, from 0 to 0.25.

    Each model gives each pair of answers i, j the probability sigmoid(s_i - s_j) that i is the better one (Bradley
    and Terry 1952). The disagreement is the variance of that probability over the models, averaged over the pairs;
    the committee of Christiano et al. 2017 (arXiv:1706.03741, section 2.2.4) picks by the same variance.

    Args:
        scores: [model][answer], raw scores on the scale that the model was trained on; two models or more.
    """
    pairs = list(combinations(range(len(scores[0])), 2))
    return statistics.fmean(statistics.pvariance([_sigmoid(s[i] - s[j]) for s in scores]) for i, j in pairs)


def _sigmoid(x: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


# ---- answers of a teacher --------------------------------------------------------------------------------------------

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
