"""Argilla exports: who won in every form of a record, whose response it is, and which responses do not count."""

from __future__ import annotations

import json

import pytest
from imports import EXPORTS, by_rank, made, one, read, real, said
from rows import jsonl

from data_tools.importers import IMPORTERS
from data_tools.importers.run import import_dataset
from data_tools.importers.table import read_head

FIELDS = {"prompt": "Name a fruit.", "reply-1": "Car.", "reply-2": "Pear.", "reply-3": "Plum."}


def flat(values, status=None, users=None, question="rank", **more):
    """A record of to_list(flatten=True), and of the Hub."""
    users = users or [f"user-{index}" for index in range(len(values))]
    row = {
        "id": "1",
        "status": "pending",
        "inserted_at": None,
        "updated_at": None,
        "_server_id": None,
        **FIELDS,
        **more,
    }
    responses = {"": values, ".users": users, ".status": status or ["submitted"] * len(values)}
    return row | {f"{question}.responses{name}": value for name, value in responses.items()}


def nested(value, **more):
    """A record of to_list() and to_json."""
    given = [{"value": value, "user_id": "user-0", **more}]
    return {"id": "1", "fields": dict(FIELDS), "metadata": {}, "suggestions": {}, "responses": {"rank": given}}


def of_server(value, status="submitted", **more):
    """A record as the server and 1.x's FeedbackRecord have it."""
    values = None if value is None else {"rank": {"value": value}, "why": {"value": "because"}}
    return {"fields": dict(FIELDS), "responses": [{"values": values, "status": status, "user_id": "user-0", **more}]}


WHICH = "which answers does the question compare?"
NO_ANSWER = "the response names none of the answers and no tie"
ORDER = ["reply-2", "reply-3", "reply-1"]
BY_RANK = {1: ["Pear."], 2: ["Plum."], 3: ["Car."]}


# ---- who won ---------------------------------------------------------------------------------------------------------


def test_a_ranking_lists_the_best_first_in_every_form(tmp_path):
    items = [{"value": name} for name in ORDER]
    old = {**FIELDS, "rank": [{"user_id": "user-0", "value": items, "status": "submitted"}], "external_id": None}
    for row in (flat([ORDER]), nested(ORDER, status="submitted"), of_server(items), of_server(ORDER), old):
        record = one(tmp_path, "argilla", row)
        assert by_rank(record) == BY_RANK
        assert said(record) == [("user", "Name a fruit.")]
        assert (record.annotator, record.source, record.shown) == ("user-0", "argilla", False)


@real
def test_the_documented_values_mean_what_the_tests_of_argilla_say(tmp_path):
    documented = json.loads((EXPORTS / "argilla" / "records_to_list_flatten.documented.json").read_text("utf-8"))
    fields = {"prompt": "Q?", "answer 1": "one", "answer 2": "two", "answer 3": "three"}
    row = {"fields": fields, "responses": {"best": [{"value": documented["ranking_value_v2"], "status": "submitted"}]}}
    assert by_rank(one(tmp_path, "argilla", row)) == {1: ["two"], 2: ["one"], 3: ["three"]}
    row = of_server(documented["ranking_value_v1_server"])
    assert by_rank(one(tmp_path, "argilla", row)) == {1: ["Pear."], 2: ["Car."]}
    assert made(tmp_path, "argilla", documented["rows"][0])[1] == ["no question ranks or rates the record's answers"]


def test_explicit_ranks_of_the_options_win_over_their_order_and_may_tie(tmp_path):
    ranks = {"reply-1": 2, "reply-2": 1, "reply-3": 2}
    items = [{"value": name, "rank": rank} for name, rank in ranks.items()]
    hub = {"value": list(ranks), "rank": list(ranks.values())}
    for value in (items, hub):
        assert by_rank(one(tmp_path, "argilla", of_server(value))) == {1: ["Pear."], 2: ["Car.", "Plum."]}
    unranked = [{"value": name, "rank": None} for name in ORDER]
    assert by_rank(one(tmp_path, "argilla", of_server(unranked))) == BY_RANK


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        (["tie", "reply-1", "reply-2"], (1, 1)),
        (["reply-2", "reply-1", "tie"], (2, 1)),
        (["reply-2", "Both are equal", "reply-1"], (2, 1)),
        (["tie"], (1, 1)),
    ],
)
def test_an_option_of_a_ranking_that_means_a_tie_ties_the_answers_where_it_is_first(tmp_path, order, ranks):
    row = flat([order])
    del row["reply-3"]
    record = one(tmp_path, "argilla", row)
    assert (record.ranks, [c.text for c in record.candidates]) == (ranks, ["Car.", "Pear."])


