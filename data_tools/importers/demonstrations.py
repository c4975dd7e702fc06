"""Importers of demonstrations and of prompts: Alpaca, Dolly, ShareGPT, OpenAI chats, FLAN, doccano, plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.importers.pairs import sharegpt_chat
from data_tools.published.table import Detect, FileHead, any_of, are, file_format, row_format, rows_have
from data_tools.reading.fields import (
    OPENAI,
    RIGHT_FORMAT,
    SHAREGPT,
    TurnForm,
    alpaca_prompt,
    chat,
    is_list_of,
    is_tool_turn,
    joined,
    need,
    text,
    text_if_any,
)
from data_tools.reading.turns import tool_definitions, tool_fields, turns_with_tools
from rlhf.data.jsonl import READ_ERRORS, OnReject, Reject, open_bytes
from rlhf.data.schema import BadRecord, Demonstration, Message, Prompt, Record, brief

# ---- one answer a row ------------------------------------------------------------------------------------------------


def _texts(*fields: str, unless: Callable[[Any], Any]) -> Detect:
    """Recognises rows in which these fields are text, and for which `unless` does not hold."""
    return rows_have(*fields, where=lambda row: are(str, *fields)(row) and not unless(row))


THUMBS = ("label", "kto_tag")
"""What the field of a thumbs up (true) or down (false) is called."""


def has_thumb(row: dict[str, Any]) -> bool:
    """Whether the row is a thumbs up or down for one answer."""
    return any(isinstance(dict.get(row, name), bool) for name in THUMBS)


def _refuse_thumbs(row: dict[str, Any]) -> None:
    if has_thumb(row):
        raise BadRecord("a thumbs up or down for one answer", remedy="Import the file as kto.")


@row_format(
    "alpaca", "instruction", "output", detect=_texts("instruction", "output", unless=has_thumb), left_out=("text",)
)
def alpaca(row: Any) -> Demonstration:
    """Alpaca demonstrations: rows {instruction, input, output}.

    The prompt is `instruction` and, after a blank line, `input`, after `system` and `history` where the row has them
    (LLaMA-Factory); the answers in `history` are no demonstrations. `text`, which repeats all of it in the template of
    Stanford's Alpaca, is left out. Nothing is ranked.

    Rejected: an empty output, an output that is a list (import it as alpaca-ranked), a missing field.
    """
    _refuse_thumbs(row)
    if isinstance(row["output"], list):
        raise BadRecord("output: a list", remedy="Rows of ranked answers are imported as alpaca-ranked.")
    return Demonstration(tuple(alpaca_prompt(row)), source="alpaca", answer=text(row, "output"))


@row_format(
    "dolly",
    "instruction",
    "response",
    detect=rows_have("instruction", "context", "response", where=are(str, "instruction", "context", "response")),
)
def dolly(row: Any) -> Demonstration:
    """Databricks Dolly demonstrations: rows {instruction, context, response, category}, written by people.

    The prompt is `instruction` and, after a blank line, `context`; `category` is the group. Nothing is ranked.

    Rejected: an empty response, a missing field.
    """

    prompt = joined(text(row, "instruction"), text_if_any(row, "context"))
    group = text_if_any(row, "category") or None
    return Demonstration((Message("user", prompt),), source="dolly", group=group, answer=text(row, "response"))


FLAN_FIELDS = (("inputs", "targets"), ("input", "target"), ("prompt", "completion"))


@row_format("flan", detect=any_of(*(_texts(*fields, unless=set(THUMBS).intersection) for fields in FLAN_FIELDS)))
def flan(row: Any) -> Demonstration:
    """FLAN-style demonstrations: rows {inputs, targets}, {input, target} or {prompt, completion}, all of them text.

    `task` (or `task_name`, as FLAN writes it) is the group. Nothing is ranked.

    Rejected: an empty target, a missing field, thumbs up or down (a `label` of true or false): a bad answer is no
    demonstration.
    """
    _refuse_thumbs(need(row))
    for prompt, answer in FLAN_FIELDS:
        if row.get(prompt) is not None and row.get(answer) is not None:
            group = text_if_any(row, "task") or text_if_any(row, "task_name") or None
            asked = (Message("user", text(row, prompt)),)
            return Demonstration(asked, source="flan", group=group, answer=text(row, answer))
    raise BadRecord("neither inputs and targets, nor input and target, nor prompt and completion", "", RIGHT_FORMAT)


# ---- chats -----------------------------------------------------------------------------------------------------------

Turns = Literal["all", "last"]
Tools = Literal["reject", "cut", "keep"]
CALL_REMEDY = "Nothing is wrong: it is part of the prompts after it."
ANSWERING = {name for name, role in SHAREGPT.roles.items() if role == "assistant"}


def _up_to_tools(turns: Any, tools: Tools, form: TurnForm = OPENAI) -> Any:
    """The turns, or by choice those up to the last answer before the first turn that calls a tool or is one's."""
    if tools != "cut" or not is_list_of(dict, turns):
        return turns
    at = next((i for i, turn in enumerate(turns) if is_tool_turn(turn, form)), None)
    if at is None:
        return turns
    answered = [i for i, turn in enumerate(turns[:at], 1) if turn.get(form.role) in ANSWERING]
    if not answered:
        raise BadRecord("no answer before the first turn of a tool", f"turn {at}", "Leave the chat out.")
    return turns[: answered[-1]]


