"""Importers of K answers with ratings, or in a ranked list: UltraFeedback, HelpSteer, Stack Exchange, Alpaca lists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from data_tools.importers.comparisons import marked_prompt
from data_tools.importers.table import IMPORTERS, Head, convert_rows
from data_tools.reading.fields import alpaca_prompt, as_jsonl, elements, need, number, text
from data_tools.reading.html_text import html_text
from data_tools.reading.judgements import chosen_and_rejected, ranks_with_scores
from data_tools.reading.rows import JSON, rows
from data_tools.reading.unread import NestedFields
from rlhf.data.jsonl import Item, OnReject, Reject
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking, Record, dense_ranks


def _by_score(scores: list[float]) -> tuple[int, ...]:
    """Ranks in which the highest score is 1 and equal scores tie."""
    return dense_ranks(-score for score in scores)


# ---- UltraFeedback ---------------------------------------------------------------------------------------------------

Four = ("instruction_following", "honesty", "truthfulness", "helpfulness")
FeedbackAspect = Literal[
    "mean", "instruction_following", "honesty", "truthfulness", "helpfulness", "fine-grained_score", "overall_score"
]


KNOWN_ANSWERS = ("correct_answers", "incorrect_answers")
"""Of TruthfulQA's questions, for the raters; other rows have ["None"]."""
OF_COMPLETION = ("annotations", "overall_score", "fine-grained_score", "custom_system_prompt")
"""The ratings among which `aspect` chooses, and the system prompt of one completion."""


def _detect_ultrafeedback(head: Head) -> str | None:
    found = head.all_have("instruction", "completions") and all(
        isinstance(row["completions"], list) for row in head.rows
    )
    return "its rows have `instruction` and a list of `completions`" if found else None


def _sample_completion(model: str, response: str, rating: str) -> dict[str, Any]:
    return {"model": model, "response": response, "annotations": {aspect: {"Rating": rating} for aspect in Four}}


ULTRAFEEDBACK_SAMPLE = as_jsonl(
    {
        "source": "sharegpt",
        "instruction": "Name a fruit.",
        "completions": [_sample_completion("alpaca-7b", "Car.", "1"), _sample_completion("gpt-4", "Pear.", "5")],
    }
)


@IMPORTERS.row("ultrafeedback", suffixes=JSON, sample=ULTRAFEEDBACK_SAMPLE, detect=_detect_ultrafeedback)
def ultrafeedback(path: Path, reject: OnReject, *, aspect: FeedbackAspect = "mean") -> Iterator[Record]:
    """UltraFeedback: rows {instruction, completions[{model, response, annotations{aspect: {Rating}}}]}, rated by GPT-4.

    Ranks: the highest rating is rank 1, equal ratings are a tie. The order shown is unknown; `model` is the author,
    and the annotator is "gpt-4". The rating stays with the candidate as its score. System prompts
    (`custom_system_prompt`) differ between the completions and are left out of the prompt, and so are the
    `correct_answers` and `incorrect_answers` that raters had for some questions.

    Args:
        aspect: What is ranked by: the mean of the four ratings (1 to 5), one of them, or a field that the published
            rows have besides: fine-grained_score, or overall_score (1 to 10; some published tens should be ones,
            see the data card of argilla/ultrafeedback-binarized-preferences).

    Rejected: a completion without that rating (also "N/A", where the aspect did not apply), fewer than two distinct
    completions, an empty one, identical completions with different ratings.
    """
    return convert_rows(path, reject, lambda row: _ultrafeedback(row, aspect), KNOWN_ANSWERS + OF_COMPLETION)


def _ultrafeedback(row: Any, aspect: FeedbackAspect) -> Ranking:
    need(row, "instruction", "completions")
    completions = [need(item, "response") for item in elements(row, "completions")]
    scores = [_feedback_score(completion, aspect) for completion in completions]
    return Ranking(
        (Message("user", text(row, "instruction")),),
        source="ultrafeedback",
        candidates=tuple(
            Candidate(text(item, "response"), text(item, "model", optional=True), "model", score)
            for item, score in zip(completions, scores)
        ),
        ranks=_by_score(scores),
        annotator="gpt-4",
    )


def _feedback_score(completion: dict[str, Any], aspect: FeedbackAspect) -> float:
    if aspect in ("fine-grained_score", "overall_score"):
        return _rating(completion.get(aspect), aspect, 10)
    annotations = need(need(completion, "annotations")["annotations"])
    aspects = Four if aspect == "mean" else (aspect,)
    ratings = [_rating(need(need(annotations, name)[name]).get("Rating"), name, 5) for name in aspects]
    return sum(ratings) / len(ratings)


