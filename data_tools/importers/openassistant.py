"""The importer of OpenAssistant's message trees."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.published.table import any_of, are, file_format, rows_have
from data_tools.reading.annotation_exports import as_raw, person
from data_tools.reading.fields import is_number
from data_tools.reading.rows import in_groups
from data_tools.reading.unread import NestedFields
from rlhf.data.jsonl import Item, OnReject, Reject, from_dict
from rlhf.data.schema import BadRecord, Record, brief

ROLES = {"prompter": "user", "assistant": "assistant"}

READ = {"message_id", "parent_id", "text", "role", "rank", "deleted", "replies", "synthetic", "model_name", "user_id"}
"""Fields of a message that are read."""
LEFT_OUT = ("labels", "emojis", "replies")
"""`labels` are votes on spam, quality, toxicity and the like, merged; `emojis` are counts."""


class _Message(NamedTuple):
    """A message of a tree: its line, what it says, and the keys of itself and of the message it answers."""

    line: int
    key: Any
    parent: Any
    content: dict[str, Any]


@file_format(
    "openassistant",
    detect=any_of(
        rows_have(
            "message_tree_id",
            "prompt",
            where=are(dict, "prompt"),
            why="its rows are trees with a `message_tree_id` and a `prompt`",
        ),
        rows_have(
            "message_id",
            "parent_id",
            "role",
            "text",
            why="its rows are messages with a `message_id`, a `parent_id` and a `role`",
        ),
    ),
)
def openassistant(path: Path, reject: OnReject) -> Iterator[Record]:
    """OpenAssistant: message trees, a tree a row, or flat messages that name their parents.

    Ranks: 0 is the best reply, equal ranks are ties. Every message with two or more ranked replies of the assistant
    becomes one ranking of them; the prompt is the conversation from the first message to this one. The ranks come
    from several people, merged by the project, so no annotator is known; replies are in the file's order, which is
    not the order shown. A synthetic reply's author is its `model_name`, another's the id of the person, where the file
    has it. The group is the tree, so that a split holds it together.

    A reply that nobody ranked, or that was deleted, is no part of a ranking. A message with replies of the assistant
    that cannot make a ranking is one reject (fewer than two that are there and ranked, no rank at all, a deleted or
    missing message before it, a message with a field that is not read and could matter), and so is a tree in which the
    assistant says nothing; its raw text is the message with these replies, not the tree. The votes in `labels` (spam,
    quality, ...) and `emojis` are left out.

    A tree is read whole. Flat messages may come in any order; the file is read twice, first to count the messages of
    every `message_tree_id`: as long as each tree's messages are adjacent, as in the published files, one tree is held
    in memory at a time. Without that field all messages are one tree.
    """
    fields = NestedFields(reject, LEFT_OUT)
    for items in in_groups(path, reject, _tree_of_message):
        line, raw, row = items[0]
        if tree := _tree_of_message(row):
            yield from _rankings(path, reject, list(map(_message, items)), *tree, fields)
            continue
        try:
            messages, group = _of_tree(line, row)
            _check_read(row if "prompt" in row else {}, fields, {"prompt"})
        except BadRecord as fault:
            reject(Reject.of(path, line, fault, raw))
        else:
            yield from _rankings(path, reject, messages, group, fields)


def _tree_of_message(row: Any) -> tuple[str | None] | None:
    """The tree of a flat message; None for any other row."""
    if not isinstance(row, dict) or "message_id" not in row or isinstance(row.get("replies"), list):
        return None
    tree = row.get("message_tree_id")
    return (tree if isinstance(tree, str) else None,)


def _text_or_none(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    return value if isinstance(value, str) and value else None


def _message(item: Item) -> _Message:
    row = item.value
    return _Message(item.line, _text_or_none(row, "message_id"), _text_or_none(row, "parent_id"), row)


def _of_tree(line: int, row: Any) -> tuple[list[_Message], str | None]:
    """The messages of a nested tree, each known by its place, and the tree's id.

    Raises:
        BadRecord: It is no tree.
    """
    root = row.get("prompt", row) if isinstance(row, dict) else None
    if not isinstance(root, dict) or not isinstance(root.get("replies"), list):
        remedy = 'A row is {"message_tree_id", "prompt": {"text", "role", "replies": [...]}}, or a message.'
        raise BadRecord("neither a tree nor a message", brief(row), remedy)
    messages = [_Message(line, 0, None, root)]
    for message in messages:  # grows as it goes: the trees may be deeper than Python's stack
        replies = message.content.get("replies")
        for reply in replies if isinstance(replies, list) else ():
            content = reply if isinstance(reply, dict) else {"text": reply}
            messages.append(_Message(line, len(messages), message.key, content))
    return messages, _text_or_none(row, "message_tree_id") or _text_or_none(root, "message_id")


def _check_read(content: dict[str, Any], fields: NestedFields, read: Collection[str]) -> None:
    row = fields.row({name: value for name, value in content.items() if name not in ("prompt", "replies")})
    row.read.update(read)
    if fault := fields.fault(row):
        raise fault


def _rankings(
    path: Path, reject: OnReject, messages: list[_Message], group: str | None, fields: NestedFields
) -> Iterator[Record]:
    """A ranking or a reject for each message with replies of the assistant, or one reject for the tree."""
    by_key: dict[Any, _Message] = {message.key: message for message in messages if message.key is not None}
    doubled = len(by_key) < sum(message.key is not None for message in messages)
    replies: dict[Any, list[_Message]] = {}
    for message in messages:
        role = message.content.get("role")
        if role == "assistant" or (role != "prompter" and message.parent is not None):
            replies.setdefault(message.parent, []).append(message)
    if not replies:
        fault = BadRecord("the tree has no reply of the assistant", remedy="Nothing is wrong: there is none to rank.")
        reject(Reject.of(path, messages[0].line, fault, _turn_as_raw(messages[:1])))
    for key, given in replies.items():
        before = by_key.get(key)
        try:
            if doubled:
                raise BadRecord("two messages of the tree have one message_id", remedy="Is it in the file twice?")
            for message in given:
                _check_read(message.content, fields, READ)
            yield _ranking(before, given, by_key, group, fields)
        except BadRecord as fault:
            raw = _turn_as_raw([before, *given] if before else given)
            reject(Reject.of(path, (before or given[0]).line, fault, raw))


def _turn_as_raw(messages: list[_Message]) -> bytes:
    """A message and its replies as JSON, without what follows them."""
    plain = [
        {name: value for name, value in message.content.items() if not isinstance(value, (dict, list))}
        for message in messages
    ]
    return as_raw({**plain[0], "replies": plain[1:]})


def _ranking(
    before: _Message | None,
    given: list[_Message],
    by_key: dict[Any, _Message],
    group: str | None,
    fields: NestedFields,
) -> Record:
    conversation = _conversation(before, by_key, fields)
    there = [reply.content for reply in given if not reply.content.get("deleted")]
    if not all(reply.get("role") == "assistant" and isinstance(reply.get("text"), str) for reply in there):
        raise BadRecord("a reply is not a message with a role and text")
    if len(there) < 2:
        raise BadRecord("fewer than two replies", remedy="Nothing is wrong: there is nothing to rank.")
    ranked = [reply for reply in there if reply.get("rank") is not None]
    if len(ranked) < 2:
        raise BadRecord("fewer than two replies are ranked", f"{len(ranked)} of {len(there)}", "They were not judged.")
    ranks = [_rank(reply["rank"]) for reply in ranked]
    row = {"messages": conversation, "candidates": [_candidate(reply) for reply in ranked], "ranks": ranks}
    return from_dict({**row, "group": group, "source": "openassistant"}, "ranking")


def _conversation(last: _Message | None, by_key: dict[Any, _Message], fields: NestedFields) -> list[dict[str, Any]]:
    """The turns from the tree's first message to this one.

    Raises:
        BadRecord: One is missing or deleted, or they go in a circle.
    """
    turns: list[dict[str, Any]] = []
    passed: set[Any] = set()
    while True:
        if last is None:
            raise BadRecord("a message of the conversation is missing", remedy="Is a part of the file missing?")
        if last.key in passed:
            raise BadRecord("the messages answer each other in a circle", brief(last.key))
        if last.content.get("deleted"):
            raise BadRecord("a message of the conversation was deleted", brief(last.key), "Leave the branch out.")
        _check_read(last.content, fields, READ)
        passed.add(last.key)
        role = last.content.get("role")
        role = role if isinstance(role, str) else brief(role)
        turns.append({"role": ROLES.get(role, role), "content": last.content.get("text")})
        if last.parent is None:
            return turns[::-1]
        last = by_key.get(last.parent)


def _rank(value: Any) -> int:
    if not is_number(value, 0, 1e9) or value != int(value):
        raise BadRecord("rank: not a whole number from 0 (best)", brief(value))
    return int(value) + 1


def _candidate(reply: dict[str, Any]) -> dict[str, Any]:
    synthetic = reply.get("synthetic")
    kind = {True: "model", False: "person"}.get(synthetic, "unknown") if isinstance(synthetic, bool) else "unknown"
    author = reply.get("model_name") if kind == "model" else reply.get("user_id")
    return {"text": reply.get("text"), "author": person(author), "author_kind": kind}