def _demonstrations(
    turns: list[Message], which: Turns, source: str, left_out: frozenset[int] = frozenset()
) -> Iterator[Record | BadRecord]:
    """One demonstration for every turn of the assistant that is to be learned, with the turns before as the prompt.

    Args:
        left_out: Indices of the assistant's turns that are not to be learned.
    """
    calling = [i for i, turn in enumerate(turns) if turn.role == "tool_calls" and i not in left_out]
    left_out = left_out.union(i - 1 for i in calling)  # what the assistant says with a call
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i not in left_out]
    answers = answers[-1:] if which == "last" else sorted([*answers, *calling])
    if not answers:
        raise BadRecord("no turn of the assistant to learn", remedy="Leave the chat out, or import it as prompts.")
    for i in answers:
        try:
            if turns[i].role == "tool_calls":
                raise BadRecord("a call of a tool is no answer to learn", f"turn {i}", CALL_REMEDY)
            if not any(turn.role == "user" for turn in turns[:i]):
                raise BadRecord("an answer with no user turn before it", f"turn {i}", "Cut the chat's beginning.")
            yield Demonstration(tuple(turns[:i]), source=source, answer=turns[i].content)
        except BadRecord as fault:
            yield fault
    if turns[-1].role != "assistant":
        yield BadRecord(
            "the chat ends without an answer", f"turn {len(turns) - 1}", "Cut its end, or have it answered."
        )


@row_format(
    "sharegpt",
    "conversations",
    detect=rows_have("conversations", where=lambda row: not row.keys() & {"chosen", "rejected", *THUMBS}),
    left_out=tool_fields,
)
def sharegpt(row: Any, *, turns: Turns = "all", tools: Tools = "reject") -> Iterator[Record | BadRecord]:
    """ShareGPT and Vicuna chats: rows {conversations[{from: human | gpt, value}]}, each gpt turn a demonstration.

    `system` is a first turn where the row has one. Nothing is ranked.

    Args:
        turns: all: every turn of the assistant is a demonstration, with what was said before as its prompt, as those
            who train on such chats learn from all of them. last: only the last one.
        tools: What becomes of a chat with a turn that calls a tool or is a tool's. reject: it is a reject as a whole.
            cut: the chat ends with its last answer before that turn, and the definitions of its tools are left out.
            keep: such turns and the definitions are part of the prompts; a call itself is no answer to learn, and is
            counted as a reject. Stages reject the prompts where the model's chat template does not write them.

    Rejected: a chat with a tool's turn or an unknown role, as a whole; else each answer for itself: an empty one, one
    with no user's turn before it, one after two turns of one speaker; a last turn without an answer.
    """
    _refuse_thumbs(row)
    row["conversations"] = _up_to_tools(row["conversations"], tools, SHAREGPT)
    return _demonstrations(sharegpt_chat(row, tools == "keep"), turns, "sharegpt")


def _ends_with_assistant(row: dict[str, Any]) -> bool:
    last = row["messages"][-1:] if isinstance(row["messages"], list) else []
    answered = is_list_of(dict, last) and any(turn.get("role") == "assistant" for turn in last)
    return answered and not row.keys() & {"chosen", "candidates", "answer", *THUMBS}


