"""PRISM: conversations with several models, whose answers people scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from data_tools.published.table import any_of, row_format, rows_have
from data_tools.reading.annotation_exports import person
from data_tools.reading.fields import elements, need, number, ranking, text, text_if_any
from data_tools.reading.rows import in_groups
from rlhf.data.jsonl import Item, OnReject, Reject
from rlhf.data.schema import BadRecord, Message, Ranking, Record, brief, dense_ranks

_OF_CONVERSATION = ("conversation_id", "interaction_id", "user_id", "user_prompt")
_FIELDS = {"model_response": "content"}
"""Field of a row of utterances.jsonl -> what conversations.jsonl calls it."""


def _conversations(path: Path, reject: OnReject) -> Iterator[Item]:
    """The rows of conversations.jsonl, those of utterances.jsonl put together as conversations.jsonl has them."""
    for items in in_groups(path, reject, _conversation_of):
        item = items[0]
        if not isinstance(item.value, dict) or "model_response" not in item.value:
            yield item
            continue
        try:
            _check_utterance(item.value)
        except BadRecord as fault:
            reject(Reject.of(path, item.line, fault, item.raw))
        else:
            yield _joined(items)


def _conversation_of(row: Any) -> str | None:
    """The conversation of an utterance that can be put into its place."""
    try:
        _check_utterance(row)
    except BadRecord:
        return None
    return row["conversation_id"]


def _check_utterance(row: Any) -> None:
    need(row, "conversation_id", "turn", "user_prompt", "model_response")
    text(row, "conversation_id")
    number(row["turn"], "turn", 0, 1e6)
    person(row.get("user_id"))


def _joined(items: list[Item]) -> Item:
    """The conversation of some rows of utterances.jsonl."""
    history: list[dict[str, Any]] = []
    by_turn = sorted((item.value for item in items), key=lambda row: row["turn"])
    for turn, group in groupby(by_turn, lambda row: row["turn"]):
        given = list(group)
        asked = dict.fromkeys(json.dumps(row["user_prompt"]) for row in given)  # several: one reject of `prism`
        history += [{"turn": turn, "role": "user", "content": json.loads(question)} for question in asked]
        for row in given:
            answer = {_FIELDS.get(name, name): value for name, value in row.items() if name not in _OF_CONVERSATION}
            history.append({**answer, "role": "model"})
    raw = b"\n".join(item.raw if isinstance(item.raw, bytes) else item.raw.encode() for item in items)
    first = items[0]
    value = {"user_id": first.value.get("user_id"), "conversation_history": history}
    return Item(first.line, raw, value)


@row_format(
    "prism",
    "conversation_history",
    detect=any_of(
        rows_have("conversation_history"),
        rows_have("interaction_id", "user_prompt", "model_response", "if_chosen"),
    ),
    left_out=("opening_prompt", "performance_attributes", "choice_attributes", "open_feedback"),
    read=_conversations,
)
def prism(row: Any, *, by: Literal["score", "chosen"] = "score") -> Iterator[Record | BadRecord]:
    """PRISM conversations.jsonl: rows {user_id, conversation_history[{turn, role, content, score, if_chosen}]}.

    Also utterances.jsonl, an answer a row {conversation_id, turn, user_prompt, model_response, score, if_chosen}: the
    rows of one conversation, in any order, are put together. As long as they are adjacent, one conversation is held in
    memory at a time. A row without one of the first four fields is a reject.

    Ranks: the highest `score` is rank 1 and equal scores are a tie, or by choice the answer with which the person went
    on is 1 and all others are 2. Each turn is a ranking of the answers that several models gave to it; its prompt goes
    on with the chosen answer of each turn before. `user_id` is the annotator, `model_name` the author, and `score` (1
    to 100) stays with the answer. The order shown is not kept. The questions after the conversation
    (`performance_attributes`, `choice_attributes`, `open_feedback`) are left out.

    Args:
        by: score: the ranks follow `score`. chosen: they follow `if_chosen`.

    Rejected, each turn for itself: a chosen answer that scores below another, a missing score, fewer than two distinct
    answers; turns after one without a chosen answer.
    """
    history = [need(item, "turn", "role", "content") for item in elements(row, "conversation_history")]
    if not history:
        raise BadRecord("conversation_history: no turn")
    prompt: list[Message] | None = []
    for turn, group in groupby(history, lambda item: item["turn"]):
        try:
            if prompt is None:
                raise BadRecord("the turn before has no answer, or several, to go on with", f"turn {brief(turn)}")
            said = list(group)
            asked = [item for item in said if item["role"] == "user"]
            answers = [item for item in said if item["role"] == "model"]
            chosen = {text(item, "content") for item in answers if item.get("if_chosen") is True}
            before, prompt = prompt, None
            if len(asked) != 1 or len(answers) + 1 != len(said):
                raise BadRecord("a turn that is not one question and its answers", f"turn {brief(turn)}")
            before = [*before, Message("user", text(asked[0], "content"))]
            if len(chosen) == 1:
                prompt = [*before, Message("assistant", *chosen)]
            yield _prism_turn(before, answers, by, person(row.get("user_id")))
        except BadRecord as fault:
            yield fault


def _prism_turn(prompt: list[Message], answers: list[dict[str, Any]], by: str, annotator: str) -> Ranking:
    scores = [None if item.get("score") is None else number(item["score"], "score", 0, 100) for item in answers]
    picked = [item.get("if_chosen") is True for item in answers]
    given = [score for score in scores if score is not None]
    if any(pick and score is not None and score < max(given) for pick, score in zip(picked, scores)):
        raise BadRecord("if_chosen: contradicts the scores", brief(list(zip(scores, picked))))
    if by == "score" and len(given) < len(scores):
        raise BadRecord("score: an answer has none", brief(scores), "Use --option by=chosen.")
    if by == "chosen" and not any(picked):
        raise BadRecord("if_chosen: no answer of the turn is chosen")
    better = [-score for score in given] if by == "score" else [not pick for pick in picked]
    return ranking(
        "prism",
        prompt,
        [text(item, "content") for item in answers],
        dense_ranks(better),
        authors=[text_if_any(item, "model_name") for item in answers],
        kind="model",
        scores=scores,
        annotator=annotator,
    )
