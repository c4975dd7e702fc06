"""Datasets are written whole, in shards and groups of bounded size, or not at all."""

from __future__ import annotations

import os

import pytest
from rows import RANKING, prompt_records, tree, write

from rlhf.core.errors import UserError
from rlhf.data.jsonl import from_dict
from rlhf.data.schema import BadRecord
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, prompt_records(20), origin={"from": "x"})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert open_dataset(tmp_path / "a").fingerprint == open_dataset(tmp_path / "b").fingerprint


def test_an_exception_leaves_nothing_and_keeps_what_stood_there(tmp_path):
    write(tmp_path / "d", prompt_records(2))
    before = tree(tmp_path / "d")
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d", "prompt", overwrite=True) as writer:
        writer.write(prompt_records(1)[0])
        raise RuntimeError
    with pytest.raises(UserError, match="a dataset is there already"), DatasetWriter(tmp_path / "d", "prompt"):
        pass
    assert tree(tmp_path / "d") == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_dataset_of_the_name_is_replaced(tmp_path):
    write(tmp_path / "d", prompt_records(5))
    assert open_dataset(write(tmp_path / "d", [from_dict(RANKING)]).path).kind == "ranking"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_dataset_that_stepped_aside_comes_back_at_the_next_write(tmp_path):
    write(tmp_path / "d", prompt_records(5))
    os.rename(tmp_path / "d", tmp_path / ".d.old")  # as after a kill between the two renames
    with pytest.raises(UserError, match="a dataset is there already"), DatasetWriter(tmp_path / "d", "prompt"):
        pass
    assert open_dataset(tmp_path / "d").manifest["count"] == 5


def test_an_empty_folder_and_a_link_to_one_may_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    monkeypatch.chdir(tmp_path)
    write("d", prompt_records(1))
    assert open_dataset("link").manifest["count"] == 1
    write("link", prompt_records(2))
    assert open_dataset("d").manifest["count"] == 2
    assert (tmp_path / "link").is_symlink()


def test_the_current_folder_is_not_replaced_under_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"):
        write(".", prompt_records(1))


def test_a_folder_that_is_not_a_dataset_is_not_written_over(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("d", "file"):
        with pytest.raises(UserError, match="exists and is not a dataset"):
            write(tmp_path / name, prompt_records(1))
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "below", prompt_records(1))
    assert (tmp_path / "d" / "thesis.txt").read_text() == "years"


def test_a_writer_takes_one_kind(tmp_path):
    with pytest.raises(UserError, match="unknown kind of record 'rankings'\ndid you mean 'ranking'"):
        DatasetWriter(tmp_path / "d", "rankings")
    with pytest.raises(BadRecord, match="a ranking in a dataset of prompts"), DatasetWriter(tmp_path / "d", None) as w:
        w.write(prompt_records(1)[0])
        w.write(from_dict(RANKING))
    with pytest.raises(UserError, match="there are no records to write"), DatasetWriter(tmp_path / "d", None):
        pass
    assert list(tmp_path.iterdir()) == []
