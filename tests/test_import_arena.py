"""The importer of Chatbot Arena: who won, what became the prompt, what is rejected."""

from __future__ import annotations

import csv

import pytest
from imports import assistant, by_rank, made, one, read, said, user, vote
from rows import jsonl

from data_tools.importers.table import detect
from data_tools.published.arena import VOTES


@pytest.mark.parametrize(
    ("winner", "ranks"),
    [("model_a", (1, 2)), ("model_b", (2, 1)), ("tie", (1, 1)), ("tie (bothbad)", (1, 1)), ("both_bad", (1, 1))],
)
def test_the_winner_of_an_arena_vote_is_named_or_there_is_a_tie(tmp_path, winner, ranks):
    row = vote(winner, judge="u1", tstamp=0.0, turn=1, toxic_chat_tag={"roberta-large": {"flagged": False}})
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "chatbot-arena"
    record = one(tmp_path, "chatbot-arena", row)
    assert (record.ranks, [c.text for c in record.candidates]) == (ranks, ["Car.", "Pear."])
    assert [candidate.author for candidate in record.candidates] == ["ma", "mb"]
    assert (record.annotator, record.time, record.shown) == ("u1", "1970-01-01T00:00:00+00:00", True)


def test_gpt_4_as_the_judge_of_mt_bench_is_a_list_and_may_contradict_itself(tmp_path):
    record = one(tmp_path, "chatbot-arena", vote("tie (inconsistent)", judge=["gpt-4", "pair-v2"], turn=1))
    assert (record.ranks, record.annotator, record.shown) == ((1, 1), "gpt-4 pair-v2", False)


def test_the_table_of_the_competition_is_read_as_it_is(tmp_path):
    path = tmp_path / "train.csv"
    lists = ['["Fruit?"]', '["Car."]', '["Pear."]']
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "model_a", "model_b", "prompt", "response_a", "response_b", *VOTES])
        for votes in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]):
            table.writerow([1, "ma", "mb", *lists, *votes])
        table.writerow([1, "ma", "mb", lists[0], "[null]", lists[2], 0, 1, 0])
    assert detect([path])[0] == "chatbot-arena"
    records, rejects = read("chatbot-arena", path)
    assert [record.ranks for record in records] == [(1, 2), (2, 1), (1, 1)]
    assert (said(records[0]), records[0].candidates[1].author) == ([("user", "Fruit?")], "mb")
    assert [reject.reason for reject in rejects] == [
        "winner_model_a, winner_model_b, winner_tie: not one of them is 1", "response_a: a reply is null",
    ]  # fmt: skip


def test_both_bad_is_a_tie_or_a_reject_by_choice_and_an_unknown_winner_a_reject(tmp_path):
    rows = [vote("both_bad"), vote("tie (bothbad)"), vote("tie"), vote("model_c"), vote("")]
    records, reasons = made(tmp_path, "chatbot-arena", *rows, both_bad="reject")
    assert [record.ranks for record in records] == [(1, 1)]
    assert reasons[:2] == ["winner: both are bad"] * 2
    assert all(reason.startswith("winner: not one of") for reason in reasons[2:])


def test_a_vote_on_several_turns_is_rejected_or_counts_for_the_first_answers_by_choice(tmp_path):
    row = vote("model_b", turn=2)
    for side, text in (("a", "Bus."), ("b", "Plum.")):
        row[f"conversation_{side}"] = [*row[f"conversation_{side}"], user("Another?"), assistant(text)]
    assert made(tmp_path, "chatbot-arena", row)[1] == ["a vote on several turns: the earlier answers differ"]
    assert by_rank(one(tmp_path, "chatbot-arena", row, turns="first")) == {1: ["Pear."], 2: ["Car."]}
    assert by_rank(one(tmp_path, "chatbot-arena", {**row, "turn": 1})) == {1: ["Pear."], 2: ["Car."]}
    same = {**row, "conversation_a": [*row["conversation_b"][:3], assistant("Bus.")]}
    record = one(tmp_path, "chatbot-arena", same)
    assert (len(record.messages), by_rank(record)) == (3, {1: ["Plum."], 2: ["Bus."]})


def test_lmarena_has_text_parts_and_votes_after_others_are_rejected(tmp_path):
    row = vote("model_a")
    for side in "ab":
        row[f"conversation_{side}"] = [
            {**turn, "content": [{"type": "text", "text": turn["content"], "image": None}]}
            for turn in row[f"conversation_{side}"]
        ]
    assert by_rank(one(tmp_path, "chatbot-arena", {**row, "full_conversation": [{}]})) == {1: ["Car."], 2: ["Pear."]}
    assert made(tmp_path, "chatbot-arena", {**row, "full_conversation": [{}, {}]})[1] == [
        "a vote after others: the turns before differ"
    ]


def test_the_competitions_rows_hold_lists_in_json_and_three_columns(tmp_path):
    row = {
        "model_a": "ma", "model_b": "mb", "prompt": '["Fruit?"]', "response_a": '["Car."]', "response_b": '["Pear."]',
        "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
    }  # fmt: skip
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "chatbot-arena"
    assert by_rank(one(tmp_path, "chatbot-arena", row)) == {1: ["Pear."], 2: ["Car."]}
    tie = {**row, "winner_model_b": 0, "winner_tie": 1}
    assert one(tmp_path, "chatbot-arena", tie).ranks == (1, 1)
    assert made(tmp_path, "chatbot-arena", {**row, "winner_tie": 1}, {**row, "response_a": "[null]"})[1] == [
        "winner_model_a, winner_model_b, winner_tie: not one of them is 1", "response_a: a reply is null",
    ]  # fmt: skip