def test_a_tie_that_is_ranked_among_more_answers_or_as_good_as_one_is_rejected(tmp_path):
    equal = [{"value": name, "rank": rank} for name, rank in (("reply-1", 1), ("tie", 1), ("reply-2", 2))]
    reasons = made(tmp_path, "argilla", flat([["reply-2", "tie", "reply-1", "reply-3"], equal]))[1]
    assert reasons == ["the option that means a tie is ranked among the answers"] * 2


def test_an_answer_that_is_called_like_a_tie_is_an_answer(tmp_path):
    given = [{"value": ["bow", "tie"], "user_id": "u", "status": "submitted"}]
    row = {"fields": {"prompt": "Q?", "tie": "silk", "bow": "wool"}, "responses": {"rank": given}}
    assert by_rank(one(tmp_path, "argilla", row)) == {1: ["wool"], 2: ["silk"]}


def test_higher_ratings_are_better(tmp_path):
    rows = {
        f"score_{i}": [{"user_id": "ann", "value": value, "status": "submitted"}]
        for i, value in ((1, 2), (2, 5), (3, 2))
    }
    record = one(tmp_path, "argilla", {**FIELDS, **rows})
    assert by_rank(record) == {1: ["Pear."], 2: ["Car.", "Plum."]}
    assert [candidate.score for candidate in record.candidates] == [2, 5, 2]
    named = {"fields": {"q": "Q?", "a": "one", "b": "two"}}
    named["responses"] = {name: [{"value": i, "status": "submitted", "user_id": "x"}] for i, name in enumerate("ba")}
    record = one(tmp_path, "argilla", named, prompt="q", question="a,b")
    assert by_rank(record) == {1: ["one"], 2: ["two"]}


def test_ratings_are_put_together_by_person(tmp_path):
    def rated(value, user, status="submitted"):
        return {"user_id": user, "value": value, "status": status}

    row = {
        **FIELDS,
        "score_1": [rated(1, "ann"), rated(5, "ben"), rated(3, "cay")],
        "score_2": [rated(4, "ben", "draft"), rated(2, "ann")],
        "score_3": [],
    }
    row["score_3"] = [rated(3, "dan")]
    records, reasons = made(tmp_path, "argilla", row)
    assert [(record.annotator, by_rank(record)) for record in records] == [("ann", {1: ["Pear."], 2: ["Car."]})]
    assert reasons == ["the response is draft", *["candidates: fewer than two answers"] * 2]


# ---- which responses count -------------------------------------------------------------------------------------------


def test_only_submitted_responses_count(tmp_path):
    row = flat([ORDER, ORDER[::-1], ORDER, ORDER, ORDER[::-1]], ["submitted", "draft", "discarded", None, "submitted"])
    records, reasons = made(tmp_path, "argilla", row)
    assert [(record.annotator, record.ranks) for record in records] == [("user-0", (3, 1, 2)), ("user-4", (1, 3, 2))]
    assert reasons == ["the response is draft", "the response is discarded", "the response has no status"]
    assert len(made(tmp_path, "argilla", row, without_status=True)[0]) == 3


def test_nested_exports_leave_the_status_out_and_say_so(tmp_path):
    assert made(tmp_path, "argilla", nested(ORDER)) == ([], ["the response has no status"])
    assert by_rank(one(tmp_path, "argilla", nested(ORDER), without_status=True)) == BY_RANK


