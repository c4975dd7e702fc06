"""Rankings with the scores of a reward model or another reward source, and their pairs as arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.core.console import track
from rlhf.core.table import Pick
from rlhf.data.encode_records import EncodingCounts, fits
from rlhf.data.schema import Prompt, Ranking
from rlhf.inference.reward_model import RewardModel, open_ensemble, open_reward_model
from rlhf.inference.scorer import read_source
from rlhf.judging.config import RewardJudgeConfig
from rlhf.judging.source import rating_source
from rlhf.reward.functions import call_reward_function, import_function
from rlhf.reward.metrics import Pairs
from rlhf.reward.metrics import pairs_of as ranked_pairs
from rlhf.reward.sources import weighted_terms

FUNCTION_SECONDS = 300.0
"""How long one call of a reward function may take."""


@dataclass(frozen=True)
class ScoredRecord:
    """A ranking and a score for each of its candidates, on the scale of the training loss; higher is better.

    A score is None where the candidate does not fit in the model's tokens. At least two are not.
    """

    record: Ranking
    scores: tuple[float | None, ...]

    @property
    def complete(self) -> bool:
        """Whether every candidate has a score."""
        return None not in self.scores

    @property
    def known(self) -> list[tuple[int, float]]:
        """(rank, score) of each candidate with a score, in order."""
        return [(rank, score) for rank, score in zip(self.record.ranks, self.scores) if score is not None]


class AnswerScorer:
    """What is evaluated: anything that gives answers scores.

    Args:
        name: Its name in messages.
        answers: (prompts, answers), one prompt for each answer -> their scores; None where one cannot be scored.
    """

    def __init__(self, name: str, answers: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]]) -> None:
        self.name, self.answers = name, answers

    def candidates(self, records: Sequence[Ranking]) -> list[ScoredRecord]:
        """The records with the score of each candidate, whether any has one or not."""
        prompts = [record for record in records for _ in record.candidates]
        found = iter(self.answers(prompts, [one.text for record in records for one in record.candidates]))
        return [ScoredRecord(record, tuple(next(found) for _ in record.candidates)) for record in records]

    def rankings(self, records: Sequence[Ranking], counts: EncodingCounts) -> list[ScoredRecord]:
        """The records of which at least two candidates have a score; `counts` counts the others by reason."""
        kept = [one for one in self.candidates(records) if len(one.known) > 1]
        counts.kept = len(kept)
        if len(kept) < len(records):
            counts.skipped["rankings with fewer than two candidates that fit"] += len(records) - len(kept)
        return kept


class ModelScorer(AnswerScorer):
    """A reward model, by its raw scores: before the mean and standard deviation that PPO's scores are divided by."""

    def __init__(self, name: str, model: RewardModel) -> None:
        super().__init__(name, self._raw)
        self._model = model

    def _raw(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        mean, std = float(self._model.scalar.mean), float(self._model.scalar.std)
        return [None if score is None else score * std + mean for score in self._model.score_answers(prompts, answers)]

    def rankings(self, records: Sequence[Ranking], counts: EncodingCounts) -> list[ScoredRecord]:
        rows = self._model.encode(records, counts)
        kept = [(record, row) for record, row in zip(records, rows) if row is not None]
        scored = self._model.score([row for _, row in kept])
        counts.kept = len(kept)
        return [self._placed(record, one.scores) for (record, _), one in zip(kept, scored)]

    def _placed(self, record: Ranking, scores: Sequence[float]) -> ScoredRecord:
        """Scores at the places of their candidates: `encode_ranking` leaves out those that do not fit."""
        if len(scores) == len(record.candidates):
            return ScoredRecord(record, tuple(scores))
        chat, rest = self._model.chat, iter(scores)
        prompt = len(chat.prompt(record.messages))
        fit = [fits(len(chat.response(one.text)), prompt, self._model.limit) for one in record.candidates]
        return ScoredRecord(record, tuple(next(rest) if one else None for one in fit))


def function_scorer(name: str, function: Callable[..., Any]) -> AnswerScorer:
    """A reward function `module:function`; every text fits."""

    def answers(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        completions = [(prompt.chat, answer) for prompt, answer in zip(prompts, answers)]
        found = track(completions, "scoring", unit="answers")
        return list(call_reward_function(function, name, found, FUNCTION_SECONDS))

    return AnswerScorer(name, answers)


def _weighted_sum(name: str, terms: Sequence[tuple[float, AnswerScorer]]) -> AnswerScorer:
    """A weighted sum of other sources; of reward models the normalised scores, as in PPO."""

    def answers(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        columns = [scorer.answers(prompts, answers) for _, scorer in terms]
        return [
            None if None in row else sum(weight * float(score or 0) for (weight, _), score in zip(terms, row))
            for row in zip(*columns)
        ]

    return AnswerScorer(name, answers)


def is_single_model(spec: str) -> bool:
    """Whether a reward source is one model, which may be a policy, and not a function or an ensemble.

    Raises:
        UserError: It is not a reward source.
    """
    return read_source(spec).name == "model"


def open_answer_scorer(spec: str, trust_remote_code: bool = False) -> AnswerScorer:
    """Open a reward run, a model folder with a score head, or another reward source.

    Args:
        spec: See `rlhf.reward.spec.read_reward`.
        trust_remote_code: Run Python code that comes with a model.

    Raises:
        UserError: It cannot be loaded or imported, or is a judge whose agreement with people was not measured.
    """
    source = read_source(spec)
    if source.name == "model":
        return ModelScorer(spec, open_reward_model(source.options["path"], trust_remote_code))
    return _open_part(spec, source, trust_remote_code)


def _open_part(name: str, source: Pick, trust_remote_code: bool) -> AnswerScorer:
    """A reward source, which may be a term of a sum: a reward model by its normalised scores."""
    options = source.options
    if source.name == "sum":
        terms = [(weight, _open_part(one.name, one, trust_remote_code)) for one, weight in weighted_terms(source)]
        return _weighted_sum(name, terms)
    if source.name == "function":
        return function_scorer(name, import_function(options["function"]))
    if source.name == "judge":
        rate = rating_source(RewardJudgeConfig(**options))
        return AnswerScorer(name, lambda prompts, answers: rate([prompt.chat for prompt in prompts], answers))
    spec = json.dumps({"name": source.name, **{key: value for key, value in options.items() if key != "retokenize"}})
    models = open_ensemble(spec, trust_remote_code)
    return AnswerScorer(name, lambda prompts, answers: [one["score"] for one in models.score_answers(prompts, answers)])


# ---- pairs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordPairs(Pairs):
    """The pairs of candidates that the annotator did not tie. Lengths are in characters."""

    prompt: np.ndarray
    """int: number of the prompt; rankings of one prompt share it."""
    rating: np.ndarray
    """float: the candidates' own `score`s, better minus worse; NaN where one has none."""
    first: np.ndarray
    """int: 1 if the better one was shown before the worse, -1 if after, 0 if the order is not known."""


def pairs_of(scored: Sequence[ScoredRecord]) -> RecordPairs:
    """All pairs of candidates with different ranks, of those that have a score."""
    records, prompts = [one.record for one in scored], dict[str, int]()
    scores = [[np.nan if score is None else score for score in one.scores] for one in scored]
    lengths = [[len(one.text) for one in record.candidates] for record in records]
    pairs = ranked_pairs([record.ranks for record in records], scores, lengths)
    pairs = pairs.where((pairs.distance > 0) & ~np.isnan(pairs.gap))
    prompt = np.array([prompts.setdefault(record.prompt_id, len(prompts)) for record in records], np.int64)
    ratings = [np.nan if one.score is None else one.score for record in records for one in record.candidates]
    rating = np.array(ratings, float)[pairs.better] - np.array(ratings, float)[pairs.worse]
    shown = np.array([bool(record.shown) for record in records], np.int64)[pairs.ranking]
    first = np.sign(pairs.worse - pairs.better) * shown
    return RecordPairs(**vars(pairs), prompt=prompt[pairs.ranking], rating=rating, first=first)
