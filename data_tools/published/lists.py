"""Rows of K answers: RewardBench 2, RM-Bench, Nectar, PRISM."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal

from data_tools.published.table import PUBLISHED, Beginning, are_lists_of_text
from data_tools.reading.annotation_exports import brief, person
from data_tools.reading.fields import as_jsonl, elements, need, number, text
from data_tools.reading.rows import JSON
from data_tools.reading.turns import turns_of
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking, Record, dense_ranks

# ---- RewardBench 2, RM-Bench -----------------------------------------------------------------------------------------


def _detect_reward_bench(head: Beginning) -> str | None:
    found = head.all_have("prompt") and are_lists_of_text(head, "chosen", "rejected")
    return "its rows have a `prompt`, and `chosen` and `rejected` are lists of texts" if found else None


_REWARD_BENCH_SAMPLE = as_jsonl(
    {
        "id": "1",
        "prompt": "Name a colour of the rainbow.",
        "chosen": ["Red.", "Blue."],
        "rejected": ["Pink.", "Brown."],
        "subset": "Ties",
    }
)


@PUBLISHED.row("reward-bench-2", suffixes=JSON, sample=_REWARD_BENCH_SAMPLE, detect=_detect_reward_bench)
def reward_bench_2(row: Any) -> Ranking:
    """RewardBench 2 and RM-Bench: rows {prompt, chosen, rejected} with lists of texts, any number in each.

    Ranks: each answer of `chosen` 1, each of `rejected` 2; those of one list are a tie. So one ranking of K answers
    states every pair of a good and a bad answer, and none between two good ones (RewardBench 2's subset Ties, the three
    styles of RM-Bench). `subset` (or `domain`) is the group. The format names neither annotators nor the order shown;
    `models` is not used, since it is not said to be in the order of the answers.

    Rejected: an empty list, `num_correct` or `total_completions` that contradict the lists, an empty answer, one that
    is in both lists.
    """
    need(row, "prompt", "chosen", "rejected")
    better, worse = elements(row, "chosen"), elements(row, "rejected")
    for name, answers in (("chosen", better), ("rejected", worse)):
        if not answers:
            raise BadRecord(f"{name}: no answer in the list")
    for name, count in (("num_correct", len(better)), ("total_completions", len(better) + len(worse))):
        if row.get(name, count) != count:
            raise BadRecord(f"{name}: not the number of answers", f"{brief(row[name])}, there are {count}")
    return Ranking(
        tuple(turns_of(row["prompt"], "prompt", "user")),
        source="reward-bench-2" if "subset" in row else "rm-bench" if "domain" in row else "",
        group=text(row, "subset", optional=True) or text(row, "domain", optional=True) or None,
        candidates=tuple(map(Candidate, better + worse)),
        ranks=(1,) * len(better) + (2,) * len(worse),
    )


# ---- Nectar ----------------------------------------------------------------------------------------------------------


def _detect_nectar(head: Beginning) -> str | None:
    found = head.all_have("prompt", "answers") and all(
        isinstance(row["answers"], list)
        and row["answers"]
        and all(isinstance(item, dict) and item.keys() >= {"answer", "rank"} for item in row["answers"])
        for row in head.rows
    )
    return "its rows have a `prompt` and `answers` with a `rank`" if found else None


_NECTAR_SAMPLE = as_jsonl(
    {
        "prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ",
        "answers": [
            {"answer": "Car.", "model": "m7", "rank": 3.0},
            {"answer": "Pear.", "model": "m1", "rank": 1.0},
            {"answer": "A plant.", "model": "m2", "rank": 2.0},
        ],
        "turns": 1,
        "num_responses": 3,
        "good_natured": True,
    }
)


@PUBLISHED.row("nectar", suffixes=JSON, sample=_NECTAR_SAMPLE, detect=_detect_nectar)
def nectar(row: Any) -> Ranking:
    """Nectar: rows {prompt, answers[{answer, model, rank}]} of seven answers ranked by GPT-4.

    Ranks: `rank` 1 is the best, equal ranks are a tie. ``Human:`` and ``Assistant:`` mark the turns of the prompt.
    `model` is the author, and the annotator is "gpt-4". The format does not keep the order shown.

    Rejected, as a whole: a rank that is not a number from 1, an empty answer, the same answer at two ranks.
    """
    need(row, "prompt", "answers")
    answers = [need(item, "answer", "rank") for item in elements(row, "answers")]
    return Ranking(
        tuple(turns_of(row["prompt"], "prompt", "user")),
        source="nectar",
        candidates=tuple(
            Candidate(text(item, "answer"), text(item, "model", optional=True), "model") for item in answers
        ),
        ranks=dense_ranks(number(item["rank"], "rank", 1, 1000) for item in answers),
        annotator="gpt-4",
    )


# ---- PRISM -----------------------------------------------------------------------------------------------------------


def _detect_prism(head: Beginning) -> str | None:
    if head.all_have("conversation_history"):
        return "its rows have a `conversation_history`"
    if head.all_have("interaction_id", "user_prompt", "model_response", "if_chosen"):
        return "its rows have `user_prompt`, `model_response` and `if_chosen`"
    return None


def _sample_answer(said: str, model: str, score: int, chosen: bool) -> dict[str, Any]:
    return {"turn": 0, "role": "model", "content": said, "model_name": model, "score": score, "if_chosen": chosen}


_PRISM_SAMPLE = as_jsonl(
    {
        "conversation_id": "c1",
        "user_id": "user1",
        "conversation_history": [
            {"turn": 0, "role": "user", "content": "Name a fruit."},
            _sample_answer("Pear.", "m1", 90, True),
            _sample_answer("Car.", "m2", 10, False),
        ],
    }
)


_PRISM_LEFT_OUT = ("opening_prompt", "performance_attributes", "choice_attributes", "open_feedback")


@PUBLISHED.row("prism", suffixes=JSON, sample=_PRISM_SAMPLE, detect=_detect_prism, left_out=_PRISM_LEFT_OUT)
def prism(row: Any, *, by: Literal["score", "chosen"] = "score") -> Iterator[Record | BadRecord]:
    """PRISM conversations.jsonl: rows {user_id, conversation_history[{turn, role, content, score, if_chosen}]}.

    Ranks: the highest `score` is rank 1 and equal scores are a tie, or by choice the answer with which the person went
    on is 1 and all others are 2. Each turn is a ranking of the answers that several models gave to it; its prompt goes
    on with the chosen answer of each turn before. `user_id` is the annotator, `model_name` the author, and `score` (1
    to 100) stays with the answer. The order shown is not kept. The questions after the conversation
    (`performance_attributes`, `choice_attributes`, `open_feedback`) are left out.

    Args:
        by: score: the ranks follow `score`. chosen: they follow `if_chosen`.

    Rejected, each turn for itself: a chosen answer that scores below another, a missing score, fewer than two distinct
    answers; turns after one without a chosen answer. Rows of utterances.jsonl lack the turns before: import
    conversations.jsonl.
    """
    if isinstance(row, dict) and "model_response" in row:
        raise BadRecord("a row of utterances.jsonl: the turns before are not in it", "", "Import conversations.jsonl.")
    need(row, "conversation_history")
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
    candidates = (
        Candidate(text(item, "content"), text(item, "model_name", optional=True), "model", score)
        for item, score in zip(answers, scores)
    )
    better = [-score for score in given] if by == "score" else [not pick for pick in picked]
    return Ranking(
        tuple(prompt),
        source="prism",
        candidates=tuple(candidates),
        ranks=dense_ranks(better),
        annotator=annotator,
    )
