"""Votes on two models' conversations: Chatbot Arena, LMArena, MT-Bench."""

from __future__ import annotations

from typing import Any, Literal

from data_tools.published.table import FileHead, any_of, row_format, rows_have
from data_tools.reading.annotation_exports import person, since_1970
from data_tools.reading.csv_rows import CSV, csv_or_rows
from data_tools.reading.fields import (
    chat,
    elements,
    exchanges,
    is_list_of,
    need,
    number,
    ranking,
    ranks_of_two,
    text,
    text_if_any,
)
from data_tools.reading.judgements import score
from data_tools.reading.rows import JSON
from data_tools.reading.turns import from_json_text, shared_turns
from rlhf.data.schema import BadRecord, Message, Ranking, brief

TIE, BOTH_BAD = ("tie", "tie (inconsistent)"), ("tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad")
WINNERS = {"model_a": -1, "model_b": 1, **dict.fromkeys(TIE + BOTH_BAD, 0)}
VOTES = {"winner_model_a": "model_a", "winner_model_b": "model_b", "winner_tie": "tie"}
"""The three columns of 0 and 1 of the competition's files -> the winner."""


def is_competition_table(text: str) -> bool:
    """Whether CSV text begins with the columns of the competition's train.csv."""
    return {"prompt", "response_a", "response_b", *VOTES} <= set(
        text.split("\n")[0].strip().replace('"', "").split(",")
    )


def _detect_table(head: FileHead) -> str | None:
    if not (head.path.name.endswith(CSV) and is_competition_table(head.text)):
        return None
    return f"it is a table with the columns `response_a`, `response_b` and {', '.join(f'`{name}`' for name in VOTES)}"


@row_format(
    "chatbot-arena",
    detect=any_of(
        _detect_table,
        rows_have("conversation_a", "conversation_b", "winner"),
        rows_have("response_a", "response_b", *VOTES),
    ),
    suffixes=JSON + CSV,
    left_out=("toxic_chat_tag",),
    read=csv_or_rows,
)
def chatbot_arena(
    row: Any, *, turns: Literal["reject", "first"] = "reject", both_bad: Literal["tie", "reject"] = "tie"
) -> Ranking:
    """Chatbot Arena, LMArena and MT-Bench votes: rows {conversation_a, conversation_b, winner, model_a, model_b, ...}.

    Ranks: `winner` model_a or model_b names the better conversation, tie is a tie, and so are tie (bothbad) and
    both_bad. So is tie (inconsistent): GPT-4 as the judge of MT-Bench, which preferred another answer in the other
    order. Also read is train.csv of the Kaggle competition (lmsys-arena-human-preference-55k: `prompt`, `response_a`
    and `response_b`, each the JSON of a list, and `winner_model_a`, `winner_model_b`, `winner_tie`, which does not say
    whether both were bad).

    Checked against the dataset card of lmsys/mt_bench_human_judgments, FastChat's compute_agreement.py (ties, `judge`
    as a list), the card of lmsys/lmsys-arena-human-preference-55k and the competition's description of its columns.

    The prompt is the turns with which both conversations begin, up to the `turn` that was judged. `judge` is the
    annotator, `model_a` and `model_b` are the authors, `tstamp` is the time, `language` the group. Arena shows model_a
    on the left; MT-Bench, whose rows have no `tstamp`, does not keep the order shown. Moderation tags are left out.

    Args:
        turns: What becomes of a vote on several turns, where the models' earlier answers differ, so that the last
            answers have no common prompt. reject: a reject. first: the vote counts for the first answers that differ,
            though the person judged the whole.
        both_bad: What becomes of tie (bothbad). tie: neither answer is better, which is a tie. reject: a reject, so
            that ties are between answers that may both be good.

    Rejected: another winner (error, of MT-Bench), conversations with different questions, a vote whose earlier turns
    are only in `full_conversation`, equal or empty answers, null answers, images.
    """
    winner = _winner(row)
    if winner in BOTH_BAD and both_bad == "reject":
        raise BadRecord("winner: both are bad", winner, "Nothing is wrong: --option both_bad=tie keeps such votes.")
    conversations = [_conversation(row, side) for side in ("a", "b")]
    same = shared_turns(conversations)
    first, second = (said[same:] for said in conversations)
    if [turn for turn in first if turn.role != "assistant"] != [turn for turn in second if turn.role != "assistant"]:
        raise BadRecord("the conversations have different questions", remedy="Leave the row out.")
    context = sum(turn.role == "user" for turn in conversations[0])
    if len(first) > 1 and turns == "reject":
        remedy = "Leave it out, or let the vote count for the first answers: --option turns=first"
        raise BadRecord("a vote on several turns: the earlier answers differ", f"{context} questions", remedy)
    whole = row.get("full_conversation")
    if isinstance(whole, list) and len(whole) > context:
        remedy = "Nothing is wrong: such a vote has no common prompt."
        raise BadRecord("a vote after others: the turns before differ", f"{len(whole)} questions", remedy)
    for said in (first, second):
        if not said or said[0].role != "assistant":
            raise BadRecord("a conversation does not end with an answer", brief(said[:1]))
    return ranking(
        "chatbot-arena",
        conversations[0][:same],
        (first[0].content, second[0].content),
        ranks_of_two(WINNERS[winner]),
        authors=[text_if_any(row, name) for name in ("model_a", "model_b")],
        kind="model",
        group=text_if_any(row, "language"),
        annotator=_judge(row.get("judge")),
        time=since_1970(row.get("tstamp"), "tstamp"),
        shown="tstamp" in row,
    )


def _judge(value: Any) -> str:
    """The judge; in MT-Bench's JSON files GPT-4 is a list of its name and the prompt's."""
    return " ".join(map(person, value)) if isinstance(value, list) else person(value)


def _winner(row: Any) -> str:
    need(row)
    if "winner" in row:
        winner = text(row, "winner").strip().lower()
        if winner not in WINNERS:
            raise BadRecord(f"winner: not one of {', '.join(WINNERS)}", brief(row["winner"]))
        return winner
    need(row, "response_a", "response_b", *VOTES)
    ticked = [winner for name, winner in VOTES.items() if number(score(row[name], name), name, 0, 1) == 1]
    if len(ticked) != 1:
        raise BadRecord("winner_model_a, winner_model_b, winner_tie: not one of them is 1", brief(ticked))
    return ticked[0]


def _conversation(row: dict[str, Any], side: str) -> list[Message]:
    """The turns of one side, up to the answer that was judged."""
    if f"conversation_{side}" in row:
        name = f"conversation_{side}"
        said = chat(from_json_text(row[name]), name)
        judged = row.get("turn")
        ends = [at for at, turn in enumerate(said, 1) if turn.role == "assistant"]
        if isinstance(judged, int) and 0 < judged < len(ends):
            said = said[: ends[judged - 1]]
        return said
    parts = {name: from_json_text(row.get(name)) for name in ("prompt", f"response_{side}")}
    lists = {name: [value] if isinstance(value, str) else value for name, value in parts.items()}
    asked, answered = (elements(lists, name) for name in lists)
    if None in answered:
        raise BadRecord(f"response_{side}: a reply is null", f"{len(answered)} replies", "The model gave no answer.")
    if len(asked) != len(answered) or not is_list_of(str, asked + answered):
        raise BadRecord(f"prompt and response_{side}: not as many texts", f"{len(asked)} and {len(answered)}")
    return exchanges(zip(asked, answered))
