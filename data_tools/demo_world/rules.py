"""The miniature world of `rlhf demo`: its language, its hidden rule and its annotators.

Animals live in places. Every animal eats one thing and has one habit (ANIMALS). A request asks about one animal: where
it lives, what it eats, or what it does. All text consists of the same few sentences (SENTENCES), so that every answer
can be judged; `data_tools.demo_world.text` writes it. The words of the world are in `world.yaml`.

The hidden rule (`judge`) gives an answer points for its request:

    +2    it states what was asked for, of the right animal, and truly
    +1    it names the animal with its looks, as the request did
    +0.5  it adds another fact about that animal
    +2    it is courteous (an opening or closing line; more of them earn nothing)
    -2    it is rude (once)
    -1    each statement that is false, or about another animal or place than asked for
    -1    each repeated sentence or statement
    -0.5  each off-topic sentence
    -1    each sentence that is not in SENTENCES
    -1    it breaks off
    -0.5  each sentence after the fourth

Annotators add noise to these points and rank by the result. Nothing else uses the rule, except the demo's evaluation.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.core.limits import read_yaml
from rlhf.data.schema import Candidate, Message, Prompt, Ranking

# ---- the language -------------------------------------------------------------------------------------------------

WORLD = read_yaml(Path(__file__).with_name("world.yaml"))
ANIMALS: dict[str, list[str]] = WORLD["animals"]
"""Animal -> what it eats, and its habit."""
LOOKS, PLACES = WORLD["looks"], WORLD["places"]
REQUESTS: dict[str, list[str]] = WORLD["requests"]
"""What a request asks for -> its wordings."""
SENTENCES: dict[str, list[str]] = WORLD["sentences"]
"""Kind of sentence -> its wordings."""
STATEMENTS = {"home": "place", "food": "food", "habit": "habit"}
"""Kind of statement about an animal -> the slot of what it states."""
FOODS, HABITS = zip(*ANIMALS.values())
SLOTS = {"look": LOOKS, "animal": ANIMALS, "place": PLACES, "food": FOODS, "habit": HABITS}


def _pattern(wording: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", wording)  # text and names of slots by turns
    slots = [f"(?P<{name}>{'|'.join(SLOTS[name])})" for name in parts[1::2]]
    return re.compile("".join(re.escape(text) + slot for text, slot in zip(parts[::2], [*slots, ""])))


_SENTENCES = [(kind, _pattern(wording)) for kind, wordings in SENTENCES.items() for wording in wordings]
_REQUESTS = [(asked, _pattern(wording)) for asked, wordings in REQUESTS.items() for wording in wordings]


@dataclass(frozen=True)
class Request:
    """What a prompt asks for (`asked`: home, food or habit), of which animal."""

    asked: str
    look: str
    animal: str
    place: str

    def fill(self, wording: str) -> str:
        """A wording about this animal, with its true food and habit."""
        food, habit = ANIMALS[self.animal]
        return wording.format(look=self.look, animal=self.animal, place=self.place, food=food, habit=habit)


def read_request(prompt: Prompt) -> Request:
    """What a prompt asks for.

    Raises:
        ValueError: The prompt is not a request of this world.
    """
    text = prompt.messages[-1].content
    for asked, pattern in _REQUESTS:
        if match := pattern.fullmatch(text):
            return Request(asked, **match.groupdict())
    raise ValueError(f"no request of the demo's world: {text!r}")


# ---- the hidden rule ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Findings of the hidden rule in an answer: flags, and counts of sentences."""

    answers: bool
    names: bool
    informs: bool
    courteous: bool
    rude: bool
    false: int
    repeated: int
    off_topic: int
    garbled: int
    unfinished: bool
    surplus: int

    @property
    def points(self) -> float:
        """The score, higher = better, at most `BEST`."""
        return sum(weight * getattr(self, name) for name, weight in POINTS.items())


POINTS = {
    "answers": 2.0, "names": 1.0, "informs": 0.5, "courteous": 2.0, "rude": -2.0, "false": -1.0, "repeated": -1.0,
    "off_topic": -0.5, "garbled": -1.0, "unfinished": -1.0, "surplus": -0.5,
}  # fmt: skip
BEST = sum(weight for weight in POINTS.values() if weight > 0)
ENOUGH_SENTENCES = 4


