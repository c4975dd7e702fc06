"""The text of the demo's miniature world: prompts, people's demonstrations, and documents for a base model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from data_tools.demo_world.rules import (
    ANIMALS,
    LOOKS,
    PLACES,
    REQUESTS,
    SENTENCES,
    STATEMENTS,
    WORLD,
    Request,
    read_request,
)
from rlhf.data.schema import Demonstration, Message, Prompt

OPENINGS, CLOSINGS = SENTENCES["courteous"][:3], SENTENCES["courteous"][3:]
MOODS = ("courteous", "rude", "off_topic")

# ---- prompts ------------------------------------------------------------------------------------------------------


def prompts(counts: Mapping[str, int], rng: random.Random) -> list[Prompt]:
    """Prompts of each split, in the given numbers. No two ask the same about the same look, animal and place.

    Raises:
        ValueError: The world has fewer things to ask.
    """
    splits = [split for split, count in counts.items() for _ in range(count)]
    requests = rng.sample(list(itertools.product(STATEMENTS, LOOKS, ANIMALS, PLACES)), len(splits))
    found = []
    for split, (asked, look, animal, place) in zip(splits, requests):
        text = Request(asked, look, animal, place).fill(rng.choice(REQUESTS[asked]))
        found.append(Prompt((Message("user", text),), source="world", group=asked, split=split))
    return found


# ---- people -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemonstrationWriter:
    """A person who writes demonstrations. Each number is the probability of a habit in an answer."""

    name: str
    courteous: float
    """Opens with a courteous line; closes with one as often."""
    attentive: float
    """States what was asked for."""
    mistaken: float
    """Takes the look, the animal or the place for another."""
    repeats: float
    """Says a sentence again."""
    rambles: float
    """Adds an off-topic sentence; after each one, another."""
    rude: float


WRITERS = tuple(DemonstrationWriter(name, **habits) for name, habits in WORLD["writers"].items())


def write(writer: DemonstrationWriter, request: Request, rng: random.Random) -> str:
    """An answer as this person writes it."""
    kinds = [request.asked] if rng.random() < writer.attentive else []
    kinds += rng.sample([k for k in STATEMENTS if k != request.asked], rng.randint(0 if kinds else 1, 1))
    about = _confused(request, rng) if rng.random() < writer.mistaken else request
    body = _statements(about, kinds, rng)
    if rng.random() < writer.repeats:
        body.append(rng.choice(body))
    while rng.random() < writer.rambles and len(body) < 6:
        body.insert(rng.randint(1, len(body)), rng.choice(SENTENCES["off_topic"]))
    if rng.random() < writer.rude:
        body.insert(rng.choice((0, len(body))), rng.choice(SENTENCES["rude"]))
    opening = [rng.choice(OPENINGS)] if rng.random() < writer.courteous else []
    closing = [rng.choice(CLOSINGS)] if rng.random() < writer.courteous else []
    return " ".join([*opening, *body, *closing])


def demonstrate(prompt: Prompt, rng: random.Random) -> Demonstration:
    """A demonstration for a prompt of this world, by one of the writers."""
    writer = rng.choice(WRITERS)
    answer = write(writer, read_request(prompt), rng)
    return Demonstration(*prompt.prompt_fields, answer, writer.name)


def _confused(request: Request, rng: random.Random) -> Request:
    """The request with its look, animal or place replaced by a random one."""
    other, name = _some_request(rng), rng.choice(("look", "animal", "place"))
    return replace(request, **{name: getattr(other, name)})


# ---- documents ----------------------------------------------------------------------------------------------------


def documents(count: int, rng: random.Random) -> Iterator[str]:
    """Text for a base model: notes, letters, gossip. None of it is a request with an answer."""
    for _ in range(count):
        about = _some_request(rng)
        yield " ".join(rng.choice(_STYLES)(about, rng))


def _notes(about: Request, rng: random.Random) -> list[str]:
    kinds = rng.sample(list(STATEMENTS), rng.randint(2, 3))
    return ["Field notes.", *_statements(about, kinds, rng)]


def _diary(about: Request, rng: random.Random) -> list[str]:
    seen = about.fill("Today I saw the {look} {animal} in {place}.")
    kinds = rng.sample(list(STATEMENTS), rng.randint(1, 2))
    return [seen, *_statements(about, kinds, rng), rng.choice(SENTENCES["off_topic"])]


def _letter(about: Request, rng: random.Random) -> list[str]:
    return ["Dear friend.", *_wondering(about, rng), rng.choice(CLOSINGS)]


def _play(about: Request, rng: random.Random) -> list[str]:
    one, other = rng.sample(("Anna", "Boris", "Clara", "Diego"), 2)
    wonder, *answer = _wondering(about, rng)
    mood = [rng.choice(SENTENCES[rng.choice(MOODS)])] if rng.random() < 0.5 else []
    return [f"{one}: {wonder}\n{other}:", *mood, *answer]


def _wondering(about: Request, rng: random.Random) -> list[str]:
    """A question about an animal, then statements, the first of which answers it."""
    others = rng.sample([kind for kind in STATEMENTS if kind != about.asked], rng.randint(0, 2))
    return [about.fill(rng.choice(WORLD["wonder"][about.asked])), *_statements(about, [about.asked, *others], rng)]


def _gossip(about: Request, rng: random.Random) -> list[str]:
    asks = about.fill("They say much about the {look} {animal} in {place}.")
    moods = [rng.choice(SENTENCES[rng.choice(MOODS)]) for _ in range(rng.randint(1, 2))]
    return [asks, *moods, *_statements(about, rng.sample(list(STATEMENTS), rng.randint(1, 2)), rng)]


def _quiz(about: Request, rng: random.Random) -> list[str]:
    """Statements and whether they are true, so that the base model learns about right and wrong."""
    lines = [about.fill("A school quiz on the {look} {animal} in {place}.")]
    for kind in rng.choices(list(STATEMENTS), k=rng.randint(2, 4)):
        said = rng.choice((about, _confused(about, rng)))
        wording = rng.choice([w for w in SENTENCES[kind] if "{animal}" in w or said == about])
        claim = said.fill(wording)
        lines += [claim, "Right." if claim == about.fill(wording) else "Wrong."]
    return lines


_STYLES = (_notes, _diary, _gossip, _letter, _play, _play, _quiz)


def _some_request(rng: random.Random) -> Request:
    return Request(rng.choice(list(STATEMENTS)), rng.choice(LOOKS), rng.choice(list(ANIMALS)), rng.choice(PLACES))


def _statements(about: Request, kinds: Sequence[str], rng: random.Random) -> list[str]:
    """True statements; the first names the animal, later ones may say "it"."""
    said = []
    for index, kind in enumerate(kinds):
        wordings = [w for w in SENTENCES[kind] if index or "{animal}" in w]
        said.append(about.fill(rng.choice(wordings)))
    return said
