"""Label Studio exports: who won, in which order the answers were shown, and which annotations are set aside."""

from __future__ import annotations

import copy
import json

import pytest
from imports import EXPORTS, by_rank, made, one, read, real, said

from data_tools.importers import IMPORTERS
from data_tools.importers.table import read_head
from rlhf.core.errors import UserError

ITEMS = [{"id": name, "title": name.upper(), "body": f"Body of {name}."} for name in ("blog", "mdn", "wiki")]
LS = "label-studio"


def result(value, name="rank", kind="ranker"):
    return {"id": "x", "from_name": name, "to_name": "list", "type": kind, "value": value}


def annotation(*results, **fields):
    return {"id": 1, "completed_by": 3, "was_cancelled": False, "result": list(results), **fields}


def task(*annotations, **data):
    data = {"prompt": "Arrow functions?", "items": copy.deepcopy(ITEMS), **data}
    return {"id": 1, "data": data, "annotations": list(annotations), "predictions": []}


def ranked(ranker, **fields):
    return annotation(result({"ranker": ranker}), **fields)


def pairwise(selected, **data):
    data = data or {"prompt": "Which?", "answer1": "one", "answer2": "two"}
    return {"data": data, "annotations": [annotation(result({"selected": selected}, "pw", "pairwise"))]}


def bodies(*names):
    return [f"Body of {name}." for name in names]


# ---- Ranker ----------------------------------------------------------------------------------------------------------


@real
def test_the_documented_rankings_are_won_by_the_first_of_the_list(tmp_path):
    documented = json.loads((EXPORTS / "label_studio" / "ranker_documented.json").read_text("utf-8"))
    data = {**documented["data"], "prompt": "Arrow functions?"}
    row = {"data": data, "annotations": [annotation(documented["result_without_buckets"])]}
    record = one(tmp_path, LS, row)
    assert by_rank(record)[1][0].startswith("An arrow function expression")
    assert by_rank(record)[3][0].startswith("There is nothing worse")
    row["annotations"] = [annotation(documented["result_with_buckets"])]
    record = one(tmp_path, LS, row, buckets="best,ads")
    assert by_rank(record)[1][0].startswith("An arrow function expression")
    assert by_rank(record)[2][0].startswith("There is nothing worse")
    assert len(record.candidates) == 2, "the third was left in the list"


@pytest.mark.parametrize("ranker", [["mdn", "wiki", "blog"], {"rank": ["mdn", "wiki", "blog"]}])
def test_a_ranker_without_buckets_lists_the_best_first(tmp_path, ranker):
    record = one(tmp_path, LS, task(ranked(ranker)))
    assert [candidate.text for candidate in record.candidates] == bodies("blog", "mdn", "wiki")
    assert record.ranks == (3, 1, 2)
    assert record.shown
    assert record.source == LS


def test_who_when_and_how_long(tmp_path):
    person = {"id": 7, "email": "ann@example.org", "first_name": ""}
    facts = {"completed_by": person, "created_at": "2022-10-31T21:19:19.131290Z", "lead_time": 7.662}
    record = one(tmp_path, LS, task(ranked(["mdn", "wiki", "blog"], **facts)))
    assert (record.annotator, record.time, record.seconds) == (
        "ann@example.org", "2022-10-31T21:19:19.131290Z", 7.662,
    )  # fmt: skip
    assert one(tmp_path, LS, task(ranked(["mdn", "wiki", "blog"], completed_by=0))).annotator == "0"
    later = ranked(["mdn", "wiki", "blog"], completed_by={"id": 5}, updated_at="2022-10-31")
    record = one(tmp_path, LS, task(later))
    assert (record.annotator, record.time, record.seconds) == ("5", "2022-10-31", None)


def test_ids_that_are_numbers_are_in_the_browser_s_order(tmp_path):
    items = [
        {"id": "b", "body": "b"},
        {"id": 10, "body": "ten"},
        {"id": "2", "body": "two"},
        {"id": "007", "body": "7"},
    ]
    record = one(tmp_path, LS, task(ranked(["007", "10", "b", "2"]), items=items))
    assert [candidate.text for candidate in record.candidates] == ["two", "ten", "b", "7"]
    assert record.ranks == (4, 2, 3, 1)


