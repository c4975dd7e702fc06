"""`rlhf data import`: every row accounted for, whatever the files hold and whenever the process dies."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import DEMONSTRATION, RANKING, dataset, jsonl, last_line, prompts, run, tree

from data_tools.curate.stats import stats
from data_tools.curate.validate import validate
from data_tools.importers import pairs
from data_tools.importers.run import NothingUsable, find_files, import_dataset
from rlhf.core.errors import UserError
from rlhf.core.files import whole_folder
from rlhf.data.columns import as_record
from rlhf.data.store import open_dataset

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
HH = SHARED / "data" / "preferences" / "hh_harmless_base_test.jsonl.gz"


def transcript(*turns):
    """Turns from the human on, as HH-RLHF writes them."""
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(turns))


def hh_row(*turns, chosen="yes", rejected="no"):
    turns = turns or ("may I?",)
    return {"chosen": transcript(*turns, chosen), "rejected": transcript(*turns, rejected)}


SAMPLES = {
    "hh-rlhf": [hh_row(), hh_row("a", "b", "c"), {"chosen": 1}, hh_row(chosen="")],
    "jsonl": [RANKING, {**RANKING, "prompt": "Another?"}, {"prompt": ""}, DEMONSTRATION],
}
"""Two good rows, then two bad ones."""


# ---- HH-RLHF ---------------------------------------------------------------------------------------------------------


def hh(tmp_path, *rows):
    """(records, reasons) of an import."""
    try:
        summary = import_dataset("hh-rlhf", [jsonl(tmp_path / "in.jsonl", rows)], tmp_path / "d", overwrite=True)
    except NothingUsable as error:
        return [], error.summary.reasons
    return list(open_dataset(tmp_path / "d").records()), summary.reasons


def test_a_field_called_nearly_like_one_that_the_row_lacks_is_named_once(tmp_path):
    rows = [{**DEMONSTRATION, "auther": "bo", "note": "x"}, {**DEMONSTRATION, "prompt": "Another?", "auther": "al"}]
    result = run("import", "jsonl", jsonl(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0 and last_line(result)["written"] == 2
    assert result.stderr.count("is not read; did you mean") == 1
    assert "the field 'auther' is not read; did you mean 'author'?" in result.stderr


def test_a_transcript_becomes_a_prompt_and_two_ranked_answers(tmp_path):
    ((record,), _) = hh(tmp_path, hh_row("hello", "hi", "may I?", chosen=" Yes.\n\nPlease do. ", rejected="no"))
    assert [(m.role, m.content) for m in record.messages] == [
        ("user", "hello"), ("assistant", "hi"), ("user", "may I?"),
    ]  # fmt: skip
    assert [(c.text, c.author_kind) for c in record.candidates] == [("Yes.\n\nPlease do.", "model"), ("no", "model")]
    assert record.ranks == (1, 2)
    assert record.source == "hh-rlhf"


def test_two_marks_of_one_speaker_are_one_turn(tmp_path):
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c\n\nHuman: d\n\nAssistant: e\n\nAssistant: f",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c\n\nHuman: d\n\nAssistant: g",
    }
    ((record,), _) = hh(tmp_path, row)
    assert [m.content for m in record.messages] == ["a", "b\n\nc", "d"]
    assert [c.text for c in record.candidates] == ["e\n\nf", "g"]


def test_a_mark_inside_a_line_is_text(tmp_path):
    ((record,), _) = hh(tmp_path, hh_row("Is it Human: or Assistant:?", chosen="Human: both\nAssistant: yes"))
    assert record.messages[0].content == "Is it Human: or Assistant:?"
    assert record.candidates[0].text == "Human: both\nAssistant: yes"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": transcript("a", "b")}, "not a row of chosen and rejected text"),
        ({"chosen": ["a"], "rejected": ["b"]}, "not a row of chosen and rejected text"),
        ({"chosen": "", "rejected": ""}, "a transcript does not begin with 'Human:' or 'Assistant:'"),
        ({"chosen": "Hello." + transcript("a", "b"), "rejected": "x"}, "a transcript does not begin with"),
        (
            {"chosen": transcript("a", "b", "c"), "rejected": transcript("a", "b", "c")},
            "does not end with 'Assistant:'",
        ),
        (hh_row(chosen="  "), "an answer is empty"),
        (hh_row(chosen="same", rejected=" same "), "the two answers are identical"),
        ({"chosen": transcript("a", "b"), "rejected": transcript("A", "c")}, "differ before the last answer"),
        ({"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "e")}, "differ before the last answer"),
        (hh_row("", "b", "c"), "messages.content: empty"),
        ({"chosen": "\n\nAssistant: hi", "rejected": "\n\nAssistant: ho"}, "messages: none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_without_two_answers_to_one_prompt_is_rejected(tmp_path, row, reason):
    found, reasons = hh(tmp_path, row)
    assert found == []
    assert [reason in key for key in reasons] == [True]


@pytest.mark.skipif(not HH.exists(), reason="../shared is absent")
def test_of_the_real_2312_rows_the_four_with_an_empty_answer_are_rejected(tmp_path):
    summary = import_dataset("hh-rlhf", [HH], tmp_path / "d")
    assert (summary.read, summary.written, summary.rejected) == (2312, 2308, 4)
    assert summary.reasons == {"an answer is empty": 4}
    rejected = [json.loads(line) for line in (tmp_path / "d" / "rejected.jsonl").open(encoding="utf-8")]
    assert [row["line"] for row in rejected] == [87, 517, 926, 1104]
    assert validate(tmp_path / "d")["ok"]
    found = stats([tmp_path / "d"])
    assert found["k"] == {2: 2308}
    assert (found["prompts"], found["ties"]["tied_pairs"]) == (2306, 0)


PIECES = ["\n\nHuman:", "\n\nAssistant:", " hello", "\n\n", " ", "Human:", " \u00e9\ud800", " yes."]
TRANSCRIPTS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)


@settings(max_examples=400, deadline=None, database=None)
@given(head=TRANSCRIPTS, chosen=TRANSCRIPTS, rejected=TRANSCRIPTS)
@example(head="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", chosen=" yes.", rejected=" no.")
@example(
    head="\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:", chosen="f", rejected="g"
)
def test_the_fast_way_through_a_usual_transcript_gives_what_the_slow_one_gives(head, chosen, rejected):
    row = {"chosen": head + chosen, "rejected": head + rejected}
    usual = pairs._usual(row)
    if usual is not None:
        slow = pairs.hh_rlhf(row)
        assert (as_record(usual), *usual[:2]) == (slow, slow.id, slow.prompt_id)


@pytest.mark.skipif(not HH.exists(), reason="../shared is absent")
def test_nearly_all_real_transcripts_are_usual_and_come_out_as_by_the_slow_way():
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    made = [(ranking, row) for row in rows if (ranking := pairs._usual(row)) is not None]
    assert all(as_record(ranking) == pairs.hh_rlhf(row) for ranking, row in made)
    assert len(made) > 0.9 * len(rows)


# ---- files, output, command line -------------------------------------------------------------------------------------


def test_folders_and_patterns_mean_their_files_in_a_fixed_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*paths):
        return [str(file.relative_to(tmp_path)) for file in find_files(paths, (".jsonl", ".jsonl.gz"))]

    assert names(tmp_path) == ["a.jsonl.gz", "b.jsonl", "deep/c.jsonl"]
    assert names(f"{tmp_path}/*.jsonl") == ["b.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl", tmp_path) == ["b.jsonl", "deep/c.jsonl", "a.jsonl.gz"]
    assert names(tmp_path / "notes.txt") == ["notes.txt"], "a file named outright is taken whatever its suffix"
    (tmp_path / "odd[1].jsonl").write_text("x")
    assert names(tmp_path / "odd[1].jsonl") == ["odd[1].jsonl"]


def test_wrong_input_is_reported_before_anything_is_written(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [RANKING])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "plain.jsonl.gz").write_bytes(good.read_bytes())
    (tmp_path / "folder").mkdir()
    dataset(tmp_path / "whole", [RANKING])
    before = sorted(p.name for p in tmp_path.iterdir())
    for importer, name, message in [
        ("hh-rlfh", "good.jsonl", "unknown format 'hh-rlfh'; did you mean 'hh-rlhf'"),
        ("jsonl", "nowhere.jsonl", "no file there"),
        ("jsonl", "no*.jsonl", "no file there"),
        ("jsonl", "folder", "no file there"),
        ("jsonl", "whole", "is a dataset already"),
        ("jsonl", "empty.jsonl", "empty"),
        ("jsonl", "blank.jsonl", "The files hold no row"),
        ("jsonl", "plain.jsonl.gz", "is not gzip"),
    ]:
        with pytest.raises(UserError, match=message):
            import_dataset(importer, [tmp_path / name], tmp_path / "d", overwrite=True)
    with pytest.raises(UserError, match="no split is called 'dev'"):
        import_dataset("jsonl", [good], tmp_path / "d", split="dev", overwrite=True)
    with pytest.raises(UserError, match="exists and is not a dataset"):
        import_dataset("jsonl", [good], good)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_files_of_different_kinds_are_refused(tmp_path):
    jsonl(tmp_path / "a.jsonl", [RANKING])
    jsonl(tmp_path / "b.jsonl", [DEMONSTRATION])
    with pytest.raises(UserError, match=r"b\.jsonl: a demonstration in a dataset of rankings"):
        import_dataset("jsonl", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_an_import_of_nothing_keeps_the_dataset_that_stood_there(tmp_path):
    dataset(tmp_path / "d", [RANKING])
    before = tree(tmp_path / "d")
    with pytest.raises(NothingUsable):
        import_dataset("hh-rlhf", [jsonl(tmp_path / "in.jsonl", [RANKING])], tmp_path / "d", overwrite=True)
    assert tree(tmp_path / "d") == before


def test_a_new_import_takes_the_old_rejects_away(tmp_path):
    import_dataset("jsonl", [jsonl(tmp_path / "in.jsonl", SAMPLES["jsonl"])], tmp_path / "d")
    import_dataset("jsonl", [jsonl(tmp_path / "in.jsonl", [RANKING])], tmp_path / "d", overwrite=True)
    assert not (tmp_path / "d" / "rejected.jsonl").exists()


def test_the_cli_prints_one_json_object_last_and_the_manifest_says_where_the_rows_came_from(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", SAMPLES["hh-rlhf"])
    options = ["--split-name", "train", "--source", "mine", "--json"]
    result = run("import", "hh-rlhf", source, "--out", tmp_path / "d", *options)
    assert result.exit_code == 0, result.output
    said = last_line(result)
    assert {key: said[key] for key in ("read", "written", "rejected")} == {"read": 4, "written": 2, "rejected": 2}
    assert said["reasons"] == {"an answer is empty": 1, "not a row of chosen and rejected text": 1}
    made = open_dataset(tmp_path / "d", verify=True)
    assert {(record.source, record.split) for record in made.records()} == {("mine", "train")}
    origin = made.manifest["origin"]
    assert origin["command"] == f"rlhf data import hh-rlhf {source} --split-name train --source mine"
    assert origin["files"][0]["path"] == str(source)
    assert {key: said[key] for key in ("read", "written", "rejected", "reasons")}.items() <= origin.items()


def test_the_cli_prints_the_json_object_also_when_nothing_was_usable(tmp_path):
    result = run("import", "hh-rlhf", jsonl(tmp_path / "in.jsonl", [RANKING] * 3), "--out", tmp_path / "d", "--json")
    assert isinstance(result.exception, UserError)
    assert last_line(result)["rejected"] == last_line(result)["read"] == 3


def test_importing_the_cli_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'pyarrow', 'datasets', 'numpy', 'deepspeed'}"
    found = f"{heavy} & set(sys.modules)"
    code = f"import sys, data_tools.commands.cli; assert not {found}, sorted({found})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_command_that_writes_a_dataset_refuses_one_that_is_there_without_overwrite(tmp_path):
    source, out = jsonl(tmp_path / "in.jsonl", [RANKING, {**RANKING, "prompt": "Another?"}]), tmp_path / "d"
    parent = dataset(tmp_path / "parent", [RANKING])
    rows = jsonl(tmp_path / "tasks.jsonl", [{"text": "Good.", "label": "yes"}])
    fields = ["--field", "text=text", "--field", "label=label"]
    for words in (
        ["import", "jsonl", source],
        ["filter", parent, "--where", "k > 1"],
        ["dedup", parent],
        ["split", parent, "--allow-empty"],
        ["mix", parent],
        ["aggregate", parent, "--method", "majority"],
        ["tasks", rows, "--family", "classification", *fields, "--choices", "no,yes"],
    ):
        first = run(*words, "--out", out)
        assert first.exit_code == 0, (words, first.output)
        before = tree(out)
        again = run(*words, "--out", out)
        assert isinstance(again.exception, UserError), words
        assert "a dataset is there already" in str(again.exception)
        assert "--overwrite" in str(again.exception)
        assert tree(out) == before
        result = run(*words, "--out", out, "--overwrite")
        assert result.exit_code == 0, (words, result.output)
        shutil.rmtree(out)


TWO_IMPORTS = """
import sys
from data_tools.importers.run import import_dataset
print("ready", flush=True)
sys.stdin.readline()
import_dataset("jsonl", [sys.argv[1]], sys.argv[2], overwrite=True)
"""


@pytest.mark.slow
def test_of_two_imports_into_one_place_one_wins_whole_and_the_other_is_refused(tmp_path):
    out = tmp_path / "d"
    sources = [jsonl(tmp_path / f"{n}.jsonl", prompts(n)) for n in (6_000, 8_000)]
    command = [sys.executable, "-c", TWO_IMPORTS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, source, out], cwd=ROOT, **pipes) for source in sources]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in both]
    for process, error in zip(both, errors):
        assert process.returncode == 0 or "another process is writing it" in error
    assert 0 in [process.returncode for process in both]
    made = open_dataset(out, verify=True)
    assert sum(1 for _ in made.records()) == made.manifest["count"] in (6_000, 8_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6000.jsonl", "8000.jsonl", "d"]


def test_a_folder_that_is_being_written_is_refused_and_stays(tmp_path):
    with whole_folder(tmp_path / "d") as folder:
        (folder / "first").write_text("1")
        with pytest.raises(UserError, match="another process is writing it"), whole_folder(tmp_path / "d"):
            pass
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["first"]


SLOW_IMPORT = """
import sys
import rlhf.data.writer
from data_tools.importers.run import import_dataset
rlhf.data.writer.ROWS_PER_GROUP = 1  # so slow that the kill always falls into the middle
print("ready", flush=True)
import_dataset("jsonl", [sys.argv[1]], sys.argv[2], overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True], ids=["new", "over another dataset"])
def test_a_killed_import_leaves_no_dataset_that_looks_whole(tmp_path, existing):
    source = jsonl(tmp_path / "in.jsonl", [*prompts(10_000), {"prompt": ""}])
    out = tmp_path / "d"
    if existing:
        dataset(out, [RANKING])
    process = subprocess.Popen([sys.executable, "-c", SLOW_IMPORT, source, out], cwd=ROOT, stdout=subprocess.PIPE)
    shard = tmp_path / ".d.partial" / "shard-00000.parquet"
    limit = time.monotonic() + 240
    while not (shard.exists() and shard.stat().st_size > 10_000) and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the import ended before the kill"
    if existing:
        assert open_dataset(out, verify=True).kind == "ranking", "the old dataset is still whole"
    else:
        with pytest.raises(UserError, match="there is no dataset"):
            open_dataset(out)
    with pytest.raises(UserError, match="not a complete dataset"):
        open_dataset(tmp_path / ".d.partial")
    import_dataset("jsonl", [jsonl(source, prompts(3))], out, overwrite=True)
    assert open_dataset(out, verify=True).manifest["count"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "in.jsonl"]
