"""What the importers of dataset formats share: fields of a row, checked, turns of a chat, and a prompt's parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, NamedTuple

from data_tools.reading.unread import SYSTEM_FIELDS
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking, brief

Role = Literal["system", "user", "assistant", "tools", "tool_calls", "tool"]


class TurnForm(NamedTuple):
    """How a format writes a turn of a chat."""

    roles: Mapping[str, Role]
    """The format's word for a role -> the schema's."""
    role: str = "role"
    content: str = "content"
    """The names of a turn's two fields: who speaks, what is said."""


OPENAI = TurnForm({"system": "system", "developer": "system", "user": "user", "assistant": "assistant"})
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
SHAREGPT = TurnForm(_SHAREGPT_ROLES, "from", "value")
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
TOOL_PARTS = ("tool_call", "tool_calls", "tool_use", "tool_result", "tools")
"""Types of a turn's parts that call a tool or give what it returned."""
TOOL_REMEDY = (
    "Only text can be learned from; leave such chats out, or (openai-chat, sharegpt) --option tools=keep or cut, "
    "(trl-preference, openai-preference, sharegpt-preference) --option tools=keep."
)
RIGHT_FORMAT = "Is this the right format name? `rlhf data formats` shows a sample of each."


def without_nulls(value: Any, depth: int = 10) -> Any:
    """The value, without the fields of its objects that are null: Arrow gives every row all fields of all rows.

    Objects deeper than `depth` stay as they are.
    """
    if isinstance(value, dict) and depth:
        return {name: without_nulls(inner, depth - 1) for name, inner in value.items() if inner is not None}
    if isinstance(value, list) and depth:
        return [without_nulls(inner, depth - 1) for inner in value]
    return value


def is_list_of(kind: type | tuple[type, ...], value: Any) -> bool:
    """Whether it is a list of values of a type."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def is_number(value: Any, low: float = -1e300, high: float = 1e300) -> bool:
    """Whether it is a number from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def need(row: Any, *names: str) -> dict[str, Any]:
    """The row, which must be an object in which these fields are there and not null.

    Raises:
        BadRecord: It is not, with the first missing field in the reason.
    """
    if not isinstance(row, dict):
        raise BadRecord("not an object", type(row).__name__, RIGHT_FORMAT)
    for name in names:
        if row.get(name) is None:
            raise BadRecord(f"{name}: missing", remedy=RIGHT_FORMAT)
    return row