def test_buckets_rank_by_the_order_that_is_given(tmp_path):
    row = task(ranked({"_": [], "bad": ["blog"], "good": ["wiki", "mdn"]}))
    assert one(tmp_path, LS, row, buckets="good,bad").ranks == (2, 1, 1)
    assert one(tmp_path, LS, row, buckets=["bad", "good"]).ranks == (1, 2, 2)
    assert one(tmp_path, LS, row, buckets="good,bad", within_bucket="ranked").ranks == (3, 2, 1)


def test_the_order_of_buckets_is_not_guessed(tmp_path):
    assert made(tmp_path, LS, task(ranked({"good": ["mdn"], "bad": ["blog"]})))[1] == [
        "a bucket has no place in the order"
    ]


def test_what_was_left_in_the_list_is_ranked_only_if_the_list_has_a_place(tmp_path):
    row = task(ranked({"_": ["blog"], "good": ["mdn"], "bad": ["wiki"]}))
    record = one(tmp_path, LS, row, buckets="good,bad")
    assert by_rank(record) == {1: bodies("mdn"), 2: bodies("wiki")}
    assert one(tmp_path, LS, row, buckets="good,_,bad").ranks == (2, 1, 3)


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (task(ranked(["mdn", "wiki"])), {}, "the ranking leaves candidates out"),
        (task(ranked(["mdn", "wiki", "blog", "ghost"])), {}, "the ranking names an unknown candidate"),
        (task(ranked(["mdn", "wiki", "blog", "mdn"])), {}, "the ranking names a candidate twice"),
        (task(ranked(["mdn", {}, None])), {}, "ranker: ids are not text or numbers"),
        (task(ranked("mdn")), {}, "ranker: not a list of ids or an object of buckets"),
        (task(ranked({"_": ["mdn", "wiki", "blog"]})), {}, "no candidate was put into a bucket"),
        (task(ranked({"good": ["mdn"]})), {"buckets": "good"}, "candidates: fewer than two answers"),
        (task(ranked(["mdn"]), items=[{"id": "mdn", "body": "x"}]), {}, "candidates: fewer than two answers"),
        (task(ranked(["a"]), items=ITEMS[:1] * 2), {}, "two candidates have one id"),
        (task(ranked(["a"]), items="a"), {}, "the candidates are not found"),
        (task(ranked(["a"]), items=[{"body": "x"}]), {}, "the candidates are not found"),
        (task(ranked(["mdn", "wiki", "blog"]), prompt=""), {}, "no prompt is found"),
        (task(ranked(["mdn", "wiki", "blog"])), {"prompt": "question"}, "no prompt is found"),
        (task(ranked(["mdn", "wiki", "blog"], lead_time=-1)), {}, "seconds: not a number from 0"),
        (task(ranked(["mdn", "wiki", "blog"], created_at="yesterday")), {}, "time: not ISO 8601"),
        (task(ranked(["mdn", "wiki", "blog"], completed_by=[1])), {}, "annotator: not text or a number"),
        (
            task(ranked(["a", "b"]), items=[{"id": "a", "title": "A", "body": ""}, {"id": "b", "body": "B"}]),
            {},
            "candidates.text: empty",
        ),
        (
            task(ranked(["a", "b"]), items=[{"id": x, "body": "same"} for x in "ab"]),
            {},
            "candidates: fewer than two dist",
        ),
    ],
)
def test_rankings_that_cannot_be_used(tmp_path, row, options, reason):
    records, (found,) = made(tmp_path, LS, row, **options)
    assert records == []
    assert found.startswith(reason)


def test_fields_of_any_name(tmp_path):
    row = task(ranked(["mdn", "wiki", "blog"]), prompt=None, items=None, q="Why?", drafts=ITEMS, tags=[{"id": "t"}])
    assert made(tmp_path, LS, row)[1] == ["the candidates are not found"], "two lists could be meant"
    record = one(tmp_path, LS, row, prompt="q", items="drafts", author="title")
    assert said(record) == [("user", "Why?")]
    assert [candidate.author for candidate in record.candidates] == ["BLOG", "MDN", "WIKI"]


