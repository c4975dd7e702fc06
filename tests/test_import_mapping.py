"""The mapping of columns over rows of any container, chats in cells, and what a table's columns must not lose."""

from __future__ import annotations

import csv
import json
import shlex

import openpyxl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from imports import assistant, by_rank, made, read, said, user
from rows import jsonl, last_line, run

from data_tools.importers.run import find_files, import_dataset
from data_tools.importers.table import detect
from data_tools.reading.rows import JSON
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset

ROWS = [
    {"id": 1, "info": {"question": "A fruit?"}, "replies": [{"text": "A pear."}, {"text": "A bus."}], "best": 0},
    {"id": 2, "info": {"question": "A colour?"}, "replies": [{"text": "A van."}, {"text": "Green."}], "best": 1},
    {"id": 3, "info": {"question": "A word?"}, "replies": [{"text": "Tree."}, {"text": "Sky."}], "best": None},
]
NESTED = {
    "prompt": "info.question", "answers": "replies.0.text,replies.1.text", "choice": "best",
    "choice_values": "0=replies.0.text,1=replies.1.text",
}  # fmt: skip
FLAT = {"prompt": "question", "answers": "a,b", "choice": "best", "choice_values": "0=a,1=b"}


def flat(row):
    first, second = row["replies"]
    return {"question": row["info"]["question"], "a": first["text"], "b": second["text"], "best": row["best"]}


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")


