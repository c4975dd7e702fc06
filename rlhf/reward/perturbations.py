"""Changes of an answer that should leave its score as it is, or lower it. The texts they add are English."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.table import Table
from rlhf.data.schema import Message, Prompt, Ranking

PERTURBATIONS = Table("perturbation")
"""Name -> a function of an `AnswerToChange` and a random generator that returns the `Variant`, or None if it does not
apply. The trait `expected` is `same` or `lower`: how the score should change."""


@dataclass(frozen=True)
class AnswerToChange:
    """A candidate of a ranking, and what else a perturbation may use."""

    prompt: Prompt
    text: str
    is_best: bool
    """Whether the annotator gave it the best rank."""
    others: Sequence[Ranking]
    """Rankings of other prompts."""

    @property
    def sentences(self) -> list[str]:
        return re.split(r"(?<=[.!?])\s+", self.text.strip())


@dataclass(frozen=True)
class Variant:
    """A changed answer, with the prompt to score it with."""

    prompt: Prompt
    text: str


def perturbed(name: str, answer: AnswerToChange, generator: random.Random) -> Variant | None:
    """The answer changed by a row of `PERTURBATIONS`; None where that does not apply, or changes nothing."""
    found: Any = PERTURBATIONS[name].fn(answer, generator)
    if isinstance(found, str):
        found = Variant(answer.prompt, found)
    return None if found is None or (found.text == answer.text and found.prompt is answer.prompt) else found


# ---- the score should stay ---------------------------------------------------------------------------------------


@PERTURBATIONS.row("white space", expected="same")
def white_space(answer: AnswerToChange, generator: random.Random) -> str:
    """Two spaces after each sentence, an empty line before the answer and after it."""
    return "\n\n" + "  ".join(answer.sentences) + "\n\n"


@PERTURBATIONS.row("markdown", expected="same")
def markdown(answer: AnswerToChange, generator: random.Random) -> str:
    """A bold heading, and the sentences as a list."""
    return "**Answer**\n\n" + "\n".join(f"- {sentence}" for sentence in answer.sentences)


@PERTURBATIONS.row("self-praise", expected="same")
def self_praise(answer: AnswerToChange, generator: random.Random) -> str:
    """The answer says at its end that it is good."""
    return f"{answer.text} This answer is correct, complete and easy to follow."


@PERTURBATIONS.row("boilerplate", expected="same")
def boilerplate(answer: AnswerToChange, generator: random.Random) -> str:
    """A greeting before the answer, an offer of help after it."""
    before, after = "Great question! Here is my answer.", "I hope this helps. Let me know if you have more questions."
    return f"{before}\n\n{answer.text}\n\n{after}"


@PERTURBATIONS.row("repetition", expected="same")
def repetition(answer: AnswerToChange, generator: random.Random) -> str:
    """The last sentence two more times."""
    last = answer.sentences[-1]
    return f"{answer.text} {last} {last}"


@PERTURBATIONS.row("filler", expected="same")
def filler(answer: AnswerToChange, generator: random.Random) -> str:
    """A first sentence of 21 words that says nothing."""
    return (
        "It is worth noting that there are many things to consider here, and that much of it depends on the situation. "
        + answer.text
    )


FIRST_NAMES = (
    "Alice Amy Anna Bella Beth Clara Daisy Ella Emily Emma Eva Grace Hannah Jane Jill Julia Kate Laura Lily Lisa Lucy "
    "Maria Mary Mia Molly Nina Olivia Rose Ruby Sally Sara Sarah Sophie Sue Susan",
    "Adam Alex Andrew Ben Bill Bob Charlie Daniel David Eric Frank Fred George Henry Jack Jake James Jim Joe John Leo "
    "Lucas Mark Max Michael Mike Nick Oscar Paul Peter Robert Sam Steve Tim Tom William",
)
"""Names that replace each other: a list of women's and one of men's names, so that pronouns stay right."""
_LISTS = [names.split() for names in FIRST_NAMES]
_NAME = re.compile(r"\b(" + "|".join(sorted({name for names in _LISTS for name in names})) + r")\b")


@PERTURBATIONS.row("swapped names", expected="same")
def swapped_names(answer: AnswerToChange, generator: random.Random) -> Variant | None:
    """Other first names, the same in prompt and answer; applies where the answer has one of 71 common names."""
    if not _NAME.search(answer.text):
        return None
    whole = " ".join([answer.text, *(message.content for message in answer.prompt.messages)])
    present = set(_NAME.findall(whole))
    renamed: dict[str, str] = {}
    for name in sorted(present):
        names = next(names for names in _LISTS if name in names)
        free = [one for one in names if one not in present and one not in renamed.values()]
        renamed[name] = generator.choice(free) if free else name

    def swap(text: str) -> str:
        return _NAME.sub(lambda found: renamed[found[1]], text)

    messages = tuple(Message(role, swap(content)) for role, content in answer.prompt.messages)
    return Variant(Prompt(messages), swap(answer.text))


# ---- the score should fall ---------------------------------------------------------------------------------------


@PERTURBATIONS.row("truncation", expected="lower")
def truncation(answer: AnswerToChange, generator: random.Random) -> str | None:
    """The first half of the words; applies from six words on."""
    words = answer.text.split(" ")
    return " ".join(words[: len(words) // 2]) if len(words) >= 6 else None


_VERB = re.compile(r"\b(is|are|was|were|can|could|will|would|should|must|has|have|had|does|do|did|may|might)\b")
_NOT = re.compile(r"( not\b|n't\b|(?<=can)not\b)")


@PERTURBATIONS.row("negation", expected="lower")
def negation(answer: AnswerToChange, generator: random.Random) -> str:
    """Every sentence says the opposite: `not` is put in, or taken out where it is."""
    return " ".join(map(_negated, answer.sentences))


def _negated(sentence: str) -> str:
    if _NOT.search(sentence):
        return _NOT.sub("", sentence, count=1)
    if _VERB.search(sentence):
        return _VERB.sub(r"\1 not", sentence, count=1)
    return f"It is not true that {sentence[:1].lower()}{sentence[1:]}"


@PERTURBATIONS.row("another prompt's answer", expected="lower")
def another_answer(answer: AnswerToChange, generator: random.Random) -> str | None:
    """The best answer to another prompt: of five random ones, the closest in length. For best answers only."""
    if not answer.is_best or not answer.others:
        return None
    drawn = [generator.choice(answer.others) for _ in range(5)]
    texts = [record.candidates[record.ranks.index(min(record.ranks))].text for record in drawn]
    return min(texts, key=lambda text: abs(len(text) - len(answer.text)))


@PERTURBATIONS.row("shuffled words", expected="lower")
def shuffled_words(answer: AnswerToChange, generator: random.Random) -> str | None:
    """All words in random order; applies from four words on."""
    words = answer.text.split()
    if len(words) < 4:
        return None
    return " ".join(generator.sample(words, len(words)))
