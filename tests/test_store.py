"""Datasets on disk: the writer's promise, the reader's refusals, and JSONL as people really have it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import GeneratorType

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import DEMONSTRATION, RANKING, prompt_records, records, write

from rlhf.core import limits
from rlhf.core.errors import UserError
from rlhf.data import store
from rlhf.data import writer as writing
from rlhf.data.jsonl import from_dict, read_jsonl, to_dict
from rlhf.data.schema import KINDS, Message, Prompt
from rlhf.data.store import open_dataset, read_shard, shard_faults
from rlhf.data.writer import DatasetWriter

# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=12, deadline=None, database=None)
@given(data=st.data())
def test_any_records_come_back_from_parquet_and_from_jsonl(tmp_path_factory, kind, data):
    items = data.draw(st.lists(records(kind), min_size=1, max_size=5))
    folder = tmp_path_factory.mktemp("round")
    assert list(write(folder / "d", items).records()) == items
    lines = folder / "d.jsonl"
    lines.write_text("".join(json.dumps(to_dict(item)) + "\n" for item in items), "utf-8")
    assert list(open_dataset(lines, kind).records()) == items


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_empty_dataset_is_a_dataset(tmp_path, kind):
    dataset = write(tmp_path / "d", [], kind)
    assert list(dataset.records()) == []
    assert dataset.splits() == {}
    assert (dataset.kind, dataset.manifest["count"]) == (kind, 0)


def test_scores_that_are_whole_numbers_are_stored_as_floats(tmp_path):
    candidates = [{"text": "a", "score": 3}, {"text": "b", "score": 10**30}, {"text": "c"}]
    item = from_dict({"prompt": "?", "candidates": candidates, "ranks": [1, 2, 3]})
    (read,) = write(tmp_path / "d", [item]).records()
    assert [c.score for c in read.candidates] == [3.0, 1e30, None]


def test_long_records_are_converted_few_at_a_time(tmp_path):
    with DatasetWriter(tmp_path / "d", "prompt") as writer:
        for size, most in ((1, writing.ROWS_PER_TABLE), (400_000, 10), (5_000_000, 1)):
            writer.write_all([Prompt((Message("user", "x" * size),))])
            assert writer.table_rows == most


def test_rows_of_many_megabytes_do_not_fill_a_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CHARS_PER_GROUP", 1_000_000)
    items = [from_dict({"prompt": f"{i}" + "x" * 700_000}) for i in range(6)]
    dataset = write(tmp_path / "d", items)
    import pyarrow.parquet as pq

    assert pq.ParquetFile(tmp_path / "d" / "shard-00000.parquet").num_row_groups == 3
    assert list(dataset.records()) == items


def test_shards_are_cut_and_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 4)
    items = prompt_records(11)
    dataset = write(tmp_path / "d", items)
    assert [shard["rows"] for shard in dataset.manifest["shards"]] == [4, 4, 3]
    assert list(dataset.records()) == items


def test_records_can_be_taken_of_one_split(tmp_path):
    items = prompt_records(3, split="train") + prompt_records(2, split="eval") + prompt_records(1)
    dataset = write(tmp_path / "d", items)
    assert len(list(dataset.records("eval"))) == 2
    assert dataset.splits() == {"train": 3, "eval": 2, None: 1}


# ---- opening -------------------------------------------------------------------------------------------------------


def test_records_are_read_lazily(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 2)
    dataset = write(tmp_path / "d", prompt_records(6))
    (tmp_path / "d" / "shard-00001.parquet").write_bytes(b"not parquet")
    stream = dataset.records()
    assert isinstance(stream, GeneratorType)
    assert len([next(stream), next(stream)]) == 2, "the first shard is read before the second is looked at"
    with pytest.raises(UserError, match=r"shard-00001\.parquet: damaged"):
        next(stream)


def test_a_damaged_or_missing_shard_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 2)
    dataset = write(tmp_path / "d", prompt_records(6))
    shard = tmp_path / "d" / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20] + bytes(20))
    open_dataset(tmp_path / "d")
    with pytest.raises(UserError, match="its SHA-256 differs"):
        open_dataset(tmp_path / "d", verify=True)
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        open_dataset(tmp_path / "d")
    assert dict(shard_faults(open_dataset(tmp_path / "d", damaged_ok=True))) == {"shard-00001.parquet": "missing"}
    shard.write_bytes(whole)
    assert open_dataset(tmp_path / "d", verify=True).fingerprint == dataset.fingerprint


def test_a_shard_made_by_hand_is_checked_row_by_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "d", prompt_records(3))
    shard = tmp_path / "d" / "shard-00000.parquet"
    rows = pq.read_table(shard).to_pylist()
    rows[1]["messages"][0]["content"] = "changed"
    pq.write_table(pa.Table.from_pylist(rows), shard)
    found = []
    assert len(list(read_shard(shard, "prompt", found.append, check_ids=True))) == 2
    assert [(row.line, row.reason) for row in found] == [(2, "id: not the content hash")]
    rows[1]["messages"][0]["content"] = ""
    pq.write_table(pa.Table.from_pylist(rows), shard)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-00000\.parquet:2: messages\.content: empty"):
        list(open_dataset(tmp_path / "d").records())


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("", "not a dataset manifest"),
        ("[]", "not a dataset manifest"),
        ("{}", "not a dataset manifest"),
        ('{"schema_version": 1, "kind": "prompt", "shards": [3]}', "not a dataset manifest"),
        ('{"schema_version": 1, "kind": "prompt", "shards": [{"file": "a"}]}', "not a dataset manifest"),
        ('{"schema_version": [1], "kind": "prompt", "shards": []}', "not a dataset manifest"),
        ('{"schema_version": 1, "kind": ["prompt"], "shards": []}', "kind"),
        ('{"schema_version": 1, "kind": "prompt", "shards": [], "splits": 3}', "not a dataset manifest"),
        ("[" * 100_000, "not a dataset manifest"),
        ('{"schema_version": 99, "kind": "prompt", "shards": []}', "schema version 99"),
        ('{"schema_version": 1, "kind": "poem", "shards": []}', "kind 'poem'"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def with_shard_named(folder, name):
    """A dataset of three prompts whose manifest calls its shard `name`."""
    write(folder, prompt_records(3))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["../outside.parquet", "{folder}/outside.parquet", "d/../../outside.parquet", ".", ""])
@pytest.mark.parametrize("damaged_ok", [False, True])
def test_a_shard_outside_of_the_folder_is_not_read(tmp_path, name, damaged_ok):
    name = name.format(folder=tmp_path)
    folder = with_shard_named(tmp_path / "d", name)
    shutil.copy(folder / "shard-00000.parquet", tmp_path / "outside.parquet")
    with pytest.raises(UserError, match=f"the shard {re.escape(repr(name))} is not a file of this folder"):
        open_dataset(folder, damaged_ok=damaged_ok)


def test_a_shard_that_is_a_link_to_the_outside_is_not_read(tmp_path):
    shard = write(tmp_path / "d", prompt_records(3)).path / "shard-00000.parquet"
    shard.rename(tmp_path / "outside.parquet")
    shard.symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(UserError, match="is not a file of this folder"):
        open_dataset(tmp_path / "d")
    shard.unlink()
    shard.symlink_to("inside.parquet")
    (tmp_path / "outside.parquet").rename(tmp_path / "d" / "inside.parquet")
    (tmp_path / "link").symlink_to("d")
    assert len(list(open_dataset(tmp_path / "link").records())) == 3


def test_every_flipped_byte_of_a_shard_is_found_when_it_is_read(tmp_path):
    shard = write(tmp_path / "d", prompt_records(3)).path / "shard-00000.parquet"
    whole = shard.read_bytes()
    for place in range(0, len(whole), len(whole) // 60):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"shard-00000\.parquet: damaged: its SHA-256 differs"):
            list(open_dataset(tmp_path / "d").records())
        assert dict(shard_faults(open_dataset(tmp_path / "d")))


def test_what_is_not_a_dataset_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match="not a complete dataset"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="there is no dataset"):
        open_dataset(tmp_path / "nowhere")
    write(tmp_path / "d", prompt_records(1))
    with pytest.raises(UserError, match=rf"there is no dataset(.|\n)*nearby: {tmp_path}/d$"):
        open_dataset(tmp_path / "dd" / "e")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "d" / "e", prompt_records(1))
    with pytest.raises(UserError, match=rf"there is no dataset(.|\n)*nearby: {tmp_path}/deep/d/e$"):
        open_dataset(tmp_path / "deep" / "nowhere")
    with pytest.raises(UserError, match=rf"no manifest.json\n.*Name a dataset in it: {tmp_path}/d$"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="contains prompts, but rankings are needed"):
        open_dataset(tmp_path / "d", "ranking")
    with pytest.raises(UserError, match="unknown kind of record 'rank'"):
        open_dataset(tmp_path / "d", "rank")


# ---- JSONL ---------------------------------------------------------------------------------------------------------


def read(path, kind=None):
    bad = []
    return list(read_jsonl(path, kind, bad.append)), bad


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b\\u2028c"}\n{"prompt": "d"}')
    good, bad = read(file)
    assert [item.messages[0].content for item in good] == ["a", "b\u2028c", "d"]
    assert bad == []


BAD_LINES = [
    (b"{", "not valid JSON"),
    (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
    (b'{"prompt": "a\x00b"}', "not valid JSON"),
    (b"\x00" * 50, "not valid JSON"),
    (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    (b'{"prompt": "a", "x": NaN}', "not valid JSON"),
    (b'{"prompt": "a", "x": -Infinity}', "not valid JSON"),
    (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "not valid JSON"),
    (b"[]", "not an object"),
    (b'{"prompt": "\\ud800"}', "messages.content: not valid Unicode (a lone surrogate)"),
    (b'{"prompt": "a", "answer": "b"}', "a demonstration where a prompt is needed"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_set_aside_with_its_number_and_the_rest_is_read(tmp_path, line, reason):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"prompt": "first"}\n\n' + line + b'\n{"prompt": "last"}\n')
    good, bad = read(file)
    assert [item.messages[0].content for item in good] == ["first", "last"]
    assert [(row.file, row.line, row.reason) for row in bad] == [(str(file), 3, reason)]
    assert len(str(bad[0])) < 400 + len(str(file))
    assert bad[0].raw.encode()[:5] == line[:5] or b"\\xff" in bad[0].raw.encode()


def test_the_first_usable_row_decides_the_kind(tmp_path):
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": ""}, DEMONSTRATION, RANKING, {"prompt": "x"}, DEMONSTRATION]
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = open_dataset(file)
    assert dataset.kind == "demonstration"
    for _ in range(2):  # a second pass does not count the rejects twice
        assert len(list(dataset.records())) == 2
        assert [row.line for row in dataset.rejects] == [1, 3, 4]
    with pytest.raises(UserError, match="contains demonstrations, but rankings"):
        open_dataset(file, "ranking")


def test_rejects_kept_in_memory_are_cut_and_those_handed_on_are_whole(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "ok"}\n{"prompt": 3, "x": "' + "y" * 50_000 + '"}\n')
    dataset, whole = open_dataset(file), []
    list(dataset.records())
    list(dataset.records(on_reject=whole.append))
    assert len(dataset.rejects[0].raw) == store.RAW_KEPT
    assert len(whole[0].raw) > 50_000


@pytest.mark.parametrize("name", ["d.jsonl.gz", "no-suffix", "d.jsonl"])
def test_gzip_is_recognised_by_its_bytes(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 3))
    dataset = open_dataset(file)
    assert len(list(dataset.records())) == 3
    assert dataset.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


def test_damaged_gzip_and_empty_files_are_refused(tmp_path):
    file = tmp_path / "d.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % i for i in range(20_000)))
    for content, message in [
        (b'{"prompt": "a"}\n', "the name ends in .gz but the content is not gzip"),
        (whole[: len(whole) // 2], "damaged after line"),
        (whole[:-8] + bytes(8), "damaged after line"),
        (whole[:200] + bytes(200) + whole[400:], "damaged after line"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(open_dataset(file).records())
    for content, message in [(b"", "empty"), (b"\n\n", "empty"), (b"no\n" * 3, "First fault: .*:1: not valid JSON")]:
        (tmp_path / "d.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / "d.jsonl")


def test_zstd_is_read_whole_and_a_stream_that_is_cut_off_is_refused(tmp_path):
    file = tmp_path / "d.jsonl.zst"
    whole = zstandard.compress(b"".join(b'{"prompt": "%d"}\n' % i for i in range(20_000)))
    file.write_bytes(whole + whole)
    assert len(list(open_dataset(file).records())) == 40_000
    for size in (len(whole) - 1, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"damaged after line .*cut off"):
            list(open_dataset(file).records())
    file.write_bytes(b'{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"ends in \.zst but the content is not zstd"):
        open_dataset(file)


ROW = b'{"prompt": "a"}\n'


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_file_that_unpacks_to_hundreds_of_times_its_size_is_left(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(limits, "UNPACKED_BYTES", 1 << 17)
    file = tmp_path / "d.jsonl.packed"
    for content in (bytes(1 << 20), ROW * 9 + b" " * (1 << 20), b"\n" * (1 << 20) + ROW):
        file.write_bytes(pack(content))
        with pytest.raises(UserError, match=r"it unpacks to more than 200 times its size"):
            list(open_dataset(file).records())
    text = b"".join(b'{"prompt": "%d"}\n' % i**30 for i in range(1500))
    file.write_bytes(pack(text))
    assert len(text) > 1 << 17 and len(list(open_dataset(file).records())) == 1500


def test_a_line_that_is_too_long_is_rejected_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ROW_BYTES", 1000)
    file = tmp_path / "d.jsonl"
    long = b'{"prompt": "' + b"a" * 5000 + b'"}'
    file.write_bytes(ROW + long + b"\n" + ROW + long)
    good, bad = read(file)
    assert len(good) == 2
    assert [(row.line, row.reason, row.detail) for row in bad] == [
        (line, "a line that is too long", "more than 1,000 bytes") for line in (2, 4)
    ]
    file.write_bytes(ROW[:-1].ljust(999) + b"\n" + ROW)
    assert [len(found) for found in read(file)] == [2, 0]


def test_importing_the_store_does_not_load_pyarrow():
    code = "import sys, rlhf.data.store, rlhf.data.schema; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