@row_format(
    "openai-chat",
    "messages",
    detect=rows_have(
        "messages", where=_ends_with_assistant, why="its rows have `messages` that end with the assistant"
    ),
    left_out=tool_fields,
)
def openai_chat(row: Any, *, turns: Turns = "all", tools: Tools = "reject") -> Iterator[Record | BadRecord]:
    """OpenAI fine-tuning chats: rows {messages[{role, content}]}, each turn of the assistant a demonstration.

    A `developer` message is a system turn. An assistant's message with `weight` 0 is part of the prompt of later ones
    and no demonstration, as it is for OpenAI; so is one with `loss_weight` 0 of LLaMA-Factory v1, whose contents are
    lists of {type: text, value}. Nothing is ranked.

    Args:
        turns: all: every turn of the assistant is a demonstration, with what was said before as its prompt, as OpenAI
            learns from all of them. last: only the last one; for files that hold a row for each turn already.
        tools: What becomes of a chat with a turn that calls a tool or is a tool's. reject: it is a reject as a whole.
            cut: the chat ends with its last answer before that turn, and the definitions of its tools are left out.
            keep: such turns and the definitions are part of the prompts; a call itself is no answer to learn, and is
            counted as a reject. Stages reject the prompts where the model's chat template does not write them.

    Rejected: a chat with a tool's turn or call, an unknown role or something else than text, as a whole; else each
    answer for itself: an empty one, one with no user's turn before it, one after two turns of one speaker; a last turn
    without an answer. Also thumbs up or down (a `label` of true or false): a bad answer is no demonstration.
    """
    _refuse_thumbs(row)
    given = _up_to_tools(row["messages"], tools)
    if tools == "keep" and is_list_of(dict, given):
        before = tool_definitions(row)
        said, places = turns_with_tools(given, "messages", OPENAI)
    else:
        before, said = [], chat(given, "messages")
        places = list(range(len(said)))
    unlearned = frozenset(i for i, at in enumerate(places, len(before)) if _weight(given[at]) == 0)
    return _demonstrations([*before, *said], turns, "openai-chat", unlearned)


def _weight(turn: dict[str, Any]) -> Any:
    """What a message's answer counts in the loss: `weight` of OpenAI, `loss_weight` of LLaMA-Factory v1."""
    return turn.get("weight", turn.get("loss_weight"))


# ---- doccano ---------------------------------------------------------------------------------------------------------


def _detect_doccano(head: FileHead) -> str | None:
    if not head.all_have("text", "label") or not all(isinstance(row["label"], list) for row in head.rows):
        return None
    labels = [label for row in head.rows for label in row["label"]]
    long = [label for label in labels if isinstance(label, str) and len(label.split()) > 3]
    return "its rows have a `text`, and `label` lists whole sentences" if 2 * len(long) > len(labels) else None


@row_format("doccano", detect=_detect_doccano)
def doccano(row: Any) -> Iterator[Record | BadRecord]:
    """doccano: sequence-to-sequence exports (JSON or JSONL), {text, label: [answers]}, as demonstrations.

    doccano has no ranks: each answer of `label` becomes a demonstration of its own. A text without an answer is one
    reject. Exports of classification projects look the same, with labels in place of answers: `auto` takes only files
    whose answers are mostly of four words or more. A CSV export is read by
    `csv --option prompt=text --option answer=label`.
    """
    if not isinstance(row, dict) or not isinstance(row.get("label", []), list):
        raise BadRecord("not an object with a text and a list of answers", brief(row))
    if not row.get("label"):
        raise BadRecord("the text has no answer", remedy="Nothing is wrong: nobody has written one yet.")
    for answer in row["label"]:
        try:
            yield Demonstration((Message("user", row.get("text")),), source="doccano", answer=answer)  # type: ignore[arg-type]
        except BadRecord as fault:
            yield fault


# ---- plain text ------------------------------------------------------------------------------------------------------

TEXT = (".txt", ".txt.gz", ".txt.zst")


def _detect_text(head: FileHead) -> str | None:
    plain = head.path.name.lower().endswith(TEXT) and not head.rows and head.text.strip()
    return "its name ends in .txt and it is no JSON" if plain else None


@file_format("text", suffixes=TEXT, detect=_detect_text)
def plain_text(path: Path, reject: OnReject, *, unit: Literal["line", "paragraph"] = "line") -> Iterator[Record]:
    """Plain text prompts, one a line. Nothing is ranked.

    Args:
        unit: line: every line that is not blank is a prompt. paragraph: lines up to a blank one are one prompt.

    Rejected: text that is not UTF-8, a damaged compressed file.
    """
    line = 0
    try:
        with open_bytes(path) as file:
            for line, raw in _units(file, unit):
                try:
                    said = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                    yield Prompt((Message("user", said),), source="text")
                except UnicodeDecodeError as error:
                    fault = BadRecord("not UTF-8", f"at byte {error.start}", "Save the file as UTF-8.")
                    reject(Reject.of(path, line, fault, raw))
                except BadRecord as fault:
                    reject(Reject.of(path, line, fault, raw))
    except READ_ERRORS as error:
        remedy = "Download the file again; the rows before the damage were read."
        fault = BadRecord("damaged: the rest of the file cannot be read", str(error), remedy)
        reject(Reject.of(path, line + 1, fault, ""))


def _units(file: Any, unit: str) -> Iterator[tuple[int, bytes]]:
    """The prompts, each with the line that it begins on."""
    begin, lines = 0, []
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            if lines:
                yield begin, b"".join(lines)
            lines = []
            continue
        begin = begin if lines else number
        lines.append(raw)
        if unit == "line":
            yield begin, raw
            lines = []
    if lines:
        yield begin, b"".join(lines)
