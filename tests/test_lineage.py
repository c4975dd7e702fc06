"""`rlhf data lineage`: the chain of parents as a tree, with what has gone or changed since."""

from __future__ import annotations

import pytest
from rows import dataset, jsonl, last_line, prompts, run

from data_tools.curate.filter import filter_dataset
from data_tools.curate.lineage import faults, lineage
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """rows.jsonl -> imported -> clean, other.jsonl; both -> mixed -> split."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", [*prompts(20), *prompts(3), {"prompt": ""}])
    jsonl(tmp_path / "other.jsonl", [{"prompt": f"Other {i}?"} for i in range(10)])
    run("import", "jsonl", "rows.jsonl", "--out", "imported", "--overwrite")
    run("dedup", "imported", "--out", "clean", "--overwrite")
    run("mix", "clean", "other.jsonl", "--out", "mixed", "--overwrite")
    run("split", "mixed", "--out", "split", "--seed", 0, "--overwrite")
    return tmp_path


def test_the_tree_goes_back_to_the_files(chain):
    result = run("lineage", "split", "--json")
    assert result.exit_code == 0, result.output
    names = ["split", "mixed", "clean", "imported", "rows.jsonl", "other.jsonl"]
    prints = {name: open_dataset(name).fingerprint[:12] for name in names if name != "rows.jsonl"}
    lines = result.stdout.splitlines()[:-1]
    assert lines[0] == f"split  {prints['split']}  30 prompts"
    assert lines[1] == "│ rlhf data split mixed --seed 0"
    assert lines[2] == "│ written 30"
    assert lines[3] == f"└─ mixed  {prints['mixed']}  30 prompts"
    assert f"   ├─ clean  {prints['clean']}  20 prompts" in lines
    assert "   │  │ written 20, dropped 3" in lines
    assert f"   │  └─ imported  {prints['imported']}  23 prompts" in lines
    assert "   │     │ read 24, written 23, rejected 1" in lines
    assert any(line.startswith("   │     └─ rows.jsonl  ") for line in lines)
    assert lines[-1] == f"   └─ other.jsonl  {prints['other.jsonl']}  prompts"
    found = last_line(result)
    assert found == lineage("split") and faults(found) == 0
    assert found["parents"][0]["parents"][0]["parents"][0]["files"][0]["state"] == "ok"


def test_parents_and_files_that_changed_or_are_gone_are_marked(chain):
    jsonl(chain / "rows.jsonl", prompts(2))
    (chain / "other.jsonl").unlink()
    found = lineage("split")
    clean, other = found["parents"][0]["parents"]
    assert other["state"] == "missing" and clean["parents"][0]["files"][0]["state"] == "changed"
    result = run("lineage", "split")
    assert "other.jsonl" in result.output and "MISSING" in result.output and "CHANGED since" in result.output
    assert "2 of the inputs are missing or have changed" in result.output
    dataset(chain / "imported", prompts(5))
    (chain / "other.jsonl").mkdir()
    clean, other = lineage("split")["parents"][0]["parents"]
    assert other["state"] == "unreadable" and "no manifest.json" in other["fault"]
    before, now = clean["parents"][0]["fingerprint"], clean["parents"][0]["now"]
    assert clean["parents"][0]["state"] == "changed" and "parents" not in clean["parents"][0]
    assert now == open_dataset("imported").fingerprint != before
    assert f"imported  {before[:12]}  CHANGED since: now {now[:12]}" in run("lineage", "split").output
    assert "UNREADABLE: other.jsonl: not a complete dataset" in run("lineage", "split").output


def test_a_dataset_that_was_written_over_its_own_parent_ends_the_chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "a", prompts(3))
    filter_dataset("a", "b", where="turns == 1")
    filter_dataset("b", "a", where="turns == 1", overwrite=True)  # the same records, so the same fingerprint
    found = lineage("b")
    assert found["parents"][0]["parents"][0]["state"] == "again"
    assert faults(found) == 0


def test_a_file_has_no_parents_and_nothing_is_an_error(tmp_path):
    found = lineage(jsonl(tmp_path / "d.jsonl", prompts(2)))
    assert found["parents"] == found["files"] == [] and found["command"] is None
    with pytest.raises(UserError, match="there is no dataset"):
        lineage(tmp_path / "nowhere")
