"""The datasets of a demo: prompts, people's demonstrations, annotators' rankings of a policy's answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.demo_world.rules import ANNOTATORS, rank
from data_tools.demo_world.text import demonstrate, prompts
from rlhf.core.console import say
from rlhf.data.schema import Candidate, Prompt, Ranking
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter

K = 4
"""Candidates to rank for each prompt."""
BY_PEOPLE = 0.3
"""Fraction of prompts where a person wrote one of the candidates."""


@dataclass(frozen=True)
class Size:
    """How large a demo is."""

    documents: int = 20_000
    base_steps: int = 1500
    demonstrated: int = 1000
    """Training prompts that a person answers."""
    ranked: int = 4000
    """Other training prompts whose answers are ranked. PPO uses both."""
    held_out: int = 100
    """Prompts of the split eval, for the stages' own evaluation."""
    tested: int = 400
    """Prompts of the split test, which the stages never read."""
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Stage -> further overrides of its config."""


@dataclass(frozen=True)
class WorldDatasets:
    """The datasets under one folder, made from one seed."""

    folder: Path
    seed: int
    size: Size

    def random(self, purpose: str) -> random.Random:
        """A random stream for each purpose, so that an interrupted demo continues with the same numbers."""
        return random.Random(f"{self.seed} {purpose}")

    def prompts(self, split: str) -> list[Prompt]:
        """The prompts of a split, from disk."""
        return list(open_dataset(self.folder / "prompts", "prompt").records(split))

    def prompts_to_rank(self) -> list[Prompt]:
        """The prompts whose answers are ranked, of all splits."""
        return self.prompts("train")[self.size.demonstrated :] + self.prompts("eval") + self.prompts("test")

    def write_prompts(self) -> None:
        """Write all prompts, of the splits train, eval and test."""
        size = self.size
        counts = {"train": size.demonstrated + size.ranked, "eval": size.held_out, "test": size.tested}
        self._write("prompts", "prompt", prompts(counts, self.random("prompts")))

    def write_demonstrations(self) -> None:
        """Write people's answers to the first training prompts and to the eval prompts."""
        rng = self.random("demonstrations")
        asked = self.prompts("train")[: self.size.demonstrated] + self.prompts("eval")
        self._write("demonstrations", "demonstration", [demonstrate(prompt, rng) for prompt in asked])

    def write_rankings(self, answers: Iterable[tuple[Prompt, Sequence[str]]]) -> None:
        """Write annotators' rankings of the SFT policy's answers, some with a person's answer among them.

        One annotator ranks each training prompt and two rank each held-out prompt, which measures their agreement.

        Args:
            answers: Prompts with the texts that the policy sampled for them.
        """
        rng = self.random("rankings")
        rankings: list[Ranking] = []
        for prompt, texts in answers:
            candidates = _candidates(prompt, texts, rng)
            if len(candidates) > 1:
                annotators = rng.sample(ANNOTATORS, 1 if prompt.split == "train" else 2)
                rankings += [rank(annotator, prompt, candidates, rng) for annotator in annotators]
        self._write("rankings", "ranking", rankings)

    def _write(self, name: str, kind: str, records: Sequence[Any]) -> None:
        origin = {"made_by": "rlhf demo", "seed": self.seed}
        with DatasetWriter(self.folder / name, kind, origin, overwrite=True) as writer:
            for record in records:
                writer.write(record)
        say(f"{len(records):,} {name}, the first: {records[0].messages[-1].content!r}")


def _candidates(prompt: Prompt, texts: Sequence[str], rng: random.Random) -> list[Candidate]:
    """Up to K distinct answers of the policy; in a fraction of prompts a person's answer replaces the last."""
    distinct = [text for text in dict.fromkeys(texts) if text.strip()][:K]
    found = [Candidate(text, "sft", "model") for text in distinct]
    if rng.random() < BY_PEOPLE:
        written = demonstrate(prompt, rng)
        if written.answer not in distinct:
            found = [*found[: K - 1], Candidate(written.answer, written.author, "person")]
    rng.shuffle(found)
    return found
