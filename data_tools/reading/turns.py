"""Turns of a chat in every form that a field has them: text, marked transcripts, lists, and JSON inside text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.reading.annotation_exports import PROMPT_FIELDS, brief
from data_tools.reading.fields import OPENAI_ROLES, SHAREGPT_ROLES, Role, before_prompt, chat, joined, text
from rlhf.data.schema import BadRecord, Message

_MARK = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
_LATER = re.compile(r"\n\n(?:Human|Assistant):")
_MARK_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Whether it is text that begins with a turn of a transcript in the marks of HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


def has_later_marks(value: str) -> bool:
    """Whether a turn of a transcript begins inside the text."""
    return bool(_LATER.search(value))


def from_transcript(value: str) -> list[Message]:
    """The turns of text in which a blank line and ``Human:`` or ``Assistant:`` begin a turn.

    Two marks of one speaker in a row are one turn, joined by a blank line. White space around a turn is dropped, and
    so is a last mark with nothing after it, which only asks for the answer.
    """
    _, *parts = _MARK.split(value.strip())
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        role, said = _MARK_ROLES[speaker], said.strip()
        if turns and turns[-1].role == role:
            said = joined(turns.pop().content, said)
        turns.append(Message(role, said))
    return turns[:-1] if turns and not turns[-1].content else turns


def from_json_text(value: Any) -> Any:
    """The list or object whose JSON the text is, or the value itself: other text stays text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and (value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"})


def is_chat(value: Any) -> bool:
    """Whether it is a turn {role, content} or {from, value}, a list of such turns, or an object {messages: list}."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    return _is_turn(value) or (isinstance(value, list) and bool(value) and all(map(_is_turn, value)))


def turns_of(value: Any, name: str, role: Role) -> list[Message]:
    """The turns that a field holds.

    Args:
        value: Text, a transcript in the marks of HH-RLHF, a turn, a list of turns {role, content} or {from, value},
            {messages: list}, or text that is the JSON of one of them.
        name: The field, for messages.
        role: Whose turn plain text is.

    Raises:
        BadRecord: It is something else, or a turn is a tool's or holds more than text.
    """
    read = from_json_text(value)
    if is_chat(read):
        read = read["messages"] if isinstance(read, dict) and "messages" in read else read
        read = read if isinstance(read, list) else [read]
        if "from" in read[0] and "role" not in read[0]:
            return chat(read, name, SHAREGPT_ROLES, "from", "value")
        return chat(read, name, OPENAI_ROLES)
    if not isinstance(value, str):
        return chat(value, name)  # says what is wrong with it
    return from_transcript(value) if is_transcript(value) else [Message(role, value)]


def shared_turns(chats: Sequence[Sequence[Message]]) -> int:
    """Number of turns with which all chats begin, the last turn of each left out."""
    same = 0
    while same < min(map(len, chats)) - 1 and len({said[same] for said in chats}) == 1:
        same += 1
    return same


def prompt_turns(row: Mapping[str, Any]) -> list[Message]:
    """The prompt of a row in whatever field it is: the first of `PROMPT_FIELDS` that says something.

    `instruction` is followed by `input`, after a blank line. Before it come the system turn (`SYSTEM_FIELDS`) and
    `history`, a list of [user, assistant]. None of them: an empty list.

    Raises:
        BadRecord: Two fields could be the prompt and differ, or one has another type.
    """
    there = [name for name in PROMPT_FIELDS if row.get(name) not in (None, "", [])]
    if not there:
        return []
    first, *others = there
    if first == "instruction" and "input" in others:
        said = [Message("user", joined(text(row, "instruction"), text(row, "input")))]
        others.remove("input")
    else:
        said = turns_of(row[first], first, "user")
    if others := [name for name in others if turns_of(row[name], name, "user") != said]:
        remedy = "Import by the mapping: csv --option prompt_template='{" + first + "}\\n\\n{" + others[0] + "}' ..."
        raise BadRecord(f"{first} and {others[0]}: which is the prompt?", brief(row[others[0]]), remedy)
    return [*before_prompt(row, said), *said]
