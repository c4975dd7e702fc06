"""The importer of Potato: who won, what options do, what is rejected."""

from __future__ import annotations

import json

import pytest
from imports import by_rank, made, one, said
from rows import jsonl

from data_tools.importers.table import detect
from rlhf.core.errors import UserError

ITEM = {"id": "i1", "prompt": "Fruit?", "responses": ["Car.", "Pear."]}
ITEM4 = {"id": "i4", "prompt": "Fruit?", "responses": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("item", "judgement", "ranks"),
    [
        (ITEM, {"selection": "B"}, (2, 1)), (ITEM, {"selection": "tie"}, (1, 1)), (ITEM, {"scale_value": "-2"}, (1, 2)),
        (ITEM, {"scale_value": "0"}, (1, 1)), (ITEM, {"scale_value": 3}, (2, 1)),
        (ITEM4, {"rank_order": "B,D=A,C"}, (2, 1, 3, 2)), (ITEM4, {"best": "B", "worst": "D"}, (2, 1, 2, 3)),
    ],
)  # fmt: skip
def test_every_kind_of_comparison_of_potato_names_its_winner(tmp_path, item, judgement, ranks):
    items = jsonl(tmp_path / "items.jsonl", [ITEM, ITEM4])
    row = {"instance_id": item["id"], "user_id": "ann", "labels": {"preference": judgement}, "spans": {}}
    record = one(tmp_path, "potato", row, items=str(items))
    assert (record.ranks, record.annotator, record.shown) == (ranks, "ann", True)
    assert (said(record), len(record.candidates)) == ([("user", "Fruit?")], len(item["responses"]))


def test_a_user_state_of_potato_gives_one_ranking_for_each_item(tmp_path):
    items = jsonl(tmp_path / "items.jsonl", [ITEM, {"id": 2, "prompt": "Tree?", "left": "Oak.", "right": "Bus."}])
    listed = [[{"schema": "preference", "name": "selection"}, "A"]]
    state = {"i1": {"preference": {"selection": "B"}}, "2": listed, "9": listed, "i2": {"mood": {"happy": "true"}}}
    row = {"user_id": "ann", "instance_id_to_label_to_value": state}
    assert detect([jsonl(tmp_path / "in.jsonl", [row])])[0] == "potato"
    records, reasons = made(tmp_path, "potato", row, items=str(items))
    assert [by_rank(record)[1] for record in records] == [["Pear."], ["Oak."]]
    assert reasons == ["instance_id: not in the data file"] * 2


def test_what_potato_leaves_open_is_asked_for_by_name(tmp_path):
    labels = {"fluency": {"selection": "A"}, "overall": {"selection": "B"}}
    row = {**ITEM, "instance_id": "i1", "user_id": "ann", "labels": labels}
    assert made(tmp_path, "potato", row)[1] == ["several questions"]
    assert by_rank(one(tmp_path, "potato", row, question="overall"))[1] == ["Pear."]
    bare = {"instance_id": "i1", "user_id": "ann", "labels": {"overall": {"selection": "B"}}}
    assert made(tmp_path, "potato", bare)[1] == ["no field 'responses' with the answers"]
    bad = [
        {"selection": "C"}, {"scale_value": "much"}, {"rank_order": "A"}, {"best": "A", "worst": "A"}, {"best": "A"},
    ]  # fmt: skip
    rows = [{**row, "labels": {"overall": judgement}} for judgement in bad]
    assert [reason.split(":")[0] for reason in made(tmp_path, "potato", *rows)[1]] == [
        "a label that names no answer", "scale_value", "rank_order", "best and worst", "no judgement",
    ]  # fmt: skip
    (tmp_path / "broken.jsonl").write_text(json.dumps(ITEM) + "\n{", "utf-8")
    with pytest.raises(UserError, match=r"option items: .*broken\.jsonl:2"):
        made(tmp_path, "potato", bare, items=str(tmp_path / "broken.jsonl"))