def _rating(value: Any, name: str, highest: int) -> float:
    if value is None or value == "N/A":
        remedy = "Choose another --option aspect=..., or leave the row out."
        raise BadRecord(f"{name}: a completion has no rating", repr(value), remedy)
    if isinstance(value, str):
        with suppress(ValueError):  # `number` reports it
            value = float(value)
    return number(value, name, 1, highest)


# ---- HelpSteer -------------------------------------------------------------------------------------------------------

HelpAspect = Literal["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


def _detect_helpsteer(head: Head) -> str | None:
    found = head.all_have("prompt", "response", "helpfulness", "correctness")
    return "its rows have `prompt`, `response`, `helpfulness` and `correctness`" if found else None


_RATINGS = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
HELPSTEER_SAMPLE = as_jsonl(
    {"prompt": "Name a fruit.", "response": "Pear.", "helpfulness": 4, **_RATINGS},
    {"prompt": "Name a fruit.", "response": "Car.", "helpfulness": 0, **_RATINGS},
)


@IMPORTERS.row("helpsteer", suffixes=JSON, sample=HELPSTEER_SAMPLE, detect=_detect_helpsteer)
def helpsteer(path: Path, reject: OnReject, *, aspect: HelpAspect = "helpfulness") -> Iterator[Record]:
    """HelpSteer and HelpSteer2: rows {prompt, response, helpfulness, ...} of one answer each, rated 0 to 4.

    Rows that follow one another with the same prompt are one ranking. Ranks: the highest rating is rank 1, equal
    ratings are a tie. The format names neither annotators nor authors (models) nor the order shown; the rating stays
    with the candidate as its score. ``<extra_id_1>User`` and ``<extra_id_1>Assistant`` in a prompt begin a turn.

    Args:
        aspect: The rating that is ranked by.

    Rejected: a row that is not such an answer, for itself; then a prompt with fewer than two distinct answers, an
    empty answer, identical answers with different ratings.
    """

    def answer(row: Any) -> tuple[str, Candidate]:
        need(row, "prompt", "response", aspect)
        rating = number(row[aspect], aspect, 0, 4)
        return text(row, "prompt"), Candidate(text(row, "response"), author_kind="model", score=rating)

    fields = NestedFields(getattr(reject, "ignored_fields", ()))
    group: list[tuple[Item, Candidate]] = []
    prompt: str | None = None
    for item in rows(path, reject):
        try:
            (asked, candidate), unread = fields.converted(answer, item.value)
            if unread:
                raise unread
        except BadRecord as fault:
            reject(Reject.of(path, item.line, fault, item.raw))
            continue
        if asked != prompt:
            yield from _helpsteer_ranking(path, reject, prompt, group)
            prompt, group = asked, []
        group.append((item, candidate))
    yield from _helpsteer_ranking(path, reject, prompt, group)


def _helpsteer_ranking(
    path: Path, reject: OnReject, prompt: str | None, group: list[tuple[Item, Candidate]]
) -> Iterator[Record]:
    if prompt is None:
        return
    candidates = tuple(candidate for _, candidate in group)
    ranks = _by_score([candidate.score or 0 for candidate in candidates])
    try:
        yield Ranking(marked_prompt(prompt), source="helpsteer", candidates=candidates, ranks=ranks)
    except BadRecord as fault:
        raw = b"\n".join(item.raw.encode() if isinstance(item.raw, str) else item.raw.strip() for item, _ in group)
        reject(Reject.of(path, group[0][0].line, fault, raw))


# ---- Stack Exchange --------------------------------------------------------------------------------------------------


def _detect_stack_exchange(head: Head) -> str | None:
    if head.all_have("question", "answers") and all(
        isinstance(row["answers"], list) and all(isinstance(one, dict) and "pm_score" in one for one in row["answers"])
        for row in head.rows
    ):
        return "its rows have a `question` and `answers` with a `pm_score`"
    return None


STACK_EXCHANGE_SAMPLE = as_jsonl(
    {
        "qid": 1,
        "question": "<p>How do I sort a <code>list</code>?</p>",
        "answers": [
            {
                "answer_id": 2,
                "author": "Ann",
                "pm_score": 5,
                "selected": True,
                "text": "<p>Use <code>sorted</code>.</p>",
            },
            {"answer_id": 3, "author": "Bob", "pm_score": 0, "selected": False, "text": "<p>By hand.</p>"},
        ],
        "date": "2016/08/05",
        "metadata": ["https://stackoverflow.com/questions/1", "https://stackoverflow.com", ""],
    }
)


@IMPORTERS.row("stack-exchange", suffixes=JSON, sample=STACK_EXCHANGE_SAMPLE, detect=_detect_stack_exchange)
def stack_exchange(path: Path, reject: OnReject, *, bodies: Literal["text", "html"] = "text") -> Iterator[Record]:
    """H4 Stack Exchange preferences: rows {question, answers[{text, pm_score, author}]}, HTML turned into plain text.

    Ranks: the highest `pm_score` is rank 1, equal scores are a tie. It is log2(1 + upvotes), rounded, plus 1 for the
    accepted answer, and -1 for an answer with negative votes (dataset card of
    HuggingFaceH4/stack-exchange-preferences). The preference is that of all voters: there is no annotator and no order
    shown. People wrote the answers; `author` names them.

    Args:
        bodies: text: tags are dropped, code is between backticks, list items begin with a dash. html: as it is.

    Rejected: fewer than two distinct answers, an empty one, identical answers with different scores, no score.
    """
    return convert_rows(path, reject, lambda row: _stack_exchange(row, html_text if bodies == "text" else str))


def _stack_exchange(row: Any, body: Any) -> Ranking:
    need(row, "question", "answers")
    answers = [need(item, "text", "pm_score") for item in elements(row, "answers")]
    scores = [number(item["pm_score"], "pm_score", -1, 100) for item in answers]
    return Ranking(
        (Message("user", body(text(row, "question"))),),
        source="stack-exchange",
        candidates=tuple(
            Candidate(body(text(item, "text")), text(item, "author", optional=True), "person", score)
            for item, score in zip(answers, scores)
        ),
        ranks=_by_score(scores),
    )


# ---- Alpaca-style rankings -------------------------------------------------------------------------------------------


def _detect_alpaca_ranked(head: Head) -> str | None:
    if head.all_have("instruction", "output") and all(isinstance(row["output"], list) for row in head.rows):
        return "its rows have `instruction` and an `output` that is a list"
    if head.all_have("instruction", "chosen", "rejected"):
        return "its rows have `instruction`, `chosen` and `rejected`"
    return None


ALPACA_RANKED_SAMPLE = as_jsonl({"instruction": "Name a fruit.", "input": "", "output": ["Pear.", "A plant.", "Car."]})


@IMPORTERS.row("alpaca-ranked", suffixes=JSON, sample=ALPACA_RANKED_SAMPLE, detect=_detect_alpaca_ranked)
def alpaca_ranked(path: Path, reject: OnReject) -> Iterator[Record]:
    """Alpaca-style rankings (LLaMA-Factory): rows {instruction, input, output} with a list of answers, best first.

    Ranks: the place in the list, first = 1; the format has no ties, and says neither the order shown nor who judged
    or wrote. Rows {instruction, input, chosen, rejected} are read as a list of two; their scores (`score_chosen` and
    the like) stay with them, and equal scores are a tie. The prompt is `instruction` and,
    after a blank line, `input`, after `system` and `history` where the row has them.

    Rejected: an `output` that is no list (import it as alpaca), fewer than two distinct answers, an empty one, the same
    answer at two places, a rejected answer with the higher score.
    """
    return convert_rows(path, reject, _alpaca_ranked)


def _alpaca_ranked(row: Any) -> Ranking:
    need(row, "instruction")
    if row.get("output") is None:
        need(row, "chosen", "rejected")
    pair = row.get("output") is None
    answers = [row["chosen"], row["rejected"]] if pair else row["output"]
    if not isinstance(answers, list):
        raise BadRecord("output: not a list", type(answers).__name__, "Rows of one answer are imported as alpaca.")
    scores = chosen_and_rejected(row) if pair else [None] * len(answers)
    ranks = tuple(range(1, len(answers) + 1))
    return Ranking(
        alpaca_prompt(row),
        source="alpaca-ranked",
        candidates=tuple(Candidate(text, score=score) for text, score in zip(answers, scores)),
        ranks=ranks_with_scores(ranks, scores, ("chosen", "rejected")) if pair else ranks,
    )
