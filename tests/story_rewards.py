"""The programmatic reward of the story runs: the share of sentences that name an animal."""

from __future__ import annotations

import re

NAMES = """
animal animals ant ants bear bears bee bees bird birds bug bugs bunnies bunny butterfly cat cats
chicken cow cows crab dog dogs dolphin dragon duck ducks elephant fish fox foxes frog frogs goat hen
horse horses kitten kitty lamb lion lions lizard mice monkey monkeys mouse owl panda parrot pig pigs
pony puppies puppy rabbit rabbits shark sheep snail snake spider squirrel squirrels tiger turtle
turtles whale wolf worm zebra
"""
ANIMALS = frozenset(NAMES.split())


def animal_share(messages: list[dict[str, str]], answer: str) -> float:
    """Sentences of the answer with an animal's name, as a share of all its sentences."""
    sentences = [s for s in re.split(r"[.!?]+", answer.lower()) if s.strip()]
    named = sum(not ANIMALS.isdisjoint(re.findall(r"[a-z]+", sentence)) for sentence in sentences)
    return named / max(1, len(sentences))