def test_a_task_of_our_own_keeps_its_conversation(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    items = [{"id": str(i), "title": f"Answer {i + 1}", "body": text} for i, text in enumerate(("no", "yes"))]
    row = task(
        ranked(["1", "0"]), proposal="0123", messages=chat, prompt="User: a\n\nAssistant: b\n\nUser: c", items=items
    )
    record = one(tmp_path, LS, row)
    assert said(record) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert by_rank(record)[1] == ["yes"]


# ---- Pairwise --------------------------------------------------------------------------------------------------------


@real
def test_pairwise_ranks_the_chosen_side_of_authentic_tasks_first(tmp_path):
    data = json.loads((EXPORTS / "label_studio" / "pairwise_import_tasks.json").read_text("utf-8"))[0]
    record = one(tmp_path, LS, pairwise("right", **data))
    assert by_rank(record)[1][0].startswith("Here are 5 things")
    assert said(record) == [("user", "What is the latest news on the stock market?")]
    assert one(tmp_path, LS, pairwise("left", **data)).ranks == (1, 2)


@real
def test_tasks_as_they_were_brought_in_count_as_not_annotated():
    records, rejects = read(LS, EXPORTS / "label_studio" / "pairwise_import_tasks.json")
    assert records == []
    assert {reject.reason for reject in rejects} == {"the task has no annotation"}
    assert [reject.line for reject in rejects[:3]] == [2, 7, 12]


@pytest.mark.parametrize(
    "data",
    [
        {"text": "Q?", "Answer A": "one", "Answer B": "two"},
        {"prompt": "Q?", "reply_left": "one", "reply_right": "two"},
        {"question": "Q?", "text1": "one", "text2": "two", "score": "9"},
    ],
)
def test_the_pair_of_fields_is_found_by_its_names(tmp_path, data):
    record = one(tmp_path, LS, pairwise("left", **data))
    assert by_rank(record) == {1: ["one"], 2: ["two"]}
    assert said(record) == [("user", "Q?")]


def test_a_pair_that_is_not_clear_is_named(tmp_path):
    data = {"prompt": "Q?", "a1": "x", "a2": "y", "b1": "one", "b2": "two"}
    assert made(tmp_path, LS, pairwise("left", **data))[1] == ["the two answers are not found"]
    assert by_rank(one(tmp_path, LS, pairwise("left", **data), answers="b2, b1")) == {1: ["two"], 2: ["one"]}
    assert made(tmp_path, LS, pairwise("left", **data), answers="b2,c")[1] == ["the two answers are not found"]
    with pytest.raises(UserError, match="answers: one field, b1"):
        made(tmp_path, LS, pairwise("left"), answers="b1")


@pytest.mark.parametrize("selected", ["none", "", 1, ["left"]])
def test_no_side_is_no_tie(tmp_path, selected):
    assert made(tmp_path, LS, pairwise(selected)) == ([], ["no side was chosen"])


# ---- Choices and Ratings ---------------------------------------------------------------------------------------------


def chosen(*choices, name="better"):
    return result({"choices": list(choices)}, name, "choices")


def rated(number, name, to="list"):
    return {**result({"rating": number}, name, "rating"), "to_name": to}


def of_two(*results):
    return {"data": {"prompt": "Which?", "answer1": "one", "answer2": "two"}, "annotations": [annotation(*results)]}


SIDE = result({"selected": "right"}, "pw", "pairwise")


@pytest.mark.parametrize(
    ("results", "ranks"),
    [
        ([chosen("Both are equal")], (1, 1)),
        ([chosen("Both bad")], (1, 1)),
        ([chosen("answer2")], (2, 1)),
        ([chosen("Answer 1 is better"), chosen("Accuracy", name="reason")], (1, 2)),
        ([chosen("B")], (2, 1)),
        ([chosen("two")], (2, 1)),
        ([SIDE, chosen("Accuracy")], (2, 1)),
        ([SIDE, chosen("right")], (2, 1)),
        ([result({"selected": None}, "pw", "pairwise"), chosen("Tie")], (1, 1)),
    ],
)
def test_choices_name_an_answer_or_a_tie(tmp_path, results, ranks):
    assert one(tmp_path, LS, of_two(*results)).ranks == ranks


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([SIDE, chosen("Both are equal")], "the annotation contradicts itself"),
        ([SIDE, chosen("Answer 1")], "the annotation contradicts itself"),
        ([chosen("A", "B")], "the annotation contradicts itself"),
        ([SIDE, rated(5, "rating1"), rated(2, "rating2")], "the annotation contradicts itself"),
        ([chosen()], "the annotation holds no ranking"),
        ([chosen("Accuracy")], "the annotation holds no ranking"),
        ([chosen("Not sure")], "the annotation holds no ranking"),
        ([rated(5, "rating1")], "candidates: fewer than two answers"),
        ([rated(5, "rating1"), rated(5, "style1"), rated(1, "rating2")], "an answer has several ratings"),
    ],
)
def test_a_contradiction_and_no_answer_are_no_tie(tmp_path, results, reason):
    assert made(tmp_path, LS, of_two(*results)) == ([], [reason])


