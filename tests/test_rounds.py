"""A round's folder: what counts as rankings that came, what a round takes, and what its dataset says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rows import jsonl, write

from data_tools.annotate.rounds import Round, collect, new_rankings, sources
from data_tools.curate.lineage import faults, lineage
from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Message, Proposal, Ranking
from rlhf.data.store import open_dataset


def proposal(number: int) -> Proposal:
    return Proposal((Message("user", f"Question {number}?"),), candidates=(Candidate("A"), Candidate("B")))


def ranking(number: int, annotator: str = "anna") -> Ranking:
    of = proposal(number)
    return Ranking(of.messages, candidates=of.candidates, ranks=(2, 1), annotator=annotator)


def row(number: int, annotator: str = "anna") -> dict[str, object]:
    return {"prompt": f"Question {number}?", "candidates": ["A", "B"], "ranks": [2, 1], "annotator": annotator}


@pytest.fixture
def rounds(tmp_path: Path) -> list[Round]:
    """Two rounds with the proposals 0 to 3 and 4 to 7."""
    found = [Round(n, tmp_path / f"round-{n}") for n in (1, 2)]
    for one in found:
        one.folder.mkdir()
        write(one.candidates, [proposal(4 * (one.number - 1) + i) for i in range(4)])
    return found


def test_rankings_come_as_datasets_and_as_jsonl_files_and_nothing_else_counts(rounds):
    folder = rounds[0].folder
    write(folder / "rankings-tool", [ranking(0)])
    jsonl(folder / "rankings-anna.jsonl", [row(1)])
    (folder / "rankings-bob.jsonl").touch()  # opened, and nothing ranked yet
    (folder / "rankings-anna.jsonl~").write_text("an editor's copy")
    (folder / "rankings-half").mkdir()
    assert [d.path.name for d in rounds[0].sources()] == ["rankings-anna.jsonl", "rankings-tool"]
    assert len(new_rankings(rounds[:1], sources(rounds[:1]))) == 2


def test_a_dataset_of_another_kind_among_the_rankings_is_reported(rounds):
    write(rounds[0].folder / "rankings", [proposal(0)])
    with pytest.raises(UserError, match="contains proposals, but rankings are needed"):
        rounds[0].sources()


def test_the_same_ranking_from_two_places_counts_once_and_two_annotators_count_twice(rounds):
    jsonl(rounds[0].folder / "rankings-1.jsonl", [row(0), row(1)])
    jsonl(rounds[0].folder / "rankings-2.jsonl", [row(1), row(1, "bob")])
    assert collect(rounds[:1]) == 3


def test_what_comes_after_a_round_went_on_counts_in_the_next_and_nothing_twice(rounds):
    file = rounds[0].folder / "rankings.jsonl"
    jsonl(file, [row(0)])
    collect(rounds[:1])
    jsonl(file, [row(0), row(1)])
    jsonl(rounds[1].folder / "rankings.jsonl", [row(4)])
    assert collect(rounds) == 2
    taken = [list(open_dataset(one.collected, "ranking").records()) for one in rounds]
    assert [[r.messages[0].content for r in found] for found in taken] == [
        ["Question 0?"],
        ["Question 1?", "Question 4?"],
    ]


def test_bad_rows_of_what_came_are_rejected_with_the_reason(rounds):
    jsonl(rounds[0].folder / "rankings.jsonl", [row(0), {**row(1), "ranks": [1, 2, 3]}])
    assert collect(rounds[:1]) == 1
    (rejected,) = (rounds[0].collected / "rejected.jsonl").read_text("utf-8").splitlines()
    assert json.loads(rejected)["line"] == 2


def test_nothing_is_made_of_nothing(rounds):
    with pytest.raises(UserError, match="no ranking yet"):
        collect(rounds[:1])
    assert not rounds[0].collected.exists()


def test_a_round_is_a_dataset_with_parents_and_the_lineage_shows_when_they_changed(rounds, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf", "pipeline", "--config", "x.yaml"])
    jsonl(rounds[0].folder / "rankings.jsonl", [row(0)])
    collect(rounds[:1])
    told = lineage(rounds[0].collected)
    assert told["command"] == "rlhf pipeline --config x.yaml" and faults(told) == 0
    assert [Path(p["path"]).name for p in told["parents"]] == ["candidates", "rankings.jsonl"]
    jsonl(rounds[0].folder / "rankings.jsonl", [row(0), row(1)])
    assert lineage(rounds[0].collected)["parents"][1]["state"] == "changed"
