"""What changes that should leave a score as it is do to the scores of the policy's own completions.

A reward model whose scores these changes move can be gamed by them. `rlhf evaluate --perturb` measures that on
rankings; here it is measured on what the policy writes now, which drifts away from the rankings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.core.lazy import torch
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.schema import Message, Prompt
from rlhf.guard.config import PerturbConfig
from rlhf.guard.rules import PERTURBED
from rlhf.reward.perturbations import AnswerToChange, Variant, perturbed
from rlhf.reward.scoring import batches_by_length, shared_scores
from rlhf.reward.sources import RewardInputs, Source


@dataclass(frozen=True)
class PromptedAnswer:
    """A prompt with an answer, as reward sources read it."""

    messages: list[dict[str, str]]
    answer: str
    ids: list[int]
    """Token ids of prompt and answer."""


class Perturber:
    """Measures the effects of perturbations on completions, every few updates.

    Args:
        config: `guard.perturb`; with None nothing is measured.
        source: The reward source that trains the policy.
        chat: The policy's tokenizer.
        limit: Tokens of the longest text; a changed answer that is longer is not measured.
        batch_tokens: Most tokens, padding included, that are scored together.
    """

    def __init__(
        self, config: PerturbConfig | None, source: Source, chat: ChatTokenizer, limit: int, batch_tokens: int
    ) -> None:
        self.config, self.source, self.chat = config, source, chat
        self.limit, self.batch_tokens = limit, batch_tokens

    def __call__(
        self,
        index: int,
        prompts: Sequence[Sequence[int]],
        messages: Sequence[list[dict[str, str]]],
        completions: Sequence[Any],
    ) -> dict[str, float]:
        """The metrics of an update, counted from 0: the effect of each perturbation in units of the score, and their
        mean. Empty between measurements, and where no completion can be changed. Every rank calls it and gets the same.

        Unchanged answers are scored as text too, like the changed ones, so that a missing end of turn has no effect.

        Args:
            prompts: Token ids of the prompts.
            messages: The prompts as messages.
            completions: With `ids`, their token ids.

        Raises:
            UserError: The reward source fails.
        """
        if self.config is None or index % self.config.every:
            return {}
        texts: list[PromptedAnswer] = []
        pairs: dict[str, list[tuple[int, int]]] = {name: [] for name in self.config.names}
        answers = [(number, self.chat.decode(one.ids)) for number, one in enumerate(completions)]
        for number, answer in [one for one in answers if one[1].strip()][: self.config.answers]:
            prompt = Prompt(tuple(Message(**message) for message in messages[number]))  # type: ignore[arg-type]
            before = self._text(Variant(prompt, answer), prompt, prompts[number])
            if before is None:
                continue
            place = len(texts)
            texts.append(before)
            for name in self.config.names:
                whole = AnswerToChange(prompt, answer, is_best=True, others=())
                variant = perturbed(name, whole, random.Random(f"{name} {index} {number}"))
                after = None if variant is None else self._text(variant, prompt, prompts[number])
                if after is not None:
                    pairs[name].append((place, len(texts)))
                    texts.append(after)
        scores = self._scores(texts)
        effects = {name: effect(scores, found) for name, found in pairs.items() if found}
        if not effects:
            return {}
        parts = {f"{PERTURBED}/{metric_name(name)}": value for name, value in effects.items()}
        return {PERTURBED: fmean(effects.values())} | parts

    def _text(self, variant: Variant, prompt: Prompt, prompt_ids: Sequence[int]) -> PromptedAnswer | None:
        """`prompt_ids` are the tokens of `prompt`, cut where they are too many. None for a text that is too long or
        that the tokenizer refuses."""
        try:
            start = prompt_ids if variant.prompt is prompt else self.chat.prompt(variant.prompt.messages)
            ids = [*start, *self.chat.response(variant.text)]
        except RefusedText:
            return None
        return PromptedAnswer(variant.prompt.chat, variant.text, ids) if len(ids) <= self.limit else None

    def _scores(self, texts: Sequence[PromptedAnswer]) -> list[float]:
        """One score per text. The ranks share the batches; a rank that has fewer scores a filler."""

        def score(batch: Sequence[int]) -> tuple[Sequence[int], torch.Tensor]:
            part = [texts[i] for i in batch] or [texts[0]]
            ids, mask = self.chat.pad([one.ids for one in part], distributed.device())
            found = self.source(RewardInputs([one.messages for one in part], [one.answer for one in part], ids, mask))
            if not torch.isfinite(found).all():
                worst = part[int((~torch.isfinite(found)).nonzero()[0])].answer
                raise UserError(
                    "guard.perturb: the score of a changed completion is not a finite number",
                    f"The completion: {worst[:80]!r}.", "Correct the reward, or leave guard.perturb out.",
                )  # fmt: skip
            return batch, found

        return shared_scores(list(batches_by_length([len(text.ids) for text in texts], self.batch_tokens)), score)


def effect(scores: Sequence[float], pairs: Sequence[tuple[int, int]]) -> float:
    """The mean change of the score over (unchanged, changed) pairs of texts, given by their places in `scores`."""
    return fmean(scores[after] - scores[before] for before, after in pairs)


def metric_name(perturbation: str) -> str:
    """A perturbation's name in metrics: `white_space` for `white space`, `self_praise` for `self-praise`."""
    return perturbation.replace(" ", "_").replace("-", "_")