def write_array(path):
    path.write_text(json.dumps(ROWS, indent=1), "utf-8")


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def write_csv(path, mark=","):
    rows = [flat(row) for row in ROWS]
    lines = [mark.join(rows[0]), *(mark.join("" if v is None else str(v) for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def write_tsv(path):
    write_csv(path, "\t")


def write_xlsx(path, *titles):
    book = openpyxl.Workbook()
    for index, title in enumerate(titles or ("rows",)):
        sheet = book.active if index == 0 else book.create_sheet()
        sheet.title = title
        rows = [flat(row) for row in ROWS]
        for line in (list(rows[0]), *(list(row.values()) for row in rows)):
            sheet.append(line)
    book.save(path)


@pytest.mark.parametrize(
    ("name", "write", "options"),
    [
        ("in.jsonl", write_jsonl, NESTED), ("in.json", write_array, NESTED), ("in.parquet", write_parquet, NESTED),
        ("in.arrow", write_arrow, NESTED), ("in.csv", write_csv, FLAT), ("in.tsv", write_tsv, FLAT),
        ("in.xlsx", write_xlsx, FLAT),
    ],
)  # fmt: skip
def test_the_same_options_read_the_same_rows_from_every_container(tmp_path, name, write, options):
    write(tmp_path / name)
    records, rejects = read("csv", tmp_path / name, **options)
    assert [(said(record), by_rank(record)) for record in records] == [
        ([("user", "A fruit?")], {1: ["A pear."], 2: ["A bus."]}),
        ([("user", "A colour?")], {1: ["Green."], 2: ["A van."]}),
    ]
    assert [reject.reason for reject in rejects] == ["choice: no answer was given"]


def test_a_folder_of_save_to_disk_is_its_rows(tmp_path):
    rows = [flat(row) for row in ROWS]
    parts = {"train": Dataset.from_list(rows[:2]), "test": Dataset.from_list(rows[2:])}
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    files = find_files([tmp_path / "d"], JSON)
    assert [file.parent.name for file in files] == ["test", "train"]
    assert [len(read("csv", file, **FLAT)[0]) for file in files] == [0, 2]


def test_a_workbook_with_several_sheets_needs_the_name_of_one(tmp_path):
    write_xlsx(tmp_path / "in.xlsx", "first", "second")
    with pytest.raises(UserError, match="several sheets have rows: 'first', 'second'"):
        read("csv", tmp_path / "in.xlsx", **FLAT)
    assert len(read("csv", tmp_path / "in.xlsx", **FLAT, sheet="second")[0]) == 2
    with pytest.raises(UserError, match="no sheet with rows is called 'third'"):
        read("csv", tmp_path / "in.xlsx", **FLAT, sheet="third")
    (tmp_path / "bad.xlsx").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match="not a workbook"):
        read("csv", tmp_path / "bad.xlsx", **FLAT)


def test_a_misspelt_path_stops_before_anything_is_read(tmp_path):
    write_jsonl(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match=r"no column is called 'info\.qestion'"):
        read("csv", tmp_path / "in.jsonl", **{**NESTED, "prompt": "info.qestion"})


# ---- chats in cells --------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", "answers": "a,b", "best_first": True}


def pair(tmp_path, q, a, b, **options):
    """(records, reasons) of one row, as JSON and as CSV with JSON in its cells; both must be the same."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"q": q, "a": a, "b": b}) + "\n", "utf-8")
    with open(tmp_path / "in.csv", "w", encoding="utf-8", newline="") as file:
        cells = [value if isinstance(value, str) else json.dumps(value) for value in (q, a, b)]
        csv.writer(file).writerows([["q", "a", "b"], cells])
    found = [read("csv", tmp_path / name, **{**PAIR, **options}) for name in ("in.jsonl", "in.csv")]
    (records, reasons), other = [(records, [reject.reason for reject in rejects]) for records, rejects in found]
    assert (records, reasons) == other
    return records, reasons


def test_lists_of_texts_are_what_the_user_asked_in_turn_and_the_replies(tmp_path):
    ((record,), _) = pair(tmp_path, ["A fruit?", "A red one?"], ["A pear.", "A cherry."], ["A pear.", "A bus."])
    assert said(record) == [("user", "A fruit?"), ("assistant", "A pear."), ("user", "A red one?")]
    assert by_rank(record) == {1: ["A cherry."], 2: ["A bus."]}
    ((record,), _) = pair(tmp_path, ["Far?"], ["Yes."], ["No."])
    assert (said(record), by_rank(record)) == ([("user", "Far?")], {1: ["Yes."], 2: ["No."]})


@pytest.mark.parametrize(
    ("q", "a", "b", "reason"),
    [
        (["x?", "y?"], ["one", "two"], ["other", "three"], "the answers differ before their last turn"),
        (["x?"], ["one"], [None], "candidates: fewer than two answers"),
        (["x?", "y?"], ["one", None], ["one", "two"], "candidates: fewer than two answers"),
        (["x?", "y?"], "one", "two", "not as many replies as questions"),
        (["x?", "y?"], ["one"], ["two"], "not as many replies as questions"),
        (["x?", "y?"], [None, "one"], [None, "two"], "a reply is no text"),
    ],
)
def test_lists_that_are_no_two_answers_to_one_prompt_are_rejected(tmp_path, q, a, b, reason):
    assert pair(tmp_path, q, a, b) == ([], [reason])


def test_whole_conversations_share_the_prompt(tmp_path):
    asked = [user("Hi"), assistant("Hello"), user("A fruit?")]
    ((record,), _) = pair(tmp_path, asked, [*asked, assistant("A pear.")], [*asked, assistant("A bus.")])
    assert said(record) == [("user", "Hi"), ("assistant", "Hello"), ("user", "A fruit?")]
    assert by_rank(record) == {1: ["A pear."], 2: ["A bus."]}
    ((record,), _) = pair(tmp_path, "\n\nHuman: A fruit?\n\nAssistant:", " A pear.", "Assistant: A bus.")
    assert (said(record), by_rank(record)) == ([("user", "A fruit?")], {1: ["A pear."], 2: ["A bus."]})


def test_json_that_is_no_chat_stays_text(tmp_path):
    ((record,), _) = pair(tmp_path, "Two fruits, as JSON?", '["pear", "plum"]', '{"fruit": 1}')
    assert by_rank(record) == {1: ['["pear", "plum"]'], 2: ['{"fruit": 1}']}
    ((record,), _) = pair(tmp_path, '["Sort me."]', "x", "y", json_cells=False)
    assert said(record) == [("user", '["Sort me."]')]


def test_system_and_history_come_before_the_prompt(tmp_path):
    row = {"s": "Be brief.", "h": [["Hi", "Hello"]], "q": "A fruit?", "a": "A pear.", "b": "A bus."}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    ((record,), _) = read("csv", tmp_path / "in.jsonl", **PAIR, system="s", history="h")
    assert said(record) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "A fruit?")]


# ---- columns that are not read ---------------------------------------------------------------------------------------


def test_a_table_of_chosen_and_rejected_needs_no_option(tmp_path):
    (tmp_path / "in.csv").write_text("prompt,chosen,rejected,system\nA fruit?,A pear.,A bus.,Be brief.\n", "utf-8")
    assert detect([tmp_path / "in.csv"])[0] == "csv"
    ((record,), _) = read("csv", tmp_path / "in.csv")
    assert (said(record), by_rank(record)) == (
        [("system", "Be brief."), ("user", "A fruit?")], {1: ["A pear."], 2: ["A bus."]},
    )  # fmt: skip


TABLES = [
    ("prompt,response_a,response_b,winner_model_a,winner_model_b\nA fruit?,A pear.,A bus.,1,0\n", "response_a"),
    ("prompt,response_0,response_1,better_response_id\nA fruit?,A bus.,A pear.,1\n", "better_response_id"),
    ("instruction,chosen_response,rejected_response\nA fruit?,A pear.,A bus.\n", "prompt"),
    ("prompt,model_1_output,answer_2,answer_1,score_1,score_2\nA fruit?,,A bus.,A pear.,9,1\n", "score_1"),
    ("question,conversation_a,conversation_b,winner\nA fruit?,A bus.,A pear.,model_b\n", "prompt"),
]


@pytest.mark.parametrize(("text", "named"), TABLES)
def test_a_table_with_columns_that_could_matter_is_refused_and_the_command_that_is_typed_out_reads_it(
    tmp_path, text, named
):
    (tmp_path / "in.csv").write_text(text, "utf-8")
    for name in ("auto", "csv"):
        result = run("import", name, tmp_path / "in.csv", "--out", tmp_path / "d", "--json")
        assert isinstance(result.exception, UserError)
        assert repr(named) in str(result.exception)
        assert not (tmp_path / "d").exists()
    words = shlex.split(result.exception.remedy.partition(": ")[2])
    assert words[:3] == ["rlhf", "data", "import"]
    result = run(*words[2:-1], tmp_path / "d", "--json")
    assert result.exit_code == 0, result.output
    assert last_line(result)["written"] == 1
    (record,) = open_dataset(tmp_path / "d").records()
    assert by_rank(record) == {1: ["A pear."], 2: ["A bus."]}


def test_columns_that_a_mapping_leaves_out_are_named_in_a_warning(tmp_path):
    (tmp_path / "in.csv").write_text("q,a,b,best,system,id,image\nA fruit?,A pear.,A bus.,a,Be brief.,7,\n", "utf-8")
    words = [w for o in ("prompt=q", "answers=a,b", "choice=best") for w in ("--option", o)]
    result = run("import", "csv", tmp_path / "in.csv", *words, "--out", tmp_path / "d")
    assert "columns that are not read: 'system' (system turn)" in " ".join(result.output.split())
    assert "image" not in result.output


JSON_ROWS = [
    {"question": "A fruit?", "output_j": "A pear.", "output_k": "A bus."},
    {"task_prompt": "A fruit?", "good_answer": "A pear.", "bad_answer": "A bus.", "good_source": "x"},
    {"system": "", "history": [["Hi", "Hello"]], "query": "A fruit?", "good_reply": "A pear.", "bad_reply": "A bus."},
    {"prompt": "A fruit?", "replies": [{"text": "A bus.", "rank": 2.0}, {"text": "A pear.", "rank": 1.0}]},
    {"prompt": "A fruit?", "reply_0": "A bus.", "reply_1": "A pear.", "is_reply_0_safe": True, "best_reply_id": 1},
]  # fmt: skip


@pytest.mark.parametrize("row", JSON_ROWS, ids=lambda row: ",".join(row))
def test_rows_of_no_format_are_refused_with_the_command_that_reads_them(tmp_path, row):
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    result = run("import", "auto", tmp_path / "in.jsonl", "--out", tmp_path / "d")
    words = shlex.split(result.exception.remedy.partition("Or name its fields: ")[2])
    result = run(*words[2:-1], tmp_path / "d")
    assert result.exit_code == 0, result.output
    (record,) = open_dataset(tmp_path / "d").records()
    assert by_rank(record) == {1: ["A pear."], 2: ["A bus."]}


def test_a_turn_in_a_cell_with_a_field_that_is_not_read_is_rejected_and_ignore_takes_it(tmp_path):
    turns = [{"role": "user", "content": "Name it.", "images": ["fruit.png"]}]
    reason = "prompt.images: not read, and by its name it could hold media"
    for asked in (turns, json.dumps(turns), {"messages": turns}):
        row = {"prompt": asked, "answer_1": "Pear.", "answer_2": "Car.", "rank_1": 1, "rank_2": 2}
        assert [reason.removeprefix("prompt.") in found for found in made(tmp_path, "csv", row)[1]] == [True]
        file = jsonl(tmp_path / "in.jsonl", [row])
        for name in ("images", "prompt"):
            summary = import_dataset("csv", [file], tmp_path / "d", ignored_fields=[name], overwrite=True)
            assert (summary.written, summary.rejected) == (1, 0)
    as_text = made(tmp_path, "csv", row | {"prompt": json.dumps(turns)}, json_cells=False)
    assert as_text[1] == [], "JSON that stays text has no fields"