def text(row: Mapping[str, Any], name: str) -> str:
    """A field that must be text.

    Raises:
        BadRecord: It is missing or no text.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRecord(f"{name}: not text", type(value).__name__)
    return value


def text_if_any(row: Mapping[str, Any], name: str) -> str:
    """A field that must be text; empty where it is missing or null.

    Raises:
        BadRecord: It is no text.
    """
    return "" if row.get(name) is None else text(row, name)


def elements(row: Mapping[str, Any], name: str) -> list[Any]:
    """A field that must be a list.

    Raises:
        BadRecord: It is not.
    """
    value = row.get(name)
    if not isinstance(value, list):
        raise BadRecord(f"{name}: not a list", type(value).__name__, RIGHT_FORMAT)
    return value


def number(value: Any, name: str, low: float, high: float) -> float:
    """The value, which must be a number from `low` to `high`.

    Raises:
        BadRecord: It is not.
    """
    if not is_number(value, low, high):
        raise BadRecord(f"{name}: not a number from {low} to {high}", brief(value))
    return value


def one_of(value: Any, name: str, allowed: Collection[int]) -> int:
    """The value, which must be one of these labels.

    Raises:
        BadRecord: It is not.
    """
    if not is_number(value) or value not in allowed:
        raise BadRecord(f"{name}: not one of {', '.join(map(str, allowed))}", brief(value))
    return int(value)


def ranks_of_two(second_is_better: float) -> tuple[int, int]:
    """Ranks of the first and the second answer: negative = the first is better, 0 = a tie, positive = the second."""
    return (1, 1) if second_is_better == 0 else (1, 2) if second_is_better < 0 else (2, 1)


def ranking(
    source: str,
    prompt: str | Iterable[Message],
    answers: Iterable[str],
    ranks: Iterable[int],
    *,
    authors: Iterable[str] | None = None,
    kind: Literal["model", "person", "unknown"] = "unknown",
    scores: Iterable[float | None] | None = None,
    group: str = "",
    **facts: Any,
) -> Ranking:
    """A ranking.

    Args:
        prompt: Its turns, or the text of its only one.
        authors: Of the answers, who are all of that `kind`.
        scores: Of the answers.
        group: Empty where there is none.
        facts: Other fields of the record.

    Raises:
        BadRecord: It is not valid.
    """
    turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    candidates = tuple(map(Candidate, answers, authors or repeat(""), repeat(kind), scores or repeat(None)))
    return Ranking(turns, source, group or None, candidates=candidates, ranks=tuple(ranks), **facts)


def chat(value: Any, name: str, form: TurnForm = OPENAI) -> list[Message]:
    """The turns of a chat. What a turn says is text, or a list of text parts, which are joined by a line break.

    Args:
        value: A list of objects.
        form: How the format writes a turn.

    Raises:
        BadRecord: It is not such a list, a role is unknown, or a turn is a tool's, calls one, or holds more than text.
    """
    if not is_list_of(dict, value):
        raise BadRecord(f"{name}: not a list of turns", brief(value), RIGHT_FORMAT)
    return [_turn(turn, f"at index {index}", name, form) for index, turn in enumerate(value)]


def is_tool_turn(turn: Mapping[str, Any], form: TurnForm = OPENAI) -> bool:
    """Whether a turn of a chat calls a tool, or is what the tool returned."""
    if turn.get(form.role) in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        return True
    parts = turn.get(form.content)
    return isinstance(parts, list) and any(isinstance(part, dict) and part.get("type") in TOOL_PARTS for part in parts)


def _turn(turn: dict[str, Any], where: str, name: str, form: TurnForm) -> Message:
    roles, speaker, said = form.roles, turn.get(form.role), turn.get(form.content)
    if is_tool_turn(turn, form):
        raise BadRecord(f"{name}: a tool call or a tool's turn", where, TOOL_REMEDY)
    if not isinstance(speaker, str) or speaker not in roles:
        raise BadRecord(f"{name}: a role that is not one of {', '.join(roles)}", f"{where}: {brief(speaker)}")
    if isinstance(said, list) and said and all(isinstance(part, dict) and part.get("type") == "text" for part in said):
        said = "\n".join(text(part, "text" if "text" in part else "value") for part in said)  # LLaMA-Factory v1: value
    if not isinstance(said, str):
        raise BadRecord(f"{name}: a turn that is not text", f"{where}: {type(said).__name__}")
    return Message(roles[speaker], said)


def answer(turns: list[Message], name: str) -> str:
    """The one turn of the assistant that these turns must be.

    Raises:
        BadRecord: They are not.
    """
    if len(turns) != 1 or turns[0].role != "assistant":
        said = ", ".join(turn.role for turn in turns[:5]) or "none"
        raise BadRecord(f"{name}: not one answer of the assistant", f"turns: {said}", "Keep the last answer only.")
    return turns[0].content


def alpaca_prompt(row: Mapping[str, Any]) -> list[Message]:
    """The prompt of an Alpaca row: `instruction` and, after a blank line, `input`; before it `system` and `history`.

    Raises:
        BadRecord: A field is of the wrong type.
    """
    return whole_prompt(row, [Message("user", joined(text(row, "instruction"), text_if_any(row, "input")))])


def whole_prompt(row: Mapping[str, Any], said: list[Message]) -> list[Message]:
    """The prompt, after the turns of the row's `SYSTEM_FIELDS` and `history`, a list of [user, assistant].

    Args:
        said: The turns of the prompt. A system turn with which it begins is not repeated.

    Raises:
        BadRecord: `history` is no such list, or there are two system turns.
    """
    given = {value.strip(): value for name in SYSTEM_FIELDS if (value := text_if_any(row, name)).strip()}
    if said and said[0].role == "system":
        given.setdefault(said[0].content.strip(), said[0].content)
    if len(given) > 1:
        raise BadRecord("two system turns", brief(list(given.values())), "Keep one of them.")
    turns = [] if said and said[0].role == "system" else [Message("system", value) for value in given.values()]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRecord("history: not a list of [user, assistant]", brief(history))
    return turns + exchanges(history) + said


def exchanges(pairs: Iterable[Sequence[str]]) -> list[Message]:
    """The turns of pairs of what the user said and what the assistant answered."""
    return [turn for user, said in pairs for turn in (Message("user", user), Message("assistant", said))]


def joined(*parts: str) -> str:
    """The parts that say something, with a blank line between them."""
    return "\n\n".join(part for part in parts if part.strip())
