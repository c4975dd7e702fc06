"""Tables through a mapping: who won by ranks, choices and orders; lines, quotes, encodings; nothing is executed."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
import yaml
import zstandard
from imports import EXPORTS, by_rank, read, real, said
from rows import last_line, run

from data_tools.importers import IMPORTERS
from data_tools.importers.table import read_head
from data_tools.reading.csv_rows import LONGEST_FIELD, csv_columns, csv_rows
from rlhf.core.errors import UserError
from rlhf.data.schema import Demonstration, Proposal, Ranking
from rlhf.data.store import open_dataset

PAIR = {"prompt": "q", "answers": "a,b"}


def table(tmp_path, text, name="in.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def written(rows):
    """CSV text of the rows, quoted as need be."""
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def made(tmp_path, text, **options):
    """(records, [(line, reason)]) of a table."""
    records, rejects = read("csv", table(tmp_path, text), **options)
    return records, [(reject.line, reject.reason) for reject in rejects]


def one(tmp_path, header, row, **options):
    """The record of a table with one row."""
    ((record,), rejects) = made(tmp_path, written([header.split(","), row]), **options)
    assert rejects == []
    return record


# ---- who won: ranks --------------------------------------------------------------------------------------------------


def test_ranks_of_each_answer_in_its_column(tmp_path):
    text = "q,a,b,c,ra,rb,rc\nQ?,one,two,three,3,1,1\n"
    options = {"prompt": "q", "answers": ["a", "b", "c"], "ranks": ["ra", "rb", "rc"]}
    ((record,), _) = made(tmp_path, text, **options)
    assert by_rank(record) == {1: ["two", "three"], 2: ["one"]}
    ((record,), _) = made(tmp_path, text, **options, rank_order="highest-best")
    assert by_rank(record) == {1: ["one"], 2: ["two", "three"]}
    ((record,), _) = made(tmp_path, text, prompt="q", answers="b, a", ranks="rb, ra", shown=True)
    assert ([candidate.text for candidate in record.candidates], record.ranks, record.shown) == (
        ["two", "one"],
        (1, 2),
        True,
    )


def test_ratings_and_ticks_are_numbers(tmp_path):
    options = {**PAIR, "ranks": "ra,rb", "rank_order": "highest-best"}
    assert one(tmp_path, "q,a,b,ra,rb", ["Q?", "x", "y", "3.5", "4.25"], **options).ranks == (2, 1)
    assert one(tmp_path, "q,a,b,ra,rb", ["Q?", "x", "y", "TRUE", "false"], **options).ranks == (1, 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["Q?", "x", "y", "1", ""], "an answer has no rank"),
        (["Q?", "x", "", "1", "2"], "an answer that is ranked is empty"),
        (["Q?", "x", "", "1", ""], "candidates: fewer than two answers"),
        (["Q?", "x", "y", "1", "first"], "ranks: not a number"),
        (["Q?", "x", "y", "1", "nan"], "ranks: not a number"),
        (["Q?", "x", "y", "1", "inf"], "ranks: not a number"),
        (["", "x", "y", "1", "2"], "the prompt is empty"),
        (["Q?", "x", "x", "1", "2"], "candidates: fewer than two distinct answers"),
    ],
)
def test_rows_without_a_ranking(tmp_path, row, reason):
    text = written([["q", "a", "b", "ra", "rb"], row])
    assert made(tmp_path, text, **PAIR, ranks="ra,rb") == ([], [(2, reason)])


def test_a_row_may_have_fewer_answers(tmp_path):
    options = {"prompt": "q", "answers": "a,b,c", "ranks": "ra,rb,rc"}
    record = one(tmp_path, "q,a,b,c,ra,rb,rc", ["Q?", "one", " ", "three", "2", "", "1"], **options)
    assert by_rank(record) == {1: ["three"], 2: ["one"]}


@pytest.mark.parametrize(
    ("one_box", "other", "ranks"), [("true", "", (1, 2)), ("", "x", (2, 1)), ("yes", "YES", (1, 1))]
)
def test_a_ticked_box_wins_whatever_the_order_of_numbers(tmp_path, one_box, other, ranks):
    for order in ("lowest-best", "highest-best"):
        row = ["Q?", "x", "y", one_box, other]
        found = one(tmp_path, "q,a,b,ra,rb", row, **PAIR, ranks="ra,rb", rank_order=order)
        assert (found.ranks, found.candidates[0].score) == (ranks, None)


def test_no_ticked_box_is_no_answer(tmp_path):
    text = "q,a,b,ra,rb\nQ?,x,y,false,FALSE\nQ?,x,y,,\n"
    reasons = [(2, "ranks: no answer is ticked"), (3, "ranks: no answer was given")]
    assert made(tmp_path, text, **PAIR, ranks="ra,rb") == ([], reasons)


def test_scores_stay_with_the_answers_and_must_agree_with_who_won(tmp_path):
    rated = one(tmp_path, "q,a,b,ra,rb", ["Q?", "x", "y", "2", "5"], **PAIR, ranks="ra,rb", rank_order="highest-best")
    assert [candidate.score for candidate in rated.candidates] == [2, 5]
    options = {**PAIR, "best_first": True, "scores": "sa,sb"}
    text = "q,a,b,sa,sb\nQ?,x,y,8,2\nQ?,x,y,8,8\nQ?,x,y,2,\nQ?,x,y,2,9\nQ?,x,y,high,9\n"
    records, rejects = made(tmp_path, text, **options)
    assert [(found.ranks, found.candidates[0].score) for found in records] == [((1, 2), 8), ((1, 1), 8), ((1, 2), 2)]
    assert rejects == [(5, "the scores contradict who won"), (6, "sa: not a number")]


def test_a_listed_order_may_be_a_tie_in_words_or_empty(tmp_path):
    text = "q,a,b,order\nQ?,x,y,B>A\nQ?,x,y,Equal\nQ?,x,y,\n"
    records, rejects = made(tmp_path, text, **PAIR, ranking="order")
    assert [found.ranks for found in records] == [(2, 1), (1, 1)]
    assert rejects == [(4, "ranking: no answer was given")]


def test_best_and_worst_columns(tmp_path):
    text = "q,a,b,c,best,worst\nQ?,x,y,z,B,a\nQ?,x,y,z,b,b\nQ?,x,y,z,tie,a\nQ?,x,y,z,c,\n"
    records, rejects = made(tmp_path, text, prompt="q", answers="a,b,c", choice="best", worst="worst")
    assert [found.ranks for found in records] == [(3, 1, 2)]
    contradict = "choice and worst: contradict each other"
    assert rejects == [(3, contradict), (4, contradict), (5, "worst: no answer was given")]


def test_a_choice_may_be_the_answer_s_own_text_or_a_tie_in_words(tmp_path):
    text = "q,a,b,pick\nQ?,Pear.,Car.,Car.\nQ?,Pear.,Car.,Both are bad\nQ?,Pear.,Car.,Response A\nQ?,Pear.,Car.,\n"
    records, rejects = made(tmp_path, text, **PAIR, choice="pick")
    assert [found.ranks for found in records] == [(2, 1), (1, 1), (1, 2)]
    assert rejects == [(5, "choice: no answer was given")]


# ---- who won: choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ranks"), [("b", (2, 1)), ("B", (2, 1)), (" A ", (1, 2)), ("tie", (1, 1)), ("Tie", (1, 1))]
)
def test_a_choice_names_the_column_the_letter_or_a_tie(tmp_path, value, ranks):
    assert one(tmp_path, "q,a,b,pick", ["Q?", "x", "y", value], **PAIR, choice="pick").ranks == ranks


@pytest.mark.parametrize("value", ["0", "1", "2", "c", "both"])
def test_other_choices_need_a_mapping(tmp_path, value):
    text = written([["q", "a", "b", "pick"], ["Q?", "x", "y", value]])
    assert made(tmp_path, text, **PAIR, choice="pick") == ([], [(2, "choice: an unknown value")])


@pytest.mark.parametrize(
    "told", ["0=a,1=b,Same=tie", {0: "a", 1: "b", "same": "tie"}, {"0": "a", "1": "b", "Same": "tie"}]
)
def test_what_the_values_of_a_choice_mean(tmp_path, told):
    for value, ranks in (("0", (1, 2)), ("1", (2, 1)), ("SAME", (1, 1))):
        record = one(tmp_path, "q,a,b,pick", ["Q?", "x", "y", value], **PAIR, choice="pick", choice_values=told)
        assert record.ranks == ranks


def test_of_more_answers_the_others_share_the_second_rank(tmp_path):
    options = {"prompt": "q", "answers": "a,b,c", "choice": "pick"}
    assert one(tmp_path, "q,a,b,c,pick", ["Q?", "x", "y", "z", "C"], **options).ranks == (2, 2, 1)
    assert len(one(tmp_path, "q,a,b,c,pick", ["Q?", "x", "", "z", "C"], **options).candidates) == 2
    text = written([["q", "a", "b", "c", "pick"], ["Q?", "x", "", "z", "B"]])
    assert made(tmp_path, text, **options)[1] == [(2, "an answer that is ranked is empty")]


# ---- who won: order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        ("2>1=3", (2, 1, 2)), ("B,A,C", (2, 1, 3)), ("c > a > b", (2, 3, 1)), ("[3, 1, 2]", (2, 3, 1)),
        ('["b","c","a"]', (3, 1, 2)), ("1=2=3", (1, 1, 1)), ("second;first;C", (2, 1, 3)),
    ],
)  # fmt: skip
def test_an_order_lists_the_best_first(tmp_path, order, ranks):
    options = {"prompt": "q", "answers": "first,second,c", "ranking": "order"}
    if order in ("c > a > b", '["b","c","a"]', "B,A,C", "2>1=3", "[3, 1, 2]", "1=2=3"):
        options["answers"] = "a,b,c"
    header = f"q,{options['answers']},order"
    assert one(tmp_path, header, ["Q?", "x", "y", "z", order], **options).ranks == ranks


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("0>1", "ranking: names an unknown answer"),
        ("", "ranking: no answer was given"),
        ("1<2", "ranking: names an unknown answer"),
        ("1>1", "ranking: names an answer twice"),
        ("A,1", "ranking: names an answer twice"),
        ("2", "an answer has no rank"),
    ],
)
def test_orders_that_cannot_be_used(tmp_path, order, reason):
    text = written([["q", "a", "b", "order"], ["Q?", "x", "y", order]])
    assert made(tmp_path, text, **PAIR, ranking="order") == ([], [(2, reason)])


# ---- the other columns -----------------------------------------------------------------------------------------------

MTURK = {
    "prompt_template": "{Input.question}\n\n{Input.text}",
    "answers": "Input.a,Input.b",
    "choice": "Answer.best",
    "choice_values": "left=Input.a,right=Input.b,same=tie",
    "annotator": "WorkerId",
    "time": "SubmitTime",
    "seconds": "WorkTimeInSeconds",
    "status": "AssignmentStatus",
    "group": "HITId",
    "authors": "Input.a_model,Input.b_model",
}
MTURK_HEADER = [
    "HITId", "WorkerId", "AssignmentStatus", "SubmitTime", "WorkTimeInSeconds", "Input.question", "Input.text",
    "Input.a", "Input.b", "Input.a_model", "Input.b_model", "Answer.best",
]  # fmt: skip


def mturk(status="Approved", time="Mon Feb 03 10:11:12 PST 2020", seconds="42", best="right"):
    return ["H1", "W1", status, time, seconds, "Shorter?", "A {long} text.", "one", "two", "m-a", "m-b", best]


def test_a_batch_of_mturk(tmp_path):
    rows = [
        mturk(),
        mturk("Rejected"),
        mturk("Submitted", best="same"),
        mturk(""),
        mturk(time="soon"),
        mturk(seconds="1 h"),
    ]
    records, rejects = made(tmp_path, written([MTURK_HEADER, *rows]), **MTURK)
    first = records[0]
    assert by_rank(first) == {1: ["two"], 2: ["one"]}
    assert said(first) == [("user", "Shorter?\n\nA {long} text.")]
    assert (first.annotator, first.group, first.seconds) == ("W1", "H1", 42)
    assert first.time == "2020-02-03T10:11:12-08:00"
    assert [candidate.author for candidate in first.candidates] == ["m-a", "m-b"]
    assert records[1].ranks == (1, 1)
    assert rejects == [
        (3, "status: not accepted"),
        (5, "status: not accepted"),
        (6, "time: not understood"),
        (7, "seconds: not a number"),
    ]
    assert len(made(tmp_path, written([MTURK_HEADER, *rows]), **MTURK, accepted="Rejected")[0]) == 1


@pytest.mark.parametrize(
    ("text", "form", "time"),
    [
        ("2020-02-03T10:11:12Z", None, "2020-02-03T10:11:12+00:00"),
        ("2020-02-03", None, "2020-02-03T00:00:00"),
        ("Mon, 03 Feb 2020 10:11:12 +0100", None, "2020-02-03T10:11:12+01:00"),
        ("3/2/2020 10:11", "%d/%m/%Y %H:%M", "2020-02-03T10:11:00"),
        ("", None, None),
        ("", "%d/%m/%Y", None),
    ],
)
def test_times_are_converted(tmp_path, text, form, time):
    options = {**PAIR, "choice": "pick", "time": "when"} | ({"time_format": form} if form else {})
    assert one(tmp_path, "q,a,b,pick,when", ["Q?", "x", "y", "a", text], **options).time == time


@pytest.mark.parametrize(
    ("text", "form"), [("3/2/2020", None), ("x", "%Y%Y"), ("x", "%"), ("2020", "%d"), ("99" * 99, None)]
)
def test_a_time_that_cannot_be_read_rejects_the_row_and_says_what_to_do(tmp_path, text, form):
    path = table(tmp_path, written([["q", "a", "b", "pick", "when"], ["Q?", "x", "y", "a", text]]))
    records, (reject,) = read(
        "csv", path, **PAIR, choice="pick", time="when", **({"time_format": form} if form else {})
    )
    assert records == []
    assert reject.reason == "time: not understood"
    assert "leave `time` out" in reject.remedy


def test_demonstrations_proposals_and_prompts(tmp_path):
    record = one(tmp_path, "q,a,who,s", ["Q?", "A.", "ann", "web"], prompt="q", answer="a", annotator="who", source="s")
    assert isinstance(record, Demonstration)
    assert (record.answer, record.author, record.source) == ("A.", "ann", "web")
    record = one(tmp_path, "q,a,b", ["Q?", "x", "y"], **PAIR)
    assert type(record) is Proposal
    assert [candidate.text for candidate in record.candidates] == ["x", "y"]
    assert one(tmp_path, "q,a", ["Q?", "x"], prompt="q").kind == "prompt"


def test_without_options_the_columns_say_it_by_their_names(tmp_path):
    header = "prompt,answer_2,answer_10,answer_1,rank_1,rank_2,rank_10"
    record = one(tmp_path, header, ["Q?", "two", "ten", "one", "2", "1", "3"])
    assert by_rank(record) == {1: ["two"], 2: ["one"], 3: ["ten"]}
    assert one(tmp_path, "prompt,answer", ["Q?", "A."]).answer == "A."
    assert type(one(tmp_path, "prompt,answer_1,answer_2", ["Q?", "A.", "B."])) is Proposal
    assert one(tmp_path, "prompt,other", ["Q?", "A."]).kind == "prompt"


@real
def test_authentic_doccano_tables():
    records, rejects = read("csv", EXPORTS / "doccano" / "seq2seq_example.csv", prompt="text", answer="label")
    assert [(said(record), record.answer) for record in records] == [([("user", "exampleA")], "label1")]
    assert [reject.line for reject in rejects] == [2, 4, 5]


# ---- mistakes in the mapping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": "quesion"}, "no column is called 'quesion'\ndid you mean 'question'"),
        ({"prompt": "question", "answers": "a,z"}, "no column is called 'z'"),
        ({"prompt_template": "{question.__class__}"}, r"no column is called 'question.__class__'"),
        ({"prompt_template": "{a!r}"}, "no column is called 'a!r'"),
        ({"prompt_template": "{a[0]}"}, r"no column is called 'a\[0\]'"),
        ({"prompt_template": "Answer!"}, "names no column"),
        ({"prompt": "a", "prompt_template": "{a}"}, "only one of them"),
        ({"answers": "a,b", "answer": "a"}, "a demonstration or a ranking"),
        ({"answers": "a,b", "ranks": "question"}, "1 columns for 2 answers"),
        ({"answers": "a,b", "ranks": "a,b", "choice": "a"}, "ranks and choice: only one"),
        ({"ranks": "a,b"}, "ranks: of which answers"),
        ({"answers": "a,b", "choice": "question", "choice_values": "1=a,2=c"}, "'c' is none of the answers"),
        ({"answers": "a,b", "choice": "question", "choice_values": "1,2"}, "'1' is not VALUE=ANSWER"),
        ({"answers": "a,b", "choice_values": "1=a"}, "of which column"),
        ({"answers": "a,b", "authors": "a"}, "authors: 1 columns for 2 answers"),
        ({"answers": "a,b", "time_format": "%d"}, "time_format: of which column"),
        ({"prompt": "question", "delimiter": "::"}, "not one character"),
        ({"prompt": "question", "delimiter": '"'}, "not one character"),
        ({"prompt": "question", "encoding": "no-such"}, "none is called 'no-such'"),
        ({"prompt": "question", "encoding": "base64"}, "none is called 'base64'"),
        ({"prompt": "twice"}, "2 columns are called 'twice'"),
    ],
)
def test_mistakes_in_the_mapping_stop_before_anything_is_written(tmp_path, options, told):
    path = table(tmp_path, "question,a,b,twice,twice\nQ?,x,y,1,1\n")
    with pytest.raises(UserError, match=told):
        read("csv", path, **{"prompt": "question", **options} if "prompt_template" not in options else options)


def test_a_table_that_is_cut_at_another_character_is_reported(tmp_path):
    path = table(tmp_path, "q;a;b\nQ?;x;y\n")
    with pytest.raises(UserError, match="--option delimiter=';'"):
        read("csv", path, **PAIR)
    assert len(read("csv", path, **PAIR, delimiter=";")[0]) == 1
    for name, text in (("in.tsv", "q\ta\tb\nQ?\tx\ty\n"), ("in.tsv.gz", gzip.compress(b"q\ta\tb\nQ?\tx\ty\n"))):
        assert len(read("csv", table(tmp_path, text, name), **PAIR)[0]) == 1


def test_a_template_fills_in_text_and_executes_nothing(tmp_path):
    row = ["{b.__class__}", "{a}{0}%s$a"]
    record = one(tmp_path, "a,b", row, prompt_template="<{a}> {{b}} {b} {} {")
    assert said(record) == [("user", "<{b.__class__}> {{a}{0}%s$a} {a}{0}%s$a {} {")]


# ---- lines, quotes and bytes -----------------------------------------------------------------------------------------


def test_line_numbers_count_quoted_line_breaks_and_blank_lines(tmp_path):
    text = 'q,a,b\r\n"two\r\nlines",x,y\r\n\r\nQ?,x\r\n"Q\n\n?",x,y,z\r\nlast?,x,y'
    records, rejects = made(tmp_path, text, **PAIR)
    assert [record.messages[0].content for record in records] == ["two\r\nlines", "last?"]
    assert rejects == [(5, "not as many fields as columns"), (6, "not as many fields as columns")]
    assert [(item.line, item.raw) for item in csv_rows(tmp_path / "in.csv", lambda _: None)] == [
        (2, '"two\r\nlines",x,y\r\n'), (9, "last?,x,y"),
    ]  # fmt: skip


def test_a_quote_that_is_not_closed_is_one_reject_that_holds_the_rest(tmp_path):
    path = table(tmp_path, 'q,a,b\nQ?,x,y\nQ?,"x,y\nQ?,x,y\nQ?,x,y\n')
    records, (reject,) = read("csv", path, **PAIR)
    assert len(records) == 1
    assert (reject.line, reject.reason, reject.detail) == (
        3, "the file ends in the middle of a record", "a quote is not closed",
    )  # fmt: skip
    assert reject.raw == 'Q?,"x,y\nQ?,x,y\nQ?,x,y'


def test_a_stray_quote_costs_its_row_and_no_more(tmp_path):
    records, rejects = made(tmp_path, 'q,a,b\nQ?,"x"z,y\nQ?,say "x",y\nQ?,"say ""x""",y\n', **PAIR)
    assert [record.candidates[0].text for record in records] == ['say "x"', 'say "x"']
    assert rejects == [(2, "not valid CSV")]


