"""Files and folders appear under their name only when they are complete, and replace what was there as a whole."""

from __future__ import annotations

import os

import pytest

from rlhf.core.files import partial_path, whole_folder, write_json, write_text


def fill(folder, text):
    with whole_folder(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text(text)
        assert not folder.exists() or (folder / "inner" / "file").read_text() != text


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_folder_appears_at_the_end_and_replaces_an_earlier_one(tmp_path):
    for text in ("one", "two"):
        fill(tmp_path / "d", text)
        assert (tmp_path / "d" / "inner" / "file").read_text() == text
        assert names(tmp_path) == ["d"]


def test_an_exception_removes_the_partial_folder_and_keeps_the_earlier_one(tmp_path):
    fill(tmp_path / "d", "one")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "d") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["d"] and (tmp_path / "d" / "inner" / "file").read_text() == "one"


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    fill(tmp_path / "d", "one")
    os.rename(tmp_path / "d", tmp_path / ".d.old")  # killed between the two renames
    partial_path(tmp_path / "d").mkdir()
    (partial_path(tmp_path / "d") / "half").write_text("half")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "d"):
        raise RuntimeError
    assert names(tmp_path) == ["d"] and (tmp_path / "d" / "inner" / "file").read_text() == "one"


@pytest.mark.parametrize("write", [lambda path: write_text(path, "one"), lambda path: fill(path, "one")])
def test_what_is_written_is_on_the_disk_before_it_has_its_name(write, tmp_path, monkeypatch):
    done, rename, replace = [], os.rename, os.replace
    inode = lambda path: os.stat(path).st_ino  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    for name, move in (("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, lambda a, b, move=move: (done.append("named"), move(a, b)))
    write(tmp_path / "new")
    written = [inode(path) for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"))]
    assert set(written) <= set(done[: done.index("named")])


def test_a_text_file_that_cannot_be_written_keeps_its_earlier_content(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Zoë"})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "name": "Zoë"\n}\n'
