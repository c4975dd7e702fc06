"""Turns of tools: what the schema takes, and prompts that are plain transformers' tokens or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from imports import gpt, human, made
from rows import jsonl
from trl_templates import FOLDER, chat_with

from data_tools.importers import IMPORTERS
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.jsonl import from_dict, to_dict
from rlhf.data.schema import BadRecord, Demonstration, Message, Prompt
from rlhf.data.selection import with_system
from rlhf.data.tool_turns import as_transformers

WEATHER = {"name": "weather", "description": "Of a place", "parameters": {"type": "object", "properties": {
    "place": {"type": "string", "description": "where"}}, "required": ["place"]}}  # fmt: skip
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"name": "weather", "arguments": {"place": "Bonn"}, "id": "call00001"}
TURNS = (
    Message("tools", json.dumps(TOOLS)),
    Message("system", "Be brief."),
    Message("user", "Weather in Bonn?"),
    Message("assistant", "I look."),
    Message("tool_calls", json.dumps([CALL])),
    Message("tool", "Rain"),
)
IN_TRANSFORMERS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Bonn?"},
    {
        "role": "assistant", "content": "I look.", "tool_calls": [
            {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"place": "Bonn"}}},
        ],
    },
    {"role": "tool", "content": "Rain", "name": "weather", "tool_call_id": "call00001"},
]  # fmt: skip


def test_turns_of_tools_have_the_form_that_transformers_documents() -> None:
    assert as_transformers(TURNS) == (IN_TRANSFORMERS, TOOLS)
    two = Message("tool_calls", json.dumps([{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]))
    chat, tools = as_transformers([TURNS[2], two, Message("tool", "1"), Message("tool", "2"), Message("user", "So?")])
    assert [(turn["role"], turn.get("name"), turn["content"]) for turn in chat] == [
        ("user", None, "Weather in Bonn?"), ("assistant", None, ""), ("tool", "a", "1"), ("tool", "b", "2"),
        ("user", None, "So?"),
    ]  # fmt: skip
    assert tools is None


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "gptoss", "lfm2_v2", "gemma4"])
def test_a_prompt_with_tools_is_the_tokens_of_apply_chat_template(name: str) -> None:
    chat = chat_with((FOLDER / f"{name}.jinja").read_text("utf-8"))
    options = {"tools": TOOLS, "add_generation_prompt": True, "return_dict": False}
    expected = chat.tokenizer.apply_chat_template(IN_TRANSFORMERS, **options)
    assert chat.prompt(TURNS) == expected
    text = chat.tokenizer.decode(expected)
    assert all(word in text for word in ("Of a place", "Bonn", "Rain"))


@pytest.mark.parametrize("name", ["llama3", "phi3", "gemma"])
def test_a_template_without_turns_of_tools_refuses_them_by_name(name: str) -> None:
    chat = chat_with((FOLDER / f"{name}.jinja").read_text("utf-8"))
    with pytest.raises(RefusedText) as refused:
        chat.prompt([turn for turn in TURNS if turn.role != "system"])
    assert refused.value.reason == "the chat template does not write turns of tools"
    assert chat.prompt(TURNS[2:3])


def test_a_tools_text_that_spells_a_control_token_stays_text() -> None:
    chat = chat_with((FOLDER / "qwen2_5.jinja").read_text("utf-8"))
    token = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    spelled = [*TURNS[:5], Message("tool", "Rain<|im_end|>")]
    spelled[4] = Message("tool_calls", json.dumps([{**CALL, "arguments": {"place": "<|im_end|>"}}]))
    assert chat.prompt(spelled).count(token) == chat.prompt(TURNS).count(token)
    assert chat.tokenizer.decode(chat.prompt(spelled)).count("<|im_end|>") > chat.prompt(TURNS).count(token)


def test_a_record_keeps_turns_of_tools_and_its_id() -> None:
    record = Demonstration(TURNS, answer="It rains.")
    assert from_dict(json.loads(json.dumps(to_dict(record)))) == record
    assert with_system(Prompt(TURNS[:1] + TURNS[2:3]), "S").messages[:2] == (TURNS[0], Message("system", "S"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([TURNS[2], TURNS[0], TURNS[2]], "the definitions of tools are allowed only first"),
        ([TURNS[2], Message("tool", "Rain")], "a tool's result without a call"),
        ([TURNS[4], Message("tool", "Rain")], "calls of tools without a turn to answer before them"),
        ([TURNS[2], Message("tool_calls", "weather()"), TURNS[5]], "tool_calls that are not the JSON of a list"),
        ([Message("tools", "[]"), TURNS[2]], "tools that are not the JSON of a list"),
        ([TURNS[2], TURNS[4]], "must end with a user turn"),
    ],
)
def test_turns_of_tools_out_of_place_are_no_record(turns: list[Message], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        Prompt(tuple(turns))


def test_calls_in_the_form_of_openai_are_not_lost_from_a_record() -> None:
    turn = {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "1"}]}
    with pytest.raises(BadRecord, match="tool_calls in a turn"):
        from_dict({"messages": [{"role": "user", "content": "a"}, turn, {"role": "user", "content": "b"}]})


# ---- importers -------------------------------------------------------------------------------------------------------

OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bonn?"},
        {
            "role": "assistant", "content": "I look.", "tool_calls": [
                {"id": "call00001", "type": "function", "function": {
                    "name": "weather", "arguments": '{"place": "Bonn"}',
                }},
            ],
        },
        {"role": "tool", "tool_call_id": "call00001", "content": "Rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": TOOLS,
}  # fmt: skip
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        human("Weather in Bonn?"),
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "Bonn"}}'},
        {"from": "observation", "value": "Rain"},
        gpt("It rains."),
    ],
    "tools": json.dumps([WEATHER]),
}
AS_TEXT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": {"query": "Bonn"}}},
    {"role": "function", "name": "weather", "content": "Rain"},
    {"role": "assistant", "content": "It rains."},
]


def parsed(record: Prompt) -> list[tuple[str, object]]:
    return [
        (m.role, json.loads(m.content) if m.role in ("tools", "tool_calls") else m.content) for m in record.messages
    ]


def test_kept_tools_are_part_of_the_prompt_and_a_call_is_counted(tmp_path: Path) -> None:
    call = "a call of a tool is no answer to learn"
    (record,), reasons = made(tmp_path, "openai-chat", OPENAI, tools="keep")
    assert (parsed(record), record.answer, reasons) == (parsed(Prompt(TURNS)), "It rains.", [call])
    (record,), reasons = made(tmp_path, "sharegpt", SHAREGPT, tools="keep")
    no_id = {name: CALL[name] for name in ("name", "arguments")}
    expected = [("tools", TOOLS), *TURNS[1:3], ("tool_calls", [no_id]), TURNS[5]]
    assert (parsed(record), record.answer, reasons) == (expected, "It rains.", [call])
    (record,), _ = made(tmp_path, "openai-chat", {"messages": AS_TEXT}, tools="keep", turns="last")
    assert parsed(record)[1:] == [
        ("tool_calls", [{"name": "weather", "arguments": {"query": "Bonn"}}]),
        ("tool", "Rain"),
    ]


def test_pairs_keep_turns_of_tools_in_their_prompt(tmp_path: Path) -> None:
    openai = {
        "input": {"messages": OPENAI["messages"][:4], "tools": TOOLS},
        "preferred_output": [{"role": "assistant", "content": "It rains."}],
        "non_preferred_output": [{"role": "assistant", "content": "Sun."}],
    }
    sharegpt = {**SHAREGPT, "conversations": SHAREGPT["conversations"][:-1], "chosen": gpt("It rains."),
                "rejected": "Sun."}  # fmt: skip
    called = {**openai, "preferred_output": OPENAI["messages"][2:3]}
    asked = OPENAI["messages"][:4]
    better, worse = ([{"role": "assistant", "content": text}] for text in ("It rains.", "Sun."))
    trl = {"prompt": asked, "chosen": better, "rejected": worse, "tools": TOOLS}
    silent = [{name: value for name, value in turn.items() if value != "I look."} for turn in asked]
    whole = {"chosen": silent + better, "rejected": silent + worse, "tools": json.dumps(TOOLS)}
    formats = ("openai-preference", "sharegpt-preference", "trl-preference", "trl-preference")
    for name, row in zip(formats, (openai, sharegpt, trl, whole)):
        (record,), reasons = made(tmp_path, name, row, tools="keep")
        assert ([c.text for c in record.candidates], record.ranks, reasons) == (["It rains.", "Sun."], (1, 2), [])
        roles = [message.role for message in record.messages]
        assert (roles[0], roles[-2:]) == ("tools", ["tool_calls", "tool"])
        assert parsed(record)[0] == ("tools", TOOLS)
        assert made(tmp_path, name, row)[0] == [], "they are rejected unless the option says otherwise"
    records, (reason,) = made(tmp_path, "openai-preference", called, tools="keep")
    assert (records, reason) == ([], "preferred_output: a tool call or a tool's turn")
    records, (reason,) = made(tmp_path, "trl-preference", {**trl, "chosen": OPENAI["messages"][2:3]}, tools="keep")
    assert (records, reason) == ([], "chosen: not one answer of the assistant")


def test_calls_and_results_that_cannot_be_kept_are_rejected(tmp_path: Path) -> None:
    other = [*OPENAI["messages"][:3], {"role": "tool", "tool_call_id": "x", "content": "Rain"}, *OPENAI["messages"][4:]]
    bare = [{**AS_TEXT[1], "function_call": {"name": "weather", "arguments": "Bonn"}}]
    rows = [{"messages": other}, {"messages": [AS_TEXT[0], *bare, *AS_TEXT[2:]]}, {**OPENAI, "tools": [{"type": "f"}]}]
    records, reasons = made(tmp_path, "openai-chat", *rows, tools="keep")
    assert records == []
    assert reasons == [
        "messages: a tool's result that is not in its call's place",
        "messages: a call of a tool that is not {name, arguments}", "tools: not one list of tools with a name each",
    ]  # fmt: skip


def test_kept_chats_without_tools_are_as_ever(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", [{"messages": OPENAI["messages"][:2] + OPENAI["messages"][4:]}])
    found = [list(IMPORTERS.pick({"name": "openai-chat", "tools": tools})(path, print)) for tools in ("keep", "reject")]
    assert found[0] == found[1] != []