def test_a_last_row_that_is_cut_off(tmp_path):
    assert made(tmp_path, "q,a,b\nQ?,x,y\nQ?,x", **PAIR)[1] == [(3, "the file ends in the middle of a record")]


def test_bytes_of_another_encoding(tmp_path):
    text = "q,a,b\nQ?,x,y\nÜber?,x,y\nQ?,x,ß\n"
    path = table(tmp_path, text.encode("cp1252"))
    records, rejects = read("csv", path, **PAIR)
    assert len(records) == 1
    assert [(reject.line, reject.reason) for reject in rejects] == [(3, "not UTF-8"), (4, "not UTF-8")]
    assert rejects[0].raw == "\\xdcber?,x,y"
    assert read("csv", path, **PAIR, encoding="cp1252")[0][2].candidates[1].text == "ß"
    for encoding, data in (("utf-16", text.encode("utf-16")), ("utf-8", b"\xef\xbb\xbf" + text.encode())):
        assert len(read("csv", table(tmp_path, data), **PAIR, encoding=encoding)[0]) == 3
    _, rejects = read("csv", table(tmp_path, text.encode("utf-16")[:-1]), **PAIR, encoding="utf-16")
    assert [reject.reason for reject in rejects] == ["damaged: the rest of the file cannot be read"]


