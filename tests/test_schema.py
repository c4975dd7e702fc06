"""The schema: what a record may be, its ids, and its JSON form."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from rows import DEMONSTRATION, RANKING, records

from rlhf.data.jsonl import from_dict, to_dict
from rlhf.data.schema import (
    KINDS,
    BadRecord,
    Candidate,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    content_hash,
    dense_ranks,
)


@settings(max_examples=200, deadline=None, database=None)
@given(records())
def test_any_record_comes_back_from_its_json_form(record):
    row = json.loads(json.dumps(to_dict(record)))
    assert from_dict(row) == record
    assert from_dict(row, record.kind).id == record.id


@settings(max_examples=50, deadline=None, database=None)
@given(records())
def test_the_id_depends_on_the_content_and_not_on_where_it_stands(record):
    moved = replace(record, source="elsewhere", group="g", split="test")
    assert (moved.id, moved.prompt_id) == (record.id, record.prompt_id)
    longer = (*record.messages, Message("assistant", "?"), Message("user", "!"))
    assert replace(record, messages=longer).prompt_id != record.prompt_id


# ---- records -------------------------------------------------------------------------------------------------------


def test_the_prompt_id_is_the_documented_hash():
    prompt = from_dict({"prompt": "Hallo, Wörld"})
    assert prompt.prompt_id == content_hash([["user", "Hallo, Wörld"]]) == prompt.id
    # printf '[[["user","Hallo, Wörld"]]]' | sha256sum: written out, so that a change of the rule is noticed
    assert prompt.prompt_id == "67e476eb9fd8cfdd"


def test_a_prompt_has_one_id_in_all_three_kinds():
    bare, shown, ranked = from_dict({"prompt": "Name a fruit."}), from_dict(DEMONSTRATION), from_dict(RANKING)
    assert bare.prompt_id == shown.prompt_id == ranked.prompt_id
    assert len({bare.id, shown.id, ranked.id}) == 3


def test_a_record_survives_pickle_and_copy_with_its_id():
    record = from_dict(RANKING)
    before = record.id
    assert pickle.loads(pickle.dumps(record)).id == copy.deepcopy(record).id == before


def test_ranks_are_made_dense_however_the_record_is_built():
    candidates = (Candidate("a"), Candidate("b"), Candidate("c"))
    built = Ranking((Message("user", "?"),), candidates=candidates, ranks=(2, 7, 7))
    read = from_dict({"prompt": "?", "candidates": ["a", "b", "c"], "ranks": [1, 2, 2]})
    assert built.ranks == read.ranks == (1, 2, 2)
    assert built.id == read.id
    assert built.informative_pairs == 2


def test_dense_ranks_keep_order_and_ties():
    assert dense_ranks([0.5, -1.0, 0.5, 9.0]) == (2, 1, 2, 3)
    assert dense_ranks([]) == ()


def test_a_candidate_may_hold_its_own_rank():
    candidates = [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}, {"text": "c", "rank": 2}]
    assert from_dict({"prompt": "?", "candidates": candidates}).ranks == (2, 1, 2)
    with pytest.raises(BadRecord, match="ranks: not one for each"):
        from_dict({"prompt": "?", "candidates": [*candidates, "d"]})


def test_with_split_changes_the_split_alone():
    record = from_dict(RANKING)
    assert record.with_split("eval").split == "eval"
    assert record.with_split("eval").id == record.id
    with pytest.raises(BadRecord, match="split"):
        record.with_split("dev")


def test_empty_and_null_optional_fields_are_the_same():
    full = {**RANKING, "source": "", "group": "", "split": "", "time": "", "annotator": ""}
    null = dict.fromkeys(("source", "group", "split", "time", "annotator")) | RANKING
    assert from_dict(full) == from_dict(null) == from_dict(RANKING)


def test_nul_and_line_separators_are_text_like_any_other():
    odd = "a\x00b\u2028c\r\nd"
    assert from_dict(json.loads(json.dumps(to_dict(from_dict({"prompt": odd}))))).messages[0].content == odd


# ---- faults --------------------------------------------------------------------------------------------------------

DEEP: list = []
for _ in range(200_000):
    DEEP = [DEEP]

FAULTS = [
    ([1], "not an object"),
    ("text", "not an object"),
    (None, "not an object"),
    ({}, "messages: none"),
    ({"messages": []}, "messages: none"),
    ({"messages": 7}, "messages: none"),
    ({"messages": DEEP}, "messages: not a list of"),
    ({"messages": ["hello"]}, "messages: not a list of"),
    ({"messages": [{"role": "human", "content": "x"}]}, "messages.role: not one of"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.role: not one of"),
    ({"messages": [{"role": "user"}]}, "messages.content: not text"),
    ({"prompt": "  \n"}, "messages.content: empty"),
    ({"prompt": "\ud800"}, "messages.content: not valid Unicode"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "must end with a user"),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, "two turns in a row"),
    ({"messages": [{"role": r, "content": "a"} for r in ("user", "system", "user")]}, "allowed only first"),
    ({**DEMONSTRATION, "answer": None}, "answer: not text"),
    ({**DEMONSTRATION, "answer": ""}, "answer: empty"),
    ({**DEMONSTRATION, "author": 3}, "author: not text"),
    ({**DEMONSTRATION, "split": "dev"}, "split: not one of"),
    ({**DEMONSTRATION, "source": ["x"]}, "source: not text"),
    ({**DEMONSTRATION, "id": "0000"}, "id: not the content hash"),
    ({**DEMONSTRATION, "prompt_id": 12}, "prompt_id: not the content hash"),
    ({**RANKING, "candidates": None}, "candidates: fewer than two answers"),
    ({**RANKING, "candidates": ["a"], "ranks": [1]}, "candidates: fewer than two answers"),
    ({**RANKING, "candidates": ["a", 3], "ranks": [1, 2]}, "candidates: not text or an object"),
    ({**RANKING, "candidates": ["a", " "], "ranks": [1, 2]}, "candidates.text: empty"),
    ({**RANKING, "candidates": ["a", "a"], "ranks": [1, 1]}, "fewer than two distinct"),
    ({**RANKING, "candidates": ["a", "b", "a"], "ranks": [1, 2, 2]}, "identical candidates have different ranks"),
    ({**RANKING, "candidates": ["a", {"text": "b", "author_kind": "robot"}], "ranks": [1, 2]}, "author_kind"),
    ({**RANKING, "candidates": ["a", {"text": "b", "score": float("nan")}], "ranks": [1, 2]}, "not a finite number"),
    ({**RANKING, "candidates": ["a", {"text": "b", "score": 1e999}], "ranks": [1, 2]}, "not a finite number"),
    ({**RANKING, "candidates": ["a", {"text": "b", "score": 10**400}], "ranks": [1, 2]}, "not a finite number"),
    ({**RANKING, "candidates": ["a", {"text": "b", "score": True}], "ranks": [1, 2]}, "not a finite number"),
    ({**RANKING, "candidates": ["a", {"text": "b", "score": "5"}], "ranks": [1, 2]}, "not a finite number"),
    ({"prompt": "?", "candidates": ["a", "b"], "ranks": [1]}, "ranks: not one for each"),
    ({"prompt": "?", "candidates": ["a"]}, "candidates: fewer than two"),
    ({**RANKING, "seconds": -1}, "seconds: not a number from 0"),
    ({**RANKING, "shown": "yes"}, "shown: not true or false"),
    ({**RANKING, "weight": 0}, "weight: not a number above 0"),
    ({**RANKING, "weight": float("inf")}, "weight: not a number above 0"),
    ({**RANKING, "merged": "abc"}, "merged: not a list of ids"),
    ({**RANKING, "merged": [1]}, "merged: not a list of ids"),
    ({**RANKING, "ranks": [1, 2]}, "ranks: not one for each"),
    ({**RANKING, "ranks": [0, 1, 2]}, "ranks: not whole numbers from 1"),
    ({**RANKING, "ranks": [1.0, 2.0, 3.0]}, "ranks: not whole numbers from 1"),
    ({**RANKING, "ranks": [True, 2, 3]}, "ranks: not whole numbers from 1"),
    ({**RANKING, "time": "yesterday"}, "time: not ISO 8601"),
    ({**RANKING, "time": 1700000000}, "time: not text"),
    ({**RANKING, "annotator": "\udfff"}, "annotator: not valid Unicode"),
]


@pytest.mark.parametrize(("row", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_a_faulty_row_is_refused_with_a_reason_that_holds_no_value_of_the_row(row, reason):
    with pytest.raises(BadRecord) as caught:
        from_dict(row)
    assert reason in caught.value.reason
    assert len(str(caught.value)) < 300, "a message stays short whatever the row holds"


def test_rows_with_one_fault_in_different_places_share_their_reason():
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    reasons = set()
    for index in range(3):
        broken = copy.deepcopy(turns)
        broken[index]["content"] = ""
        with pytest.raises(BadRecord) as caught:
            from_dict({"messages": broken})
        reasons.add(caught.value.reason)
        assert str(index) in caught.value.detail
    assert reasons == {"messages.content: empty"}


@pytest.mark.parametrize("needed", sorted(KINDS))
@pytest.mark.parametrize("row", [{"prompt": "?"}, DEMONSTRATION, RANKING], ids=["prompt", "demonstration", "ranking"])
def test_a_row_of_another_kind_is_refused_rather_than_cut_down(row, needed):
    kind = from_dict(row).kind
    if kind == needed:
        assert from_dict(row, needed).kind == needed
    else:
        with pytest.raises(BadRecord, match=f"a {kind} where a {needed} is needed"):
            from_dict(row, needed)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Prompt(()),
        lambda: Prompt([Message("user", "x")]),
        lambda: Prompt((Message("user", ""),)),
        lambda: Demonstration((Message("user", "x"),)),
        lambda: Ranking((Message("user", "x"),), candidates=(Candidate("a"),), ranks=(1,)),
        lambda: Ranking((Message("user", "x"),), candidates=(Candidate("a"), Candidate("b")), ranks=[1, 2]),
    ],
)
def test_a_record_built_in_code_is_checked_like_one_that_is_read(build):
    with pytest.raises(BadRecord):
        build()


def test_a_row_without_a_prompt_is_refused_with_the_fields_that_it_has():
    with pytest.raises(BadRecord, match=r"messages: none .the row's fields: 'promt, answer'") as found:
        from_dict({"promt": "Who?", "answer": "I."})
    assert found.value.remedy == "Give the field `prompt` or `messages`."
    with pytest.raises(BadRecord, match=r"fewer than two answers .1.$"):
        from_dict({"prompt": "Who?", "candidates": ["I."]})
