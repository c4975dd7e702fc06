"""One way of prompting on one task: prompts, answers, and what metrics need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf.core.errors import UserError
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.encode_records import EncodingCounts
from rlhf.data.schema import Demonstration, Message, Prompt
from rlhf.data.selection import train_demonstrations
from rlhf.inference.policy import Policy
from rlhf.inference.sampling import sample
from rlhf.prompting.continuations import continuation_logprobs, embeddings
from rlhf.prompting.examples import Example, ExamplePool
from rlhf.prompting.label_words import calibrated, label_logprobs, word_scores
from rlhf.prompting.masked import MaskedModel
from rlhf.prompting.prompts import PromptBuilder
from rlhf.prompting.ways import VOTE_TEMPERATURE, Prompting, check_votes, word_pairs
from rlhf.rollout.types import SamplingParams
from rlhf.tasks.answers import Normalise, normalised
from rlhf.tasks.task import AnswerRules


@dataclass
class Answered:
    """A model's answers to questions, in their order."""

    rows: list[dict[str, Any] | None]
    """For each question what was answered; None if the chat template refuses it."""
    layout: str = ""
    """See `PromptBuilder`."""
    left_out: int = 0
    """Examples that did not fit."""
    shortened: int = 0
    """Questions with fewer examples than asked for."""
    prompt_tokens: float = 0.0
    """Mean tokens of a prompt."""
    generated_tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What a result says about the prompts."""
        return {
            "layout": self.layout, "prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens,
            "examples_left_out": self.left_out, "questions_with_fewer_examples": self.shortened,
            "unanswered": sum(row is not None and row["answer"] is None for row in self.rows), "refused": self.refused,
        }  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """A question with its examples as they fit."""

    place: int
    record: Prompt
    messages: tuple[Message, ...]
    ids: list[int]
    examples: list[Example]


class Prompter:
    """Answers questions in one way.

    Args:
        model: A policy, or a masked language model for `cloze`.
        prompting: The way.
        rules: How answers are read.
        seed: Seed of all choices.
        examples: Solved records to choose examples from, unless the way names a dataset.

    Raises:
        UserError: The way does not suit the model, its label words do not suit the labels or the vocabulary, or there
            are no examples.
    """

    def __init__(
        self, model: Policy | MaskedModel, prompting: Prompting, rules: AnswerRules, seed: int,
        examples: Sequence[Demonstration] = (),
    ) -> None:  # fmt: skip
        self.model, self.prompting, self.seed = model, prompting, seed
        if isinstance(model, MaskedModel) and prompting.label_words is None:
            raise UserError(
                f"{model.path}: is a masked language model, which writes no text; {prompting.name} needs one that does",
                remedy="Use cloze, which fills its mask.",
            )
        words = prompting.label_words
        if words is not None and not rules.labels:
            rules = replace(rules, labels=tuple(words.verbaliser))
        self.rules = rules
        self.builder = PromptBuilder(prompting, model.chat)
        if isinstance(model, MaskedModel) and self.builder.layout != "plain":
            raise UserError(f"layout: {self.builder.layout} is for chat models; a masked model reads plain text")
        self._words = word_pairs(words.verbaliser, rules.labels) if words else []
        self._word_ids = [self._ids_of(word) for _, word in self._words]
        self.pool = self._pool(examples) if prompting.count else None

    def _ids_of(self, word: str) -> list[int]:
        """Tokens of a label word.

        Raises:
            UserError: The vocabulary cannot spell it.
        """
        masked = isinstance(self.model, MaskedModel)
        ids = self.model.word_ids(self.builder.gap, word) if masked else self.builder.answer_ids(word)  # type: ignore[union-attr]
        unknown = self.model.chat.tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            raise UserError(
                f"verbaliser: {word!r} is not in the vocabulary of {self.model.path}",
                "It becomes the unknown token, whose probability says nothing about the word.",
                "Name another word for this label.",
            )
        return ids

    def _pool(self, records: Sequence[Demonstration]) -> ExamplePool:
        shots, rules = self.prompting.shots, self.rules
        assert shots is not None
        if shots.examples_from:
            records = list(train_demonstrations(shots.examples_from))
        if not records:
            raise UserError(
                f"{self.prompting.name}: there are no examples to show",
                remedy="Name solved records with `examples_from`, or make a train split with `rlhf data split`.",
            )
        # Examples of another domain have other labels, which are shown as they are.
        own = rules if not shots.examples_from else replace(rules, labels=())
        first_word = dict(reversed(self._words))

        def shown(record: Demonstration, label: str) -> str | None:
            if self._words:
                return first_word.get(label, label)
            pattern, whole = rules.pattern, record.answer.strip()
            sentence = pattern.sentence(record.answer, label) if pattern else None
            if not shots.rationales:
                return sentence or label
            plain = pattern.sentence(record.answer) if pattern else None
            if plain is None or plain == whole or sentence is None:
                return None  # without a rationale
            return whole[: -len(plain)] + sentence if shots.random_labels else whole

        return ExamplePool(
            records, shots, lambda record: own.reference(record.answer), shown, rules.labels, self.seed, self._embed
        )

    def _embed(self, texts: Sequence[str]) -> Any:
        if isinstance(self.model, MaskedModel):
            raise UserError("similarity: embedding needs a causal language model", remedy="Use tfidf.")
        chat = self.builder.chat
        encoded = chat.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=self.model.limit)
        return embeddings(self.model.model, chat, [ids or [chat.end_id] for ids in encoded["input_ids"]])

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def _ask(self, questions: Sequence[Prompt], room: int, found: Answered) -> list[_Asked]:
        """The questions that the chat template accepts, with as many examples as fit in `room` tokens."""
        asked, counts = [], EncodingCounts()
        for place, record in enumerate(questions):
            examples = self.pool.take(record, self.prompting.count) if self.pool else []
            try:
                messages, ids, kept = self.builder.fitting(record.messages, examples, room)
            except RefusedText as error:
                counts.refuse(record, error)
                continue
            found.left_out += len(examples) - kept
            found.shortened += kept < self.prompting.count
            asked.append(_Asked(place, record, messages, ids, examples[len(examples) - kept :]))
        counts.report_refused("questions")
        found.refused = dict(counts.skipped)
        if not asked:
            what = f"{self.model.path}: no question can be used"
            raise UserError(what, counts.refused[0]["fault"] if counts.refused else "")
        found.prompt_tokens = sum(len(one.ids) for one in asked) / len(asked)
        found.layout = self.builder.layout
        return asked

    # ---- answers -----------------------------------------------------------------------------------------------------

    def answer(self, questions: Sequence[Prompt], params: SamplingParams) -> Answered:
        """Answer questions. Rows have `prompt_id`, `answer`, `confidence`, `examples` (prompt ids) and more.

        Args:
            questions: At least one.
            params: How answers are generated; see `generation_params`.
        """
        found = Answered([None] * len(questions))
        if self.prompting.label_words is not None:
            self._choose(questions, found)
        else:
            self._generate(questions, params, found)
        return found

    def _generate(self, questions: Sequence[Prompt], params: SamplingParams, found: Answered) -> None:
        assert isinstance(self.model, Policy)
        room, n = self.model.prompt_limit(params), self.prompting.samples
        asked = self._ask(questions, room, found)
        policy = replace(self.model, chat=self.builder.chat)
        prompts = [Prompt(one.messages) for one in asked]
        for one, samples in zip(asked, sample(policy, prompts, params, self.seed, n, room)):
            texts = [self.builder.answer_text(each.text) for each in samples]
            answers = [self.rules.answer(text) for text in texts]
            row = _row(one) | {"answer": answers[0], "confidence": None, "text": texts[0]}
            if n > 1:
                result = vote(answers, self.rules.normalise)
                row |= {"answer": result.answer, "confidence": result.margin, "votes": result.votes}
                row |= {"answers": answers, "texts": texts}
            found.generated_tokens += sum(len(each.completion.ids) for each in samples)
            found.rows[one.place] = row

    def _choose(self, questions: Sequence[Prompt], found: Answered) -> None:
        words = self.prompting.label_words
        assert words is not None
        longest = max(map(len, self._word_ids))
        asked = self._ask(questions, self.model.limit - longest, found)
        logprobs = self._label_logprobs([(one.record.messages, one.examples) for one in asked])
        if words.content_free:
            logprobs = calibrated(logprobs, self._content_free(asked, words.content_free))
        for one, values in zip(asked, np.exp(logprobs)):
            second, best = np.sort(values)[-2:]
            found.rows[one.place] = _row(one) | {
                "answer": self.rules.labels[int(values.argmax())], "confidence": float(best - second),
                "probabilities": dict(zip(self.rules.labels, values.tolist())),
            }  # fmt: skip

    def _content_free(self, asked: Sequence[_Asked], inputs: Sequence[str]) -> np.ndarray:
        """Log-probs [records, inputs, labels] of inputs without content, after the examples of each question."""
        contexts = list(dict.fromkeys(map(_context, asked)))
        pairs = [((*system, Message("user", text)), examples) for system, examples in contexts for text in inputs]
        logprobs = self._label_logprobs(pairs).reshape(len(contexts), len(inputs), -1)
        place = {context: i for i, context in enumerate(contexts)}
        return logprobs[[place[_context(one)] for one in asked]]

    def _label_logprobs(self, pairs: Sequence[tuple[Sequence[Message], Sequence[Example]]]) -> np.ndarray:
        """Log-probs [pairs, labels], normalised over the labels."""
        conversations = [self.builder.messages(question, examples) for question, examples in pairs]
        if isinstance(self.model, MaskedModel):
            gap, after = self.builder.gap, self.builder.after
            texts = [(messages[-1].content + gap, after) for messages in conversations]
            totals = self.model.logprobs(texts, self._word_ids)
        else:
            chat, room = self.builder.chat, self.model.limit - max(map(len, self._word_ids))
            prompts = [chat.truncate_prompt(chat.prompt(messages), room) for messages in conversations]
            totals = continuation_logprobs(self.model.model, chat, prompts, [self._word_ids] * len(prompts))
        words = self.prompting.label_words
        assert words is not None
        scores = word_scores(np.array(totals), [len(ids) for ids in self._word_ids], words.normalise)
        numbers = [self.rules.labels.index(label) for label, _ in self._words]
        return label_logprobs(scores, numbers, len(self.rules.labels))

    def reference_logprobs(self, records: Sequence[Demonstration]) -> list[tuple[float, int]]:
        """Log-prob of each record's answer after its prompt in nats, and the answer's number of tokens.

        Records that the chat template refuses are left out. The end of the answer's turn counts, except in the plain
        layout, where an answer has no end.
        """
        assert isinstance(self.model, Policy)
        chat, ending = self.builder.chat, None if self.builder.layout != "plain" else -1
        answers = [chat.response(self.builder.gap + record.answer.strip())[:ending] for record in records]
        room = max(1, self.model.limit - max(map(len, answers)))
        asked = self._ask(records, room, Answered([None] * len(records)))
        prompts, wanted = [chat.truncate_prompt(one.ids, room) for one in asked], [answers[one.place] for one in asked]
        totals = continuation_logprobs(self.model.model, chat, prompts, [[ids] for ids in wanted])
        return [(total, len(ids)) for (total,), ids in zip(totals, wanted)]


def generation_params(given: SamplingParams, temperature: float | None, prompting: Prompting, layout: str) -> Any:
    """How a way generates: greedy by default, at a temperature where answers are voted on.

    Args:
        given: The command's sampling options.
        temperature: The temperature if the user gave one.
        prompting: The way.
        layout: In the layout `plain` an answer also ends at the separator.

    Raises:
        UserError: Greedy answers were to be voted on.
    """
    check_votes(prompting, temperature)
    if temperature is None:
        temperature = VOTE_TEMPERATURE if prompting.samples > 1 else 0.0
    stop = given.stop
    if layout == "plain" and prompting.wording.separator:
        stop = (*stop, prompting.wording.separator)
    return replace(given, temperature=temperature, stop=stop)


def _context(one: _Asked) -> tuple[tuple[Message, ...], tuple[Example, ...]]:
    """What precedes a question: its system message, and the examples."""
    return tuple(m for m in one.record.messages if m.role == "system"), tuple(one.examples)


def _row(one: _Asked) -> dict[str, Any]:
    return {"prompt_id": one.record.prompt_id, "examples": [example.prompt_id for example in one.examples]}


@dataclass(frozen=True)
class VoteOutcome:
    """The outcome of a vote."""

    answer: str | None
    """None if no sample holds an answer."""
    votes: int
    """Samples that gave the answer."""
    margin: float
    """Confidence: how many more samples gave the answer than the next one, as a fraction of all samples."""


def vote(answers: Sequence[str | None], normalise: Normalise = "text") -> VoteOutcome:
    """Majority vote (Wang et al. 2022). Of answers with equal votes, the one that was sampled first wins.

    Args:
        answers: The answer of each sample; None where it holds none. At least one sample.
        normalise: When two answers are the same.
    """
    counts = Counter(normalised(answer, normalise) for answer in answers if answer is not None)
    if not counts:
        return VoteOutcome(None, 0, 0.0)
    (best, votes), *others = counts.most_common(2)  # in the order of first appearance where votes are equal
    second = others[0][1] if others else 0
    answer = next(a for a in answers if a is not None and normalised(a, normalise) == best)
    return VoteOutcome(answer, votes, (votes - second) / len(answers))
