"""Importers of K answers with ratings, or in a ranked list: UltraFeedback, HelpSteer, Stack Exchange, Alpaca lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from data_tools.importers.comparisons import marked_prompt
from data_tools.published.table import any_of, are, file_format, row_format, rows_have
from data_tools.reading.fields import alpaca_prompt, elements, is_list_of, need, number, ranking, text, text_if_any
from data_tools.reading.html_text import html_text
from data_tools.reading.judgements import chosen_and_rejected, ranks_with_scores
from data_tools.reading.rows import converted, rows
from data_tools.reading.unread import NestedFields
from rlhf.data.jsonl import OnReject, Reject
from rlhf.data.schema import BadRecord, Ranking, Record, dense_ranks


def _by_score(scores: Iterable[float]) -> tuple[int, ...]:
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


@row_format(
    "ultrafeedback",
    "instruction",
    "completions",
    detect=rows_have(
        "instruction",
        "completions",
        where=are(list, "completions"),
        why="its rows have `instruction` and a list of `completions`",
    ),
    left_out=KNOWN_ANSWERS + OF_COMPLETION,
)
def ultrafeedback(row: Any, *, aspect: FeedbackAspect = "mean") -> Ranking:
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
    completions = [need(item, "response") for item in elements(row, "completions")]
    scores = [_feedback_score(completion, aspect) for completion in completions]
    return ranking(
        "ultrafeedback",
        text(row, "instruction"),
        [text(item, "response") for item in completions],
        _by_score(scores),
        authors=[text_if_any(item, "model") for item in completions],
        kind="model",
        scores=scores,
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


@file_format("helpsteer", detect=rows_have("prompt", "response", "helpfulness", "correctness"))
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

    fields = NestedFields(reject)

    def answer(row: Any) -> tuple[str, str, float]:
        need(row, "prompt", "response", aspect)
        return text(row, "prompt"), text(row, "response"), number(row[aspect], aspect, 0, 4)

    answers = converted(path, reject, rows(path, reject), lambda row: fields.converted(answer, row))
    for prompt, group in groupby(answers, lambda found: found[1][0]):
        items, given = zip(*group)
        _, said, scores = zip(*given)
        try:
            yield ranking("helpsteer", marked_prompt(prompt), said, _by_score(scores), kind="model", scores=scores)
        except BadRecord as fault:
            raw = b"\n".join(item.raw.encode() if isinstance(item.raw, str) else item.raw.strip() for item in items)
            reject(Reject.of(path, items[0].line, fault, raw))


# ---- Stack Exchange --------------------------------------------------------------------------------------------------


@row_format(
    "stack-exchange",
    "question",
    "answers",
    detect=rows_have(
        "question",
        "answers",
        where=lambda row: is_list_of(dict, row["answers"]) and all("pm_score" in one for one in row["answers"]),
        why="its rows have a `question` and `answers` with a `pm_score`",
    ),
)
def stack_exchange(row: Any, *, bodies: Literal["text", "html"] = "text") -> Ranking:
    """H4 Stack Exchange preferences: rows {question, answers[{text, pm_score, author}]}, HTML turned into plain text.

    Ranks: the highest `pm_score` is rank 1, equal scores are a tie. It is log2(1 + upvotes), rounded, plus 1 for the
    accepted answer, and -1 for an answer with negative votes (dataset card of
    HuggingFaceH4/stack-exchange-preferences). The preference is that of all voters: there is no annotator and no order
    shown. People wrote the answers; `author` names them.

    Args:
        bodies: text: tags are dropped, code is between backticks, list items begin with a dash. html: as it is.

    Rejected: fewer than two distinct answers, an empty one, identical answers with different scores, no score.
    """
    body = html_text if bodies == "text" else str
    answers = [need(item, "text", "pm_score") for item in elements(row, "answers")]
    scores = [number(item["pm_score"], "pm_score", -1, 100) for item in answers]
    return ranking(
        "stack-exchange",
        body(text(row, "question")),
        [body(text(item, "text")) for item in answers],
        _by_score(scores),
        authors=[text_if_any(item, "author") for item in answers],
        kind="person",
        scores=scores,
    )


# ---- Alpaca-style rankings -------------------------------------------------------------------------------------------


@row_format(
    "alpaca-ranked",
    "instruction",
    detect=any_of(
        rows_have(
            "instruction",
            "output",
            where=are(list, "output"),
            why="its rows have `instruction` and an `output` that is a list",
        ),
        rows_have("instruction", "chosen", "rejected"),
    ),
)
def alpaca_ranked(row: Any) -> Ranking:
    """Alpaca-style rankings (LLaMA-Factory): rows {instruction, input, output} with a list of answers, best first.

    Ranks: the place in the list, first = 1; the format has no ties, and says neither the order shown nor who judged
    or wrote. Rows {instruction, input, chosen, rejected} are read as a list of two; their scores (`score_chosen` and
    the like) stay with them, and equal scores are a tie. The prompt is `instruction` and,
    after a blank line, `input`, after `system` and `history` where the row has them.

    Rejected: an `output` that is no list (import it as alpaca), fewer than two distinct answers, an empty one, the same
    answer at two places, a rejected answer with the higher score.
    """
    pair = row.get("output") is None
    answers = [need(row, name)[name] for name in ("chosen", "rejected")] if pair else row["output"]
    if not isinstance(answers, list):
        raise BadRecord("output: not a list", type(answers).__name__, "Rows of one answer are imported as alpaca.")
    scores = chosen_and_rejected(row) if pair else [None] * len(answers)
    ranks = range(1, len(answers) + 1)
    ranks = ranks_with_scores(ranks, scores, ("chosen", "rejected")) if pair else ranks
    return ranking("alpaca-ranked", alpaca_prompt(row), answers, ranks, scores=scores)