def test_nul_bytes_and_huge_fields_are_text(tmp_path):
    long = "x" * 1_000_000
    records, rejects = made(tmp_path, f"q,a,b\nQ\0?,{long},y\n", **PAIR)
    assert rejects == []
    assert (records[0].messages[0].content, records[0].candidates[0].text) == ("Q\0?", long)


def test_a_field_beyond_all_measure_is_a_quote_that_is_not_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.reading.csv_rows.LONGEST_FIELD", 100)
    records, rejects = made(tmp_path, 'q,a,b\nQ?,"x,y\n' + "Q?,x,y\n" * 50, **PAIR)
    csv.field_size_limit(LONGEST_FIELD)
    assert [reason for _, reason in rejects] == ["not valid CSV"]
    assert len(records) > 30, "the rows behind it are read"


def test_damaged_compression(tmp_path):
    text = "q,a,b\n" + "".join(f"Q{index}?,x,y\n" for index in range(5000))
    zipped = gzip.compress(text.encode())
    for name, whole in (("in.csv.gz", zipped), ("in.csv.zst", zstandard.compress(text.encode()))):
        assert len(read("csv", table(tmp_path, whole, name), **PAIR)[0]) == 5000
    records, rejects = read("csv", table(tmp_path, zipped[: len(zipped) // 2], "cut.csv.gz"), **PAIR)
    assert 0 < len(records) < 5000
    assert [reject.reason for reject in rejects] == ["damaged: the rest of the file cannot be read"]
    assert rejects[0].line >= len(records) + 2


@pytest.mark.parametrize("text", ["\n", "\n\n", "q,a,b\n", "q,a,b"])
def test_tables_without_a_row(tmp_path, text):
    assert made(tmp_path, text, **PAIR) == ([], [])


def test_a_header_that_is_no_csv_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"in\.csv:1: the names of the columns"):
        made(tmp_path, '"q,a,b\nQ?,x,y\n', **PAIR)
    assert csv_columns(table(tmp_path, "\n\n")) == []


def test_a_table_is_detected_by_its_name(tmp_path):
    def why(name, text):
        return IMPORTERS["csv"].traits["detect"](read_head(table(tmp_path, text, name)))

    assert why("in.csv", "q,a\n1,2\n") == "it is a table that begins with 'q,a\\n1,2'"
    assert why("in.tsv.gz", gzip.compress(b"q\ta\n"))
    assert why("in.json", "[]") is None
    assert why("in.csv", '{"q": 1}\n') is None
    assert why("in.txt", "q,a\n1,2\n") is None


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_the_mapping_from_words_and_from_yaml(tmp_path):
    path = table(tmp_path, written([MTURK_HEADER, mturk(), mturk("Rejected"), mturk(best="left")]))
    words = [word for name, value in MTURK.items() for word in ("--option", f"{name}={value}")]
    result = run("import", "csv", path, *words, "--out", tmp_path / "a", "--json")
    assert result.exit_code == 0, result.output
    assert last_line(result)["reasons"] == {"status: not accepted": 1}
    file = tmp_path / "mturk.yaml"
    file.write_text(yaml.safe_dump({**MTURK, "answers": ["Input.a", "Input.b"]}), "utf-8")
    assert run("import", "csv", path, "--options", file, "--out", tmp_path / "b").exit_code == 0
    assert open_dataset(tmp_path / "a").fingerprint == open_dataset(tmp_path / "b").fingerprint
    assert all(isinstance(record, Ranking) for record in open_dataset(tmp_path / "a").records())
    rejected = json.loads((tmp_path / "a" / "rejected.jsonl").read_text("utf-8"))
    assert (rejected["line"], rejected["detail"]) == (3, "'Rejected'")


def test_a_wrong_column_leaves_no_dataset(tmp_path):
    result = run(
        "import", "csv", table(tmp_path, "question,a\nQ?,x\n"), "--option", "prompt=qestion", "--out", tmp_path / "d"
    )
    assert result.exit_code != 0
    assert not (tmp_path / "d").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["in.csv"]