def test_values_of_choices_are_given_a_meaning(tmp_path):
    rows = [of_two(chosen("Undecided")), of_two(chosen("Upper")), of_two(chosen("both are equal"))]
    options = {"choice_values": "Undecided=tie,Upper=answer1"}
    records, reasons = made(tmp_path, LS, *rows, **options)
    assert ([record.ranks for record in records], reasons) == ([(1, 1), (1, 2), (1, 1)], [])
    with pytest.raises(UserError, match="none of the answers"):
        made(tmp_path, LS, rows[0], choice_values="Upper=top", answers="answer1,answer2")


def test_ratings_rank_by_stars_and_stay_as_scores(tmp_path):
    stars = [rated(2, "rating1"), rated(5, "quality", "answer2"), rated(3, "overall")]
    record = one(tmp_path, LS, of_two(*stars))
    assert (record.ranks, [candidate.score for candidate in record.candidates]) == ((2, 1), [2, 5])
    assert one(tmp_path, LS, of_two(rated(4, "rating1"), rated(4, "rating2"))).ranks == (1, 1)
    record = one(tmp_path, LS, of_two(SIDE, rated(4, "rating1"), rated(4, "rating2")))
    assert (record.ranks, [candidate.score for candidate in record.candidates]) == ((2, 1), [4, 4])
    data = {"prompt": "Which?", **{f"answer{i}": f"text {i}" for i in (1, 2, 3)}}
    three = {"data": data, "annotations": [annotation(*(rated(i, f"rating{i}") for i in (1, 2, 3)))]}
    assert one(tmp_path, LS, three).ranks == (3, 2, 1)


def item_rating(number, name="stars", **more):
    return {"from_name": name, "to_name": "list", "type": "rating", "value": {"rating": number}, **more}


RANKER = result({"ranker": ["mdn", "blog", "wiki"]})


@pytest.mark.parametrize(
    "ratings",
    [
        [item_rating(5, "stars_mdn"), item_rating(2, "stars_blog"), item_rating(2, "stars_wiki")],
        [item_rating(2, "stars1"), item_rating(5, "stars2"), item_rating(2, "stars3"), item_rating(1, "quality")],
        [item_rating(number, item_index=at) for at, number in enumerate((2, 5, 2))],
    ],
    ids=["by id", "by place", "per item"],
)
def test_ratings_of_the_items_of_a_list_are_their_scores_and_rank_them_where_no_ranker_does(tmp_path, ratings):
    record = one(tmp_path, LS, task(annotation(RANKER, *ratings)))
    assert ([c.score for c in record.candidates], record.ranks) == ([2, 5, 2], (2, 1, 3))
    record = one(tmp_path, LS, task(annotation(*ratings)))
    assert ([c.score for c in record.candidates], record.ranks) == ([2, 5, 2], (2, 1, 2))


def test_an_item_without_a_rating_is_ranked_by_a_ranker_only(tmp_path):
    ratings = [item_rating(5, "stars_mdn"), item_rating(2, "stars_blog")]
    record = one(tmp_path, LS, task(annotation(RANKER, *ratings)))
    assert ([c.score for c in record.candidates], record.ranks) == ([2, 5, None], (2, 1, 3))
    assert len(one(tmp_path, LS, task(annotation(*ratings))).candidates) == 2


@pytest.mark.parametrize(
    ("ratings", "ids", "reason"),
    [
        ([item_rating(1, "stars_mdn"), item_rating(2, "stars_blog")], None, "the annotation contradicts itself"),
        ([item_rating(1, "stars_7")], None, "a rating belongs to no item of the list"),
        ([item_rating(1, item_index=3)], None, "a rating belongs to no item of the list"),
        ([item_rating(1, "stars_mdn"), item_rating(1, "more_mdn")], None, "an item has several ratings"),
        (
            [item_rating(1, "stars1"), item_rating(2, "stars2")],
            "012",
            "does the number of a rating mean an id or a place?",
        ),
    ],
)
def test_ratings_of_items_that_cannot_be_placed_are_rejected(tmp_path, ratings, ids, reason):
    items = [{**item, "id": name} for item, name in zip(ITEMS, ids or [item["id"] for item in ITEMS])]
    ranker = result({"ranker": list(ids)}) if ids else RANKER
    assert made(tmp_path, LS, task(annotation(ranker, *ratings), items=items))[1] == [reason]


