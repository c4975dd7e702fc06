"""Importers of demonstrations and prompts: what became the prompt and the answer, which rows are set aside."""

from __future__ import annotations

import pytest
from imports import EXPORTS, assistant, gpt, human, made, one, read, real, said, user

# ---- demonstrations and prompts --------------------------------------------------------------------------------------


@real
def test_alpaca_demonstrations_hold_the_output_as_the_answer():
    records, _ = read("alpaca", EXPORTS / "alpaca" / "alpaca_demo.json")
    assert said(records[0]) == [("user", "Describe a process of making crepes.")]
    assert records[0].answer.startswith("Making crepes is an easy and delicious process!")


def test_an_alpaca_prompt_joins_instruction_and_input_after_system_and_history(tmp_path):
    row = {
        "instruction": "Translate.",
        "input": "pear",
        "output": "Birne",
        "system": "Short.",
        "history": [["Hi", "Hello"]],
    }
    record = one(tmp_path, "alpaca", row)
    assert said(record) == [
        ("system", "Short."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Translate.\n\npear"),
    ]
    bad = [
        {**row, **change} for change in ({"output": ["a", "b"]}, {"output": " "}, {"history": [1]}, {"instruction": 1})
    ]
    assert made(tmp_path, "alpaca", *bad)[1] == [
        "output: a list", "answer: empty", "history: not a list of [user, assistant]", "instruction: not text",
    ]  # fmt: skip


def test_dolly_keeps_the_category_as_group(tmp_path):
    row = {"instruction": "What?", "context": "A pear.", "response": "Fruit.", "category": "closed_qa"}
    record = one(tmp_path, "dolly", row)
    assert (said(record), record.answer, record.group) == ([("user", "What?\n\nA pear.")], "Fruit.", "closed_qa")
    assert one(tmp_path, "dolly", {**row, "context": None, "category": ""}).group is None


@pytest.mark.parametrize("fields", [("inputs", "targets"), ("input", "target"), ("prompt", "completion")])
def test_flan_rows_go_by_several_names(tmp_path, fields):
    record = one(tmp_path, "flan", dict(zip(fields, ("Is it?", "yes"))))
    assert (said(record), record.answer) == ([("user", "Is it?")], "yes")


def test_a_thumb_down_is_no_demonstration(tmp_path):
    reason = ["a thumbs up or down for one answer"]
    assert made(tmp_path, "flan", {"prompt": "a", "completion": "b", "label": False})[1] == reason
    assert made(tmp_path, "alpaca", {"instruction": "a", "output": "b", "kto_tag": False})[1] == reason
    assert made(tmp_path, "openai-chat", {"messages": [user("a"), assistant("b")], "label": True})[1] == reason
    assert made(tmp_path, "sharegpt", {"conversations": [human("a"), gpt("b")], "label": False})[1] == reason


@real
def test_every_answer_of_a_sharegpt_chat_is_a_demonstration_unless_the_last_is_asked_for():
    path = EXPORTS / "sharegpt" / "fastchat_dummy_conversation.json"
    records, rejects = read("sharegpt", path)
    assert rejects == []
    assert said(records[0]) == [("user", "Who are you?")]
    assert records[0].answer.startswith("I am Vicuna")
    assert (len(records[1].messages), records[1].answer) == (3, "You too!")
    last, _ = read("sharegpt", path, turns="last")
    assert len(last) == 20 < len(records)
    assert last[0] == records[1]


def test_a_chat_that_begins_or_ends_at_the_wrong_turn_keeps_its_good_answers(tmp_path):
    row = {"conversations": [gpt("zero"), human("a"), gpt("one"), human("b"), gpt(""), human("c")]}
    records, reasons = made(tmp_path, "sharegpt", row)
    assert [record.answer for record in records] == ["one"]
    assert said(records[0]) == [("assistant", "zero"), ("user", "a")]
    assert reasons == [
        "an answer with no user turn before it",
        "answer: empty",
        "the chat ends without an answer",
    ]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([human("a"), {"from": "observation", "value": "b"}], "conversations: a tool call or a tool's turn"),
        ([human("a"), {"from": "cat", "value": "b"}], "conversations: a role that is not one of"),
        ([human("a"), {"from": ["gpt"], "value": "b"}], "conversations: a role that is not one of"),
        ([human("a"), gpt(5)], "conversations: a turn that is not text"),
        (["a", "b"], "conversations: not a list of turns"),
        ([], "no turn of the assistant to learn"),
        ([human("a")], "no turn of the assistant to learn"),
    ],
)
def test_a_chat_that_cannot_be_read_is_rejected_as_a_whole(tmp_path, turns, reason):
    records, reasons = made(tmp_path, "sharegpt", {"conversations": turns})
    assert records == []
    assert [told.startswith(reason) for told in reasons] == [True]


@real
def test_openai_chats_give_a_demonstration_for_every_answer():
    records, rejects = read("openai-chat", EXPORTS / "openai_chat" / "toy_chat_fine_tuning.first3.jsonl")
    assert (len(records), rejects) == (6, [])
    assert records[0].answer == "It's great that you're getting exercise outdoors!"
    assert said(records[0])[0][0] == "system"
    assert (records[4].answer, len(records[4].messages)) == ("It's easy to learn!", 8)


def test_an_answer_of_weight_0_is_context_only(tmp_path):
    row = {"messages": [user("a"), assistant("bad", weight=0), user("b"), assistant("good", weight=1)]}
    record = one(tmp_path, "openai-chat", row)
    assert (record.answer, said(record)[1]) == ("good", ("assistant", "bad"))
    assert made(tmp_path, "openai-chat", {"messages": row["messages"][:2]})[1] == ["no turn of the assistant to learn"]


def test_plain_text_is_a_prompt_a_line_or_a_paragraph(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffName a fruit.\r\n\r\nWrite a poem\nabout rain.\n \n\n".encode())
    records, _ = read("text", path)
    assert [said(record)[0][1] for record in records] == ["Name a fruit.", "Write a poem", "about rain."]
    records, _ = read("text", path, unit="paragraph")
    assert [said(record)[0][1] for record in records] == ["Name a fruit.", "Write a poem\nabout rain."]
    path.write_bytes(b"good\n\nb\xffd\nline\n\nlast")
    for unit, line in (("line", 3), ("paragraph", 3)):
        records, rejects = read("text", path, unit=unit)
        assert [(reject.reason, reject.line) for reject in rejects] == [("not UTF-8", line)]
        assert said(records[-1]) == [("user", "last")]
