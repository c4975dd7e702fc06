"""What every dataset that is made from datasets keeps of its parents."""

from __future__ import annotations

import sys

import pytest
from rows import RANKING, jsonl, run

from data_tools.io.derive import Derivation
from rlhf.core.errors import UserError
from rlhf.data.jsonl import from_dict
from rlhf.data.store import open_dataset


def judged_twice(folder):
    """A dataset in which two people ranked each of 30 prompts, with their agreement in its manifest."""
    rows = [{**RANKING, "prompt": f"Question {i}?", "annotator": who} for i in range(30) for who in ("ann", "ben")]
    file = jsonl(folder.with_suffix(".jsonl"), rows)
    assert run("import", "jsonl", file, "--out", folder, "--overwrite").exit_code == 0
    file.unlink()
    assert open_dataset(folder).manifest["agreement"]["annotators"] == 2
    return folder


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["dedup", "--by", "prompt"], True),
        (["filter", "--where", "annotator == 'ann'"], True),
        (["split"], True),
        (["aggregate", "--method", "majority"], False),
    ],
)
def test_what_is_known_of_annotators_holds_for_their_judgements_and_not_for_a_majority(tmp_path, command, told):
    parent = judged_twice(tmp_path / "d")
    result = run(command[0], parent, *command[1:], "--out", tmp_path / "n")
    assert result.exit_code == 0, result.output
    agreement = open_dataset(tmp_path / "n").manifest["agreement"]
    assert agreement == (open_dataset(parent).manifest["agreement"] if told else None)


def test_the_manifest_names_parents_command_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf", "data", "some", "a b", "--out", "n"])
    parent = open_dataset(judged_twice(tmp_path / "d"))
    with Derivation(tmp_path / "n", None, [parent], {"more": 1}) as made:
        made.write(from_dict(RANKING))
    origin = open_dataset(tmp_path / "n", verify=True).manifest["origin"]
    assert origin["command"] == "rlhf data some 'a b'"
    assert origin["parents"] == [{"path": str(parent.path), "fingerprint": parent.fingerprint}]
    assert (origin["more"], origin["written"], origin["rejected"]) == (1, 1, 0)


def test_a_failure_leaves_no_dataset_and_a_parent_is_never_overwritten(tmp_path):
    parent = open_dataset(judged_twice(tmp_path / "d"))
    with pytest.raises(RuntimeError), Derivation(tmp_path / "n", "ranking", [parent]) as made:
        made.write(from_dict(RANKING))
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
    with pytest.raises(UserError, match="is the parent dataset itself"):
        Derivation(parent.path, "ranking", [parent])
