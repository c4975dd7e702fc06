"""OpenAssistant trees and messages: rank 0 wins, every turn with ranked replies is a ranking, the rest is told."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter

import pytest
from imports import EXPORTS, by_rank, made, one, read, real, said
from rows import jsonl

OA = "openassistant"
TREES = EXPORTS / OA / "en_100_tree.first20.jsonl"
NESTED = EXPORTS / OA / "en_100_message.first20.jsonl"


def message(name, *replies, role=None, **fields):
    role = role or ("assistant" if name[0] == "a" else "prompter")
    return {"message_id": name, "text": f"Text of {name}.", "role": role, "replies": list(replies), **fields}


def tree(root, name="t1"):
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}


def flattened(*trees):
    """The messages of trees one by one, as the flat export has them."""
    messages = []

    def add(node, name, parent):
        messages.append({**node, "parent_id": parent, "message_tree_id": name})
        for reply in messages[-1].pop("replies"):
            add(reply, name, node["message_id"])

    for row in trees:
        add(row["prompt"], row["message_tree_id"], None)
    return messages


def answers(*ranks):
    return [message(f"a{index}", rank=rank) for index, rank in enumerate(ranks)]


def contents(records):
    """Who won, whatever the order of the records and of the candidates."""
    return Counter(
        (record.messages, record.group, frozenset(zip(record.candidates, record.ranks))) for record in records
    )


# ---- authentic trees -------------------------------------------------------------------------------------------------


@real
def test_in_authentic_trees_rank_0_wins_every_turn():
    records, rejects = read(OA, TREES)
    assert (len(records), Counter(reject.reason for reject in rejects)) == (35, {"fewer than two replies": 12})
    first = records[0]
    assert said(first) == [("user", "How can I find the best 401k plan for my needs?")]
    assert first.candidates[first.ranks.index(1)].text.startswith("The first step is to research your options.")
    assert {(candidate.author, candidate.author_kind) for candidate in first.candidates} == {("chip20b", "model")}
    assert first.group == "054e1df3-35e0-4bb8-a585-607dbdcd24e0"
    assert (first.annotator, first.shown) == ("", False)
    wanted = {}
    for line in TREES.read_text("utf-8").splitlines():
        messages = [json.loads(line)["prompt"]]
        for node in messages:
            messages += node["replies"]
            ranked = [reply for reply in node["replies"] if reply.get("rank") is not None]
            if len(ranked) > 1:
                wanted[node["text"]] = {reply["text"]: reply["rank"] + 1 for reply in ranked}
    found = {
        record.messages[-1].content: dict(zip((c.text for c in record.candidates), record.ranks)) for record in records
    }
    assert found == wanted


@real
def test_both_nested_exports_and_flat_messages_give_the_same_rankings(tmp_path):
    trees = [json.loads(line) for line in TREES.read_text("utf-8").splitlines()]
    records, rejects = read(OA, TREES)
    nested, _ = read(OA, NESTED)
    assert nested == records
    messages = flattened(*trees)
    flat, flat_rejects = read(OA, jsonl(tmp_path / "flat.jsonl", messages))
    assert (contents(flat), len(flat_rejects)) == (contents(records), len(rejects))
    random.Random(0).shuffle(messages)
    (tmp_path / "mixed.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "mixed.jsonl", messages).read_bytes()))
    mixed, mixed_rejects = read(OA, tmp_path / "mixed.jsonl.gz")
    assert (contents(mixed), len(mixed_rejects)) == (contents(records), len(rejects))
    without = [{**row, "message_tree_id": None} for row in messages]
    assert len(read(OA, jsonl(tmp_path / "without.jsonl", without))[0]) == len(records)


# ---- what makes a ranking --------------------------------------------------------------------------------------------


def test_the_prompt_is_the_conversation_up_to_the_ranked_replies(tmp_path):
    later = message("p2", message("a7", rank=1), message("a8", rank=0))
    records, reasons = made(tmp_path, OA, tree(message("p1", message("a1", later, rank=0), message("a2", rank=1))))
    assert reasons == []
    assert [text for _, text in said(records[1])] == ["Text of p1.", "Text of a1.", "Text of p2."]
    assert [by_rank(record)[1] for record in records] == [["Text of a1."], ["Text of a8."]]
    assert {record.group for record in records} == {"t1"}


def test_authors_are_models_or_people(tmp_path):
    replies = [
        message("a1", rank=0, synthetic=True, model_name="m"),
        message("a2", rank=1, synthetic=False, user_id="u", model_name=None),
        message("a3", rank=1.0),
    ]
    record = one(tmp_path, OA, tree(message("p1", *replies)))
    assert [(candidate.author, candidate.author_kind) for candidate in record.candidates] == [
        ("m", "model"), ("u", "person"), ("", "unknown"),
    ]  # fmt: skip
    assert record.ranks == (1, 2, 2)


def test_unranked_and_deleted_replies_are_no_part_of_the_ranking(tmp_path):
    replies = [*answers(2, None, 0), message("a9", rank=1, deleted=True)]
    assert by_rank(one(tmp_path, OA, tree(message("p1", *replies)))) == {1: ["Text of a2."], 2: ["Text of a0."]}


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        (message("p1"), "the tree has no reply of the assistant"),
        (message("p1", *answers(0)), "fewer than two replies"),
        (message("p1", message("a1", rank=0), message("a2", rank=1, deleted=True)), "fewer than two replies"),
        (message("p1", *answers(None, None, None)), "fewer than two replies are ranked"),
        (message("p1", *answers(0, None)), "fewer than two replies are ranked"),
        (message("p1", *answers(0, "1")), "rank: not a whole number from 0 (best)"),
        (message("p1", *answers(0, -1)), "rank: not a whole number from 0 (best)"),
        (message("p1", *answers(0, 0.5)), "rank: not a whole number from 0 (best)"),
        (message("p1", *answers(0, 1), deleted=True), "a message of the conversation was deleted"),
        (message("p1", *answers(0, 1), text=""), "messages.content: empty"),
        (message("p1", *answers(0, 1), text=None), "messages.content: not text"),
        (message("p1", *answers(0, 1), "broken"), "a reply is not a message with a role and text"),
        (
            message("p1", *answers(0, 1), message("a5", rank=2, text=None)),
            "a reply is not a message with a role and text",
        ),
        (
            message("p1", *answers(0, 1), message("a5", rank=2, role="bot")),
            "a reply is not a message with a role and text",
        ),
        (
            message("p1", message("a1", rank=0), message("a2", rank=1, text="Text of a1.")),
            "candidates: fewer than two dis",
        ),
    ],
)
def test_turns_without_a_ranking_are_one_reject_each_in_both_forms(tmp_path, root, reason):
    records, (found,) = made(tmp_path, OA, tree(root))
    assert records == []
    assert found.startswith(reason)
    if "broken" not in root["replies"]:
        records, (found,) = made(tmp_path, OA, *flattened(tree(root)))
        assert records == []
        assert found.startswith(reason)


def test_a_message_with_a_field_that_could_matter_spoils_only_what_needs_it(tmp_path):
    pictured = message(
        "a1",
        message("p2", message("a5", rank=0), message("a6", rank=1)),
        rank=1,
        images=["x.png"],
        labels={"quality": {"value": 1}},
    )
    root = message("p1", message("a0", message("p3", message("a7", rank=0), message("a8", rank=1)), rank=0), pictured)
    for rows in ([tree(root)], flattened(tree(root))):
        records, reasons = made(tmp_path, OA, *rows)
        assert reasons == ["images: not read, and by its name it could hold media"] * 2
        assert [r.messages[-1].content for r in records] == ["Text of p3."]
    scored = {**tree(message("p1", *answers(0, 1))), "judgement": {"winner": "a0"}}
    assert made(tmp_path, OA, scored)[1] == ["judgement: not read, and by its name it could hold a judgement"]


def test_a_deleted_message_spoils_only_what_follows_it(tmp_path):
    below = message("p2", *answers(0, 1))
    records, reasons = made(
        tmp_path, OA, tree(message("p1", message("a7", below, rank=0, deleted=True), *answers(1, 0)))
    )
    assert [by_rank(record)[1] for record in records] == [["Text of a1."]]
    assert reasons == ["a message of the conversation was deleted"]


def test_a_reject_shows_the_turn_and_not_the_tree(tmp_path):
    path = jsonl(
        tmp_path / "in.jsonl", [tree(message("p0")), tree(message("p1", message("a1", message("p2"), rank=0)))]
    )
    _, rejects = read(OA, path)
    assert [reject.line for reject in rejects] == [1, 2]
    raw = json.loads(rejects[1].raw)
    assert (raw["message_id"], [reply["message_id"] for reply in raw["replies"]]) == ("p1", ["a1"])
    assert all(reject.remedy for reject in rejects)


@pytest.mark.parametrize("row", [None, 1, "x", {}, {"prompt": "x"}, {"prompt": {}}, {"message_tree_id": "t"}])
def test_what_is_no_tree(tmp_path, row):
    assert made(tmp_path, OA, row) == ([], ["neither a tree nor a message"])


# ---- flat messages ---------------------------------------------------------------------------------------------------


def test_messages_whose_conversation_is_broken(tmp_path):
    whole = flattened(tree(message("p1", message("a7", message("p2", *answers(0, 1)), rank=0))))
    orphans = [row for row in whole if row["message_id"] != "a7"]
    assert made(tmp_path, OA, *orphans) == ([], ["a message of the conversation is missing"])
    circle = [{**row, "parent_id": "p2"} if row["message_id"] == "a7" else row for row in whole]
    assert made(tmp_path, OA, *circle) == ([], ["the messages answer each other in a circle"])
    twice = [*whole, whole[2]]
    assert set(made(tmp_path, OA, *twice)[1]) == {"two messages of the tree have one message_id"}


def test_flat_trees_come_as_soon_as_they_are_whole(tmp_path):
    trees = [tree(message("p1", *answers(0, 1)), f"t{index}") for index in range(3)]
    path = jsonl(tmp_path / "in.jsonl", [*flattened(*trees), *flattened(tree(message("p1", *answers(0)), "t9"))])
    from data_tools.importers import IMPORTERS

    told = []
    records = IMPORTERS.pick(OA)(path, told.append)
    assert next(records).group == "t0"
    assert [record.group for record in records] == ["t1", "t2"]
    assert [(reject.line, reject.reason) for reject in told] == [(10, "fewer than two replies")]


def test_lines_that_are_not_json_are_reported_once(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps(row) for row in flattened(tree(message("p1", *answers(1, 0))))]
    path.write_text("\n".join([*lines, "{", "null"]) + "\n", "utf-8")
    records, rejects = read(OA, path)
    assert [by_rank(record)[1] for record in records] == [["Text of a1."]]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (4, "not valid JSON"),
        (5, "neither a tree nor a message"),
    ]


def test_rejects_of_odd_text_can_be_written(tmp_path):
    _, (reject,) = read(OA, jsonl(tmp_path / "in.jsonl", [tree(message("p1", *answers(0), text="\ud800 ä"))]))
    assert "ä" in reject.raw
    reject.raw.encode("utf-8")
