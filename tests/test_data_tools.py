"""`rlhf data validate|stats`: every fault listed, every figure counted."""

from __future__ import annotations

import gzip
import json

import pytest
from rows import DEMONSTRATION, RANKING, dataset, jsonl, last_line, prompts, run

from data_tools.curate.stats import stats
from data_tools.curate.validate import validate
from rlhf.core.errors import UserError
from rlhf.data.jsonl import from_dict
from rlhf.data.writer import DatasetWriter

# ---- validate --------------------------------------------------------------------------------------------------------


def test_validate_passes_a_whole_dataset_and_a_clean_file(tmp_path):
    for path in (dataset(tmp_path / "d", [RANKING]), jsonl(tmp_path / "d.jsonl", [RANKING])):
        result = run("validate", path, "--json")
        assert result.exit_code == 0, result.output
        assert last_line(result) | {"path": "", "reasons": {}} == {
            "path": "", "kind": "ranking", "ok": True, "read": 1, "good": 1, "bad": 0, "reasons": {}, "bad_rows": [],
            "faults": [],
        }  # fmt: skip


def test_validate_lists_every_bad_row_with_line_and_reason(tmp_path):
    rows = [RANKING, {"prompt": ""}, DEMONSTRATION, RANKING, {**RANKING, "id": "beef"}]
    result = run("validate", jsonl(tmp_path / "d.jsonl", rows), "--json")
    assert result.exit_code == 1
    said = last_line(result)
    assert (said["read"], said["good"], said["bad"], said["ok"]) == (5, 2, 3, False)
    assert [(row["line"], row["reason"]) for row in said["bad_rows"]] == [
        (2, "a prompt where a ranking is needed"),
        (3, "a demonstration where a ranking is needed"),
        (5, "id: not the content hash"),
    ]
    for line in (2, 3, 5):
        assert f"d.jsonl:{line}: " in result.stdout


def test_validate_finds_damage_in_shards_and_wrong_counts_in_the_manifest(tmp_path):
    folder = dataset(tmp_path / "d", prompts(50))
    shard = folder / "shard-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"x")
    assert any("SHA-256" in fault for fault in validate(folder)["faults"])
    shard.write_bytes(b"PAR1")
    assert any("damaged after row 0" in fault for fault in validate(folder)["faults"])
    shard.unlink()
    assert any("missing" in fault for fault in validate(folder)["faults"])
    assert run("validate", folder).exit_code == 1
    shard.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"count": 51, "splits": {"train": 50}}))
    faults = validate(folder)["faults"]
    assert len(faults) == 2
    assert "count is 51, the shards hold 50" in faults[0]


def test_validate_reports_a_broken_file_and_refuses_what_is_none(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 9)[:-9])
    assert "damaged after line" in validate(tmp_path / "cut.jsonl.gz")["faults"][0]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert validate(tmp_path / "empty.jsonl")["faults"] == [f"{tmp_path / 'empty.jsonl'}: no row"]
    with pytest.raises(UserError, match="there is no dataset"):
        validate(tmp_path / "nowhere")


# ---- stats -----------------------------------------------------------------------------------------------------------


def test_stats_count_what_is_there(tmp_path):
    four = {"prompt": "B?", "candidates": ["aa", "b", "c", "dddd"], "ranks": [1, 1, 2, 3], "annotator": "ann"}
    rows = [
        {**RANKING, "source": "s", "annotator": "bob", "split": "train"},
        {**RANKING, "source": "s", "annotator": "ann", "split": "eval"},
        {**four, "source": "t", "group": "g", "split": "train"},
        {**four, "source": "t", "group": "g", "split": "train"},
    ]
    found = stats([dataset(tmp_path / "d", rows)])
    assert (found["records"], found["prompts"]) == (4, 2)
    assert found["split"] == {"train": 3, "eval": 1}
    assert found["source"] == {"s": 2, "t": 2}
    assert found["annotator"] == {"ann": 3, "bob": 1}
    assert found["group"] == {"none": 2, "g": 2}
    assert found["k"] == {3: 2, 4: 2}
    assert found["ties"] == {"pairs": 18, "tied_pairs": 4, "tied_share": 4 / 18, "rankings_with_tie": 4}
    assert found["lengths"]["answer"] == {
        "mean": (2 * (5 + 5 + 4) + 2 * (2 + 1 + 1 + 4)) / 14,
        "p50": 4,
        "p95": 5,
        "max": 5,
    }
    assert found["duplicates"] == {"records": 1, "prompts": 2}
    assert found["leaks"] == {"prompts": 1, "examples": [from_dict(RANKING).prompt_id]}


def test_stats_print_tables_and_json_for_every_kind(tmp_path):
    for kind, row in {"prompt": {"prompt": "?"}, "demonstration": DEMONSTRATION, "ranking": RANKING}.items():
        result = run("stats", jsonl(tmp_path / f"{kind}.jsonl", [row, {"prompt": 3}]), "--json")
        assert result.exit_code == 0, result.output
        said = last_line(result)
        assert said["kind"] == {kind: 1}
        assert said["datasets"][0]["rejected"] == 1
        assert "length in characters" in result.stdout


def test_stats_of_an_empty_dataset_invent_no_numbers(tmp_path):
    with DatasetWriter(tmp_path / "d", "ranking"):
        pass
    result = run("stats", tmp_path / "d", "--json")
    assert result.exit_code == 0, result.output
    assert last_line(result)["ties"]["tied_share"] is None
    assert last_line(result)["lengths"] == {"prompt": None, "answer": None}
