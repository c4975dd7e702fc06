"""Turns of a chat in every form that a field has them: text, marked transcripts, lists, and JSON inside text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data_tools.reading.annotation_exports import PROMPT_FIELDS
from data_tools.reading.fields import (
    OPENAI,
    SHAREGPT,
    Role,
    TurnForm,
    chat,
    exchanges,
    is_list_of,
    is_tool_turn,
    joined,
    text,
    whole_prompt,
)
from rlhf.data.schema import BadRecord, Message, brief

_MARK = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
_LATER = re.compile(r"\n\n(?:Human|Assistant):")
begins_with_mark = re.compile(r"\s*(?:Human|Assistant):").match
"""Whether text begins with a turn of a transcript in the marks of HH-RLHF: a match, or None."""
_MARK_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Whether it is text that begins with a turn of a transcript in the marks of HH-RLHF."""
    return isinstance(value, str) and begins_with_mark(value) is not None


def has_later_marks(value: str) -> bool:
    """Whether a turn of a transcript begins inside the text."""
    return bool(_LATER.search(value))


def from_transcript(value: str) -> list[Message]:
    """The turns of text in which a blank line and ``Human:`` or ``Assistant:`` begin a turn.

    Two marks of one speaker in a row are one turn, joined by a blank line. White space around a turn is dropped, and
    so is a last mark with nothing after it, which only asks for the answer.
    """
    turns = spoken(_MARK.split(value.strip())[1:])
    return turns[:-1] if turns and not turns[-1].content else turns


def spoken(parts: Sequence[str]) -> list[Message]:
    """The turns of ``Human`` or ``Assistant`` and what they said, by turns; see `from_transcript`."""
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        role, said = _MARK_ROLES[speaker], said.strip()
        if turns and turns[-1].role == role:
            said = joined(turns.pop().content, said)
        turns.append(Message(role, said))
    return turns


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


def turns_of(value: Any, name: str, role: Role, json_text: bool = True, keep_tools: bool = False) -> list[Message]:
    """The turns that a field holds.

    Args:
        value: Text, a transcript in the marks of HH-RLHF, a turn, a list of turns {role, content} or {from, value},
            {messages: list}, or text that is the JSON of one of them.
        name: The field, for messages.
        role: Whose turn plain text is.
        json_text: Whether text that is JSON is read; else it is text like any other.
        keep_tools: Whether turns of tools are read, as `turns_with_tools` does.

    Raises:
        BadRecord: It is something else, or a turn holds more than text, or is a tool's where these are not read.
    """
    read = from_json_text(value) if json_text else value
    if is_chat(read) or (keep_tools and read and is_list_of(dict, read)):
        read = read["messages"] if isinstance(read, dict) and "messages" in read else read
        read = read if isinstance(read, list) else [read]
        sharegpt = "from" in read[0] and "role" not in read[0]
        return turns_by(read, name, SHAREGPT if sharegpt else OPENAI, keep_tools)
    if not isinstance(value, str):
        return chat(value, name)  # says what is wrong with it
    return from_transcript(value) if is_transcript(value) else [Message(role, value)]


def turns_by(turns: Any, name: str, form: TurnForm, keep_tools: bool) -> list[Message]:
    """The turns of a chat as `chat` reads them, or, where those of tools are kept, as `turns_with_tools` does."""
    if keep_tools and is_list_of(dict, turns):
        return turns_with_tools(turns, name, form)[0]
    return chat(turns, name, form)


def shared_turns(chats: Sequence[Sequence[Message]]) -> int:
    """Number of turns with which all chats begin, the last turn of each left out; outer white space may differ."""
    same = 0
    while same < min(map(len, chats)) - 1 and len({_trimmed(said[same]) for said in chats}) == 1:
        same += 1
    return same


def is_conversation(values: Sequence[Any] | None) -> bool:
    """Whether the first of these values is a chat of several turns, or JSON text of one."""
    read = from_json_text(values[0]) if values else None
    read = read["messages"] if is_chat(read) and isinstance(read, dict) and "messages" in read else read
    return isinstance(read, list) and len(read) > 1 and is_chat(read)


