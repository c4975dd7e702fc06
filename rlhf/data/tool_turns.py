"""Turns of tools in a conversation: the tools' definitions, an assistant's calls, and what the tools returned.

A conversation of {role, content} holds them as turns of three roles:

- `tools`, only first: the definitions, as the JSON of a list of {type: function, function: {name, ...}}.
- `tool_calls`: calls by the assistant, as the JSON of a list of {name, arguments} with an optional `id`. A turn of the
  assistant before it is what the assistant said with the calls.
- `tool`: what a tool returned. Of several, the first answers the first call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

DEFINITIONS, CALLS, RESULT = "tools", "tool_calls", "tool"
TOOL_ROLES = (DEFINITIONS, CALLS, RESULT)


def tool_fault(role: str, content: str, before: str | None) -> tuple[str, str] | None:
    """What is wrong with a turn of a tool role, as reason and detail; None where nothing is.

    Args:
        role, content: The turn.
        before: The role of the turn before it; None if it is the first.
    """
    if role == DEFINITIONS and before is not None:
        return "messages: the definitions of tools are allowed only first", f"after {before}"
    if role == CALLS and before not in ("user", "assistant", RESULT):
        return "messages: calls of tools without a turn to answer before them", f"after {before}"
    if role == RESULT:
        return None if before in (CALLS, RESULT) else ("messages: a tool's result without a call", f"after {before}")
    try:
        items = json.loads(content)
    except (ValueError, RecursionError):
        items = None
    whole = _is_definition if role == DEFINITIONS else _is_call
    if not isinstance(items, list) or not items or not all(map(whole, items)):
        fields = "{type, function: {name}}" if role == DEFINITIONS else "{name, arguments}"
        return f"messages: {role} that are not the JSON of a list of {fields}", content[:60]
    return None


def _is_call(item: Any) -> bool:
    named = isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("arguments"), dict)
    return named and isinstance(item.get("id", ""), str) and item.keys() <= {"name", "arguments", "id"}


def _is_definition(item: Any) -> bool:
    function = item.get("function") if isinstance(item, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def as_transformers(
    messages: Sequence[tuple[str, str]], marked: Callable[[str], str] = str
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The conversation and the tools in the form that `apply_chat_template` takes.

    An assistant's calls are in its turn, whose content is empty where it said nothing besides. A tool's turn has the
    `name` of the tool, and a `tool_call_id` where the call has an `id`.

    Args:
        messages: Role and content of each turn.
        marked: What becomes of each text that comes from the conversation.

    Returns:
        Messages, and definitions of tools; None where the conversation has none.
    """
    chat: list[dict[str, Any]] = []
    tools: list[Any] | None = None
    waiting: list[Any] = []
    for role, content in messages:
        if role == DEFINITIONS:
            tools = _texts(json.loads(content), marked)
        elif role == CALLS:
            waiting = _texts(json.loads(content), marked)
            if not chat or chat[-1]["role"] != "assistant":
                chat.append({"role": "assistant", "content": ""})
            chat[-1]["tool_calls"] = [_call(**call) for call in waiting]
        elif role == RESULT:
            call, *waiting = waiting or [{}]
            names = {"name": call.get("name"), "tool_call_id": call.get("id")}
            said = {"role": role, "content": marked(content)}
            chat.append(said | {name: value for name, value in names.items() if value is not None})
        else:
            chat.append({"role": role, "content": marked(content)})
    return chat, tools


def _call(name: str, arguments: dict[str, Any], id: str | None = None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id is None else {"id": id, **call}


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value, with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _texts(inner, change) for name, inner in value.items()}
    return [_texts(inner, change) for inner in value] if isinstance(value, list) else value


PROBE = (
    (DEFINITIONS, '[{"type": "function", "function": {"name": "probetool", "description": "probing", "parameters": '
     '{"type": "object", "properties": {"word": {"type": "string", "description": "any"}}, "required": ["word"]}}}]'),
    ("user", "Probe."),
    (CALLS, '[{"name": "probecall", "arguments": {"word": "probevalue"}, "id": "probe0001"}]'),
    (RESULT, "proberesult"),
)  # fmt: skip
"""A conversation that shows which turns of tools a template writes."""
SHOWN = {DEFINITIONS: ("probetool",), CALLS: ("probecall", "probevalue"), RESULT: ("proberesult",)}
"""Role -> the words of `PROBE` that its template must write."""


def has_tools(messages: Sequence[tuple[str, str]]) -> bool:
    """Whether a conversation has turns of tools."""
    return any(role in TOOL_ROLES for role, _ in messages)