def test_records_that_nobody_answered(tmp_path):
    rows = [
        {**flat([ORDER]), "rank.responses": None},
        flat([]),
        {"id": "1", "fields": FIELDS, "responses": {}},
        {"fields": FIELDS, "responses": []},
        of_server(None, "discarded"),
        of_server({}, "discarded"),
    ]
    records, reasons = made(tmp_path, "argilla", *rows)
    assert records == []
    assert reasons[:4] == ["the record has no response"] * 4
    assert reasons[4] == "the response is discarded"
    assert len(reasons) == 6


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (flat([["reply-2", "ghost"]]), {"question": "rank"}, "an option is none of the record's answers"),
        (flat([["reply-2", "reply-2"]]), {}, "the ranking names an option twice"),
        (flat([["reply-2", "option 2"]]), {}, "two options of the question are one answer"),
        (flat([ORDER[:2]]), {"answers": "reply-1,reply-2,reply-3"}, "the ranking leaves answers out"),
        (flat([ORDER[:1]]), {}, "candidates: fewer than two answers"),
        (flat(["best"], **{"other 1": "x", "other 2": "y", "other 3": "z"}), {"question": "rank"}, WHICH),
        (flat([{}]), {"question": "rank", "answers": "reply-1,reply-2"}, NO_ANSWER),
        (flat(["unsure"]), {"question": "rank", "answers": "reply-1,reply-2"}, NO_ANSWER),
        (flat([3]), {"question": "rank", "answers": "reply-1,reply-2"}, NO_ANSWER),
        (flat([0]), {"question": "rank", "answers": "reply-1,reply-2"}, NO_ANSWER),
        (flat([ORDER]), {"question": "other"}, "the record has no response to the question"),
        (flat([ORDER]), {"prompt": "question"}, "no prompt is found"),
        (flat([ORDER], ["submitted", "submitted"]), {}, "the lists of responses, users and status differ in length"),
        (flat([ORDER], **{"reply-2": ""}), {}, "candidates.text: empty"),
        (of_server([{"value": "reply-1", "rank": 1}, {"value": "reply-2"}]), {}, "some options have no rank"),
        ({"fields": FIELDS, "responses": ["x"]}, {}, "a response is not an object with values"),
        ({"fields": FIELDS, "responses": {"rank": 5}}, {}, "the responses of a question are not a list"),
        ({"id": [1, 2], "rank.responses": [[]]}, {}, "not columns of one length"),
        ({"id": []}, {}, "not columns of one length"),
    ],
)
def test_responses_that_cannot_be_used(tmp_path, row, options, reason):
    assert made(tmp_path, "argilla", row, **options) == ([], [reason])


# ---- questions "which is better" -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ranks"),
    [
        ("reply-2", (2, 1)), ("Reply 2", (2, 1)), ("Response A", (1, 2)), ("Pear.", (2, 1)), ("B is better", (2, 1)),
        ("tie", (1, 1)), ("Both are bad", (1, 1)), (1, (1, 2)), (2, (2, 1)), ("2", (2, 1)),
    ],
)  # fmt: skip
def test_a_value_names_the_better_answer_or_a_tie(tmp_path, value, ranks):
    record = one(tmp_path, "argilla", flat([value]), question="rank", answers="reply-1,reply-2")
    assert record.ranks == ranks
    assert [candidate.text for candidate in record.candidates] == ["Car.", "Pear."]


def test_a_label_question_is_found_where_it_names_answers(tmp_path):
    row = flat(["reply-2", "tie"], question="preference")
    del row["reply-3"]
    records, reasons = made(tmp_path, "argilla", row)
    assert ([record.ranks for record in records], reasons) == ([(2, 1), (1, 1)], [])


def test_a_question_of_any_name_chooses_by_an_answer_but_not_by_a_tie(tmp_path):
    for value, expected in (("reply-2", [(2, 1)]), ("tie", [])):
        row = flat([value], question="mood")
        del row["reply-3"]
        assert [record.ranks for record in made(tmp_path, "argilla", row)[0]] == expected