def exchange(prompt: Any, answers: Mapping[str, Any], json_text: bool = True) -> tuple[list[Message], dict[str, str]]:
    """The turns of the prompt, and the text of each answer that says something.

    Args:
        prompt: What `turns_of` takes; a list of texts, what the user said in turn; or empty text, where the answers
            are whole conversations.
        answers: Name -> what `turns_of` takes. To a list of texts each is a list of the replies, null = none.
        json_text: Whether text that is JSON is read.

    Raises:
        BadRecord: A value is none of these, or the answers are conversations that differ before their last turn.
    """
    said_in_turn = from_json_text(prompt) if json_text else prompt
    if said_in_turn and is_list_of(str, said_in_turn):
        chats = {name: _replies(said_in_turn, value, name) for name, value in answers.items()}
        asked = [Message("user", said_in_turn[0])] if len(said_in_turn) == 1 else []
    else:
        there = {name: value for name, value in answers.items() if not _is_empty(value)}
        chats = {name: turns_of(value, name, "assistant", json_text) for name, value in there.items()}
        asked = [] if _is_empty(prompt) else turns_of(prompt, "prompt", "user", json_text)
    marked = is_transcript(prompt)
    chats = {name: said for name, said in chats.items() if said and said[-1].content.strip()}
    if not chats:
        return asked, {}
    same = shared_turns(list(chats.values()))
    shared = next(iter(chats.values()))[:same]
    asked = join_prompt(asked, shared)
    rest = {name: said[same:] for name, said in chats.items()}
    for name, said in rest.items():
        if len(said) != 1 or said[0].role != "assistant":
            raise BadRecord("the answers differ before their last turn", name, "One prompt is needed: cut them there.")
        if marked and has_later_marks(said[0].content):
            raise BadRecord("an answer with a transcript inside", name, "Cut it after its first turn.")
    return asked, {name: said[0].content.strip() if marked else said[0].content for name, said in rest.items()}


def join_prompt(asked: list[Message], shared: list[Message]) -> list[Message]:
    """The prompt of answers that all begin with the turns `shared`, whether or not these repeat `asked`.

    Turns that differ in outer white space only are the same.
    """
    given, repeated = [list(map(_trimmed, turns)) for turns in (asked, shared)]
    if all(turn in repeated for turn in given):
        return shared
    return asked if given[-len(shared) :] == repeated else asked + shared


def _trimmed(turn: Message) -> tuple[str, str]:
    return turn.role, turn.content.strip()


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def _replies(asked: list[str], value: Any, name: str) -> list[Message]:
    """The chat in which a list of replies answers a list of questions; empty where the last reply is missing."""
    replies = from_json_text(value)
    replies = [replies] if isinstance(replies, str) and len(asked) == 1 else replies
    if not isinstance(replies, list) or len(replies) != len(asked):
        raise BadRecord(
            "not as many replies as questions", f"{name}: {brief(value)}", "Write a list of the same length."
        )
    if not isinstance(replies[-1], str):
        return []
    for reply in replies:
        if not isinstance(reply, str):
            raise BadRecord("a reply is no text", f"{name}: {brief(reply)}")
    return exchanges(zip(asked, replies))


def prompt_turns(row: Mapping[str, Any], other: Collection[Any] = ()) -> list[Message]:
    """The prompt of a row in whatever field it is: the first of `PROMPT_FIELDS` that says something.

    `instruction` is followed by `input`, after a blank line. Before it come the system turn (`SYSTEM_FIELDS`) and
    `history`, a list of [user, assistant]. None of them: an empty list.

    Args:
        other: Chats that are no prompt, such as the answers, in whatever field they are repeated.

    Raises:
        BadRecord: Two fields could be the prompt and differ, or one has another type.
    """
    chats = [chat for chat in other if isinstance(chat, list)]
    there = [name for name in PROMPT_FIELDS if row.get(name) not in (None, "", [], *chats)]
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
    return whole_prompt(row, said)