def judge(prompt: Prompt, answer: str) -> Verdict:
    """The hidden rule (see the module's text) applied to an answer.

    Raises:
        ValueError: The prompt is not a request of this world.
    """
    request = read_request(prompt)
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", answer.strip())]
    unfinished = not sentences or sentences[-1][-1:] not in tuple(".!?")
    found = [_read_sentence(sentence) for sentence in (sentences[:-1] if unfinished else sentences)]
    kinds = [kind for kind, _ in found]
    statements = [(kind, slots) for kind, slots in found if kind in STATEMENTS]
    true = [(kind, slots) for kind, slots in statements if _is_true(request, slots)]
    said = {
        (kind, slots[STATEMENTS[kind]]) if kind in STATEMENTS else text for (kind, slots), text in zip(found, sentences)
    }
    return Verdict(
        answers=any(kind == request.asked for kind, _ in true),
        names=any("animal" in slots for _, slots in true),
        informs=any(kind != request.asked for kind, _ in true),
        courteous="courteous" in kinds,
        rude="rude" in kinds,
        false=len(statements) - len(true),
        repeated=len(found) - len(said),
        off_topic=kinds.count("off_topic"),
        garbled=kinds.count("garbled"),
        unfinished=unfinished,
        surplus=max(0, len(sentences) - ENOUGH_SENTENCES),
    )


def points(prompt: list[dict[str, Any]], completion: str) -> float:
    """The hidden rule's score of a completion, as a reward: `--reward data_tools.demo_world.rules:points`.

    Args:
        prompt: Messages {role, content}; a request of this world.
        completion: The answer.

    Raises:
        ValueError: The prompt is not a request of this world.
    """
    return judge(Prompt(tuple(Message(turn["role"], turn["content"]) for turn in prompt)), completion).points


def _read_sentence(sentence: str) -> tuple[str, dict[str, str]]:
    for kind, pattern in _SENTENCES:
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    return "garbled", {}


def _is_true(request: Request, slots: dict[str, str]) -> bool:
    food, habit = ANIMALS[request.animal]
    truth = {"look": request.look, "animal": request.animal, "place": request.place, "food": food, "habit": habit}
    return all(truth[name] == word for name, word in slots.items())


# ---- annotators ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotator:
    """A person who ranks answers by the hidden rule plus noise."""

    name: str
    noise: float
    """Scale of the Gumbel noise on each answer's points: ranks then follow Plackett-Luce with points / noise."""


ANNOTATORS = tuple(Annotator(*one) for one in WORLD["annotators"].items())
TIE = 0.4
"""Answers whose noisy points differ by less than this get the same rank."""


def rank(annotator: Annotator, prompt: Prompt, candidates: Sequence[Candidate], rng: random.Random) -> Ranking:
    """The annotator's ranking of distinct candidates."""
    seen = [judge(prompt, c.text).points - annotator.noise * math.log(rng.expovariate(1)) for c in candidates]
    order = sorted(seen, reverse=True)
    # A gap of at least TIE to the answer above begins a new rank.
    steps = list(itertools.accumulate((a - b >= TIE for a, b in itertools.pairwise(order)), initial=0))
    ranks = tuple(steps[order.index(points)] + 1 for points in seen)
    return Ranking(*prompt.prompt_fields, tuple(candidates), ranks, annotator.name)


def agreement(rankings: Iterable[Ranking]) -> list[tuple[int, int]]:
    """Agreement of annotators who ranked the same candidates.

    Returns:
        For every two such rankings: the number of candidate pairs that both put in the same order, and the number of
        pairs that neither ties.
    """
    together: dict[tuple[Any, ...], list[Ranking]] = {}
    for ranking in rankings:
        together.setdefault((ranking.prompt_id, *(c.text for c in ranking.candidates)), []).append(ranking)
    found = []
    for several in together.values():
        for one, other in itertools.combinations(several, 2):
            pairs = itertools.combinations(range(len(one.ranks)), 2)
            signs = [(one.ranks[i] - one.ranks[j]) * (other.ranks[i] - other.ranks[j]) for i, j in pairs]
            found.append((sum(sign > 0 for sign in signs), sum(sign != 0 for sign in signs)))
    return found