def test_labels_are_given_a_meaning(tmp_path):
    options = {"question": "rank", "answers": "reply-1,reply-2", "choice_values": "first=reply-1,0=tie"}
    records, _ = made(tmp_path, "argilla", flat(["First", 0]), **options)
    assert [record.ranks for record in records] == [(1, 2), (1, 1)]


# ---- options and forms -----------------------------------------------------------------------------------------------


def test_of_two_ranking_questions_one_is_named(tmp_path):
    row = flat([ORDER]) | {
        f"fun.{name}": value for name, value in (("responses", [ORDER[::-1]]), ("responses.status", ["submitted"]))
    }
    assert made(tmp_path, "argilla", row) == ([], ["several ranking questions"])
    assert by_rank(one(tmp_path, "argilla", row, question="fun"))[1] == ["Car."]


def test_options_that_are_not_called_like_the_fields_are_mapped(tmp_path):
    fields = {"instruction": "Q?", "draft": "one", "final": "two"}
    row = {"fields": fields, "responses": {"x": [{"value": ["B", "A"], "user_id": "u", "status": "submitted"}]}}
    assert made(tmp_path, "argilla", row)[1] == ["no question ranks or rates the record's answers"]
    for answers in ("A=draft,B=final", {"A": "draft", "B": "final"}):
        record = one(tmp_path, "argilla", row, answers=answers)
        assert by_rank(record) == {1: ["two"], 2: ["one"]}
        assert record.shown, "the mapping names the answers in the order shown"


def test_a_chat_field_becomes_the_conversation(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert [text for _, text in said(one(tmp_path, "argilla", flat([ORDER], prompt=chat)))] == ["a", "b", "c"]


def test_to_dict_by_column_and_by_record(tmp_path):
    rows = [flat([ORDER], id="1"), flat([ORDER[::-1]], id="2"), flat([], id="3")]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for whole in (columns, {row["id"]: row for row in rows}):
        records, reasons = made(tmp_path, "argilla", whole)
        assert [record.ranks for record in records] == [(3, 1, 2), (1, 3, 2)]
        assert reasons == ["the record has no response"]


def test_every_form_is_detected(tmp_path):
    old = {**FIELDS, "rank": [{"user_id": "u", "value": [], "status": "submitted"}]}
    for row in (flat([ORDER]), nested(ORDER), of_server(ORDER), old):
        path = tmp_path / "in.json"
        path.write_text(json.dumps([row]), "utf-8")
        assert [name.name for name in IMPORTERS if name.traits["detect"](read_head(path))] == ["argilla"]
        path.write_text(json.dumps([row, {"unrelated": 1}]), "utf-8")
        assert not any(name.traits["detect"](read_head(path)) for name in IMPORTERS)


def test_a_reject_of_a_whole_export_shows_its_record_only(tmp_path):
    rows = [flat([ORDER], id="1"), flat([ORDER], ["draft"], id="2\ud800")]
    path = tmp_path / "in.json"
    path.write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}), "utf-8")
    records, (reject,) = read("argilla", path)
    assert len(records) == 1
    assert '"draft"' in reject.raw
    assert '"submitted"' not in reject.raw
    reject.raw.encode("utf-8")


def test_a_turn_with_a_field_that_is_not_read_is_rejected_and_ignore_takes_it(tmp_path):
    turn = {"role": "user", "content": "Name it.", "images": ["fruit.png"]}
    reason = "prompt.images: not read, and by its name it could hold media"
    for row in (flat([ORDER], prompt=[turn]), flat([ORDER], prompt=[turn], system="Be brief.")):
        assert made(tmp_path, "argilla", row) == ([], [reason])
        file = jsonl(tmp_path / "in.jsonl", [row])
        for name in ("images", "prompt.images", "prompt"):
            summary = import_dataset("argilla", [file], tmp_path / "d", ignored_fields=[name], overwrite=True)
            assert (summary.written, summary.rejected) == (1, 0)
    assert len(made(tmp_path, "argilla", flat([ORDER], prompt=[turn | {"images": []}]))[0]) == 1