# ---- turns of tools --------------------------------------------------------------------------------------------------

TOOL_FIELDS = ("tools", "functions")
"""What the field with the definitions of a chat's tools is called."""
TOOLS_INSIDE = (*TOOL_FIELDS, "tool_calls", "function_call")
"""Fields in which a name such as query is that of a tool's argument."""


def tool_fields(tools: str, **_: Any) -> tuple[str, ...]:
    """The fields that an importer leaves out by its option `tools`: where turns of tools are rejected, none."""
    return () if tools == "reject" else TOOLS_INSIDE


def turns_with_tools(turns: Sequence[Mapping[str, Any]], name: str, form: TurnForm) -> tuple[list[Message], list[int]]:
    """The turns of a chat with those of tools, as `rlhf.data.tool_turns` has them, and the index of each in `turns`.

    Args:
        turns, name, form: As for `chat`.

    Raises:
        BadRecord: See `chat`; a call is no {name, arguments}; a result's `tool_call_id` is not the call's at its place.
    """
    _, role, content = form
    said: list[Message] = []
    places: list[int] = []
    waiting: list[Any] = []
    for index, turn in enumerate(turns):
        if turn.get(role) in RESULT_ROLES:
            given, *waiting = waiting or [None]
            asked = turn.get("tool_call_id")
            if asked is not None and asked != given:
                remedy = "Put the results in the order of the calls."
                raise BadRecord(f"{name}: a tool's result that is not in its call's place", f"at index {index}", remedy)
            plain = {role: "user", content: turn.get(content)}
            new = [chat([plain], name, TurnForm({"user": "tool"}, role, content))[0]]
        elif is_tool_turn(turn, form):
            calls = _calls(
                turn, f"{name}: a call of a tool that is not {{name, arguments}}", f"at index {index}", content
            )
            waiting = [call.get("id") for call in calls]
            words = turn.get(content) if turn.get(role) not in CALL_ROLES else None
            new = chat([{role: turn.get(role), content: words}], name, form) if words else []
            new.append(Message("tool_calls", _json(calls)))
        else:
            new = chat([dict(turn)], name, form)
        said += new
        places += [index] * len(new)
    return said, places


RESULT_ROLES, CALL_ROLES = ("tool", "function", "observation", "ipython"), ("function_call", "tool_call")


def _calls(turn: Mapping[str, Any], reason: str, where: str, content: str) -> list[dict[str, Any]]:
    """The calls of a turn: `tool_calls` or `function_call` of OpenAI, or the JSON that a ShareGPT turn is."""
    given = turn.get("tool_calls") or turn.get("function_call") or from_json_text(turn.get(content))
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        function = function if isinstance(function, dict) else {}
        arguments = from_json_text(function.get("arguments"))
        arguments = {} if arguments in (None, "") else arguments
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise BadRecord(reason, f"{where}: {brief(given)}")
        calls.append({"name": function["name"], "arguments": arguments})
        if isinstance(call.get("id"), str):
            calls[-1]["id"] = call["id"]
    return calls


def tool_definitions(row: Mapping[str, Any]) -> list[Message]:
    """The turn with the definitions of a chat's tools, in one of `TOOL_FIELDS` as a list or its JSON; none: no turn.

    Raises:
        BadRecord: A definition has no name, or two fields hold some.
    """
    found = [(name, value) for name in TOOL_FIELDS if (value := from_json_text(row.get(name))) not in (None, "", [])]
    if not found:
        return []
    name, value = found[0]
    items = value if isinstance(value, list) else [value]
    inner = [item.get("function", item) if isinstance(item, dict) else None for item in items]
    if len(found) > 1 or not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in inner):
        raise BadRecord(f"{name}: not one list of tools with a name each", brief(value))
    return [Message("tools", _json([{"type": "function", "function": each} for each in inner]))]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