def test_json_min_has_choices_and_ratings_as_bare_values(tmp_path):
    assert one(tmp_path, LS, minimal("better", "Both are equal"), control="better").ranks == (1, 1)
    row = minimal("rating1", 2, rating2=5)
    assert one(tmp_path, LS, row, control="rating1,rating2").ranks == (2, 1)


# ---- annotations -----------------------------------------------------------------------------------------------------


def test_every_annotation_of_a_task_is_a_record_or_a_reject(tmp_path):
    order = ["mdn", "wiki", "blog"]
    comment = result({"text": ["fine"]}, "comment", "textarea")
    rows = [
        task(
            ranked(order, completed_by=1),
            ranked(order, completed_by=2, was_cancelled=True),
            annotation(comment, result({"ranker": order[::-1]}), completed_by=3),
            annotation(comment),
            annotation(),
            "broken",
        ),
        task(),
        {"data": {}, "annotations": None},
        {"data": {}, "total_annotations": 1},
        {"data": {}, "annotations": 5},
        {"data": {}, "completions": [annotation(skipped=True)]},
    ]
    records, reasons = made(tmp_path, LS, *rows)
    assert [(record.annotator, record.ranks) for record in records] == [("1", (3, 1, 2)), ("3", (1, 3, 2))]
    assert reasons == [
        "the annotation was cancelled",
        "the annotation holds no ranking",
        "the annotation holds no ranking",
        "an annotation is not an object with a result",
        *["the task has no annotation"] * 3,
        "annotations: not a list",
        "the annotation was cancelled",
    ]


def test_of_several_rankings_one_is_named(tmp_path):
    both = annotation(
        result({"ranker": ["mdn", "wiki", "blog"]}, "help"), result({"ranker": ["wiki", "mdn", "blog"]}, "truth")
    )
    assert made(tmp_path, LS, task(both)) == ([], ["the annotation holds several rankings"])
    assert one(tmp_path, LS, task(both), control="truth").ranks == (3, 2, 1)
    assert made(tmp_path, LS, task(both), control="fun")[1] == ["the annotation holds no ranking"]


@real
def test_an_authentic_export_of_images_holds_no_ranking():
    records, rejects = read(LS, EXPORTS / "label_studio" / "converter_csv_test_export.json")
    assert records == []
    assert [reject.reason for reject in rejects] == ["the annotation holds no ranking"] * 2


# ---- JSON_MIN --------------------------------------------------------------------------------------------------------


def minimal(control, value, **fields):
    """A row as the converter of label-studio-sdk 2.1 writes it."""
    row = {"prompt": "Which?", "answer1": "one", "answer2": "two", "items": copy.deepcopy(ITEMS), "id": 4}
    row |= {control: value, "annotator": 1, "annotation_id": 9, "created_at": "2024-01-01T00:00:00Z"}
    return {**row, "updated_at": "2024-01-02T00:00:00Z", "lead_time": 3.5, **fields}


def test_json_min_has_the_same_winners(tmp_path):
    record = one(tmp_path, LS, minimal("best", [{"selected": "right"}], annotator="ann@example.org"))
    assert by_rank(record) == {1: ["two"], 2: ["one"]}
    assert (record.annotator, record.time, record.seconds) == ("ann@example.org", "2024-01-01T00:00:00Z", 3.5)
    record = one(tmp_path, LS, minimal("rank", [{"ranker": {"rank": ["wiki", "blog", "mdn"]}}]))
    assert record.ranks == (2, 3, 1)
    assert record.annotator == "1"


def test_json_min_without_an_annotation(tmp_path):
    empty = minimal("note", "x", annotation_id=None, annotator=None)
    assert made(tmp_path, LS, empty, minimal("note", "x")) == (
        [], ["the task has no annotation", "the annotation holds no ranking"],
    )  # fmt: skip


def test_both_forms_are_detected_and_tasks_to_import_are_not(tmp_path):
    def why(rows):
        path = tmp_path / "in.json"
        path.write_text(json.dumps(rows, indent=1), "utf-8")
        return IMPORTERS[LS].traits["detect"](read_head(path))

    assert "`data` and `annotations`" in why([task(), task(ranked([]))])
    assert "JSON_MIN" in why([minimal("best", [{"selected": "right"}])])
    assert why([{"prompt": "a", "answer1": "b", "answer2": "c"}]) is None
    assert why([{"data": {"prompt": "a"}}]) is None
