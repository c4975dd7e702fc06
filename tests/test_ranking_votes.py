"""Votes of the ranking page: what is accepted, their files, who gets which prompt."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from ranking_votes import book, proposal, ranks, vote, write_candidates
from rows import jsonl, last_line, run, write

from data_tools.ranking_page.book import Assignment
from data_tools.ranking_page.server import open_items
from data_tools.ranking_page.votes import annotator_name, parse_vote
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord, Candidate


@pytest.fixture
def candidates(tmp_path):
    return write_candidates(tmp_path)


@pytest.fixture
def items(candidates):
    return open_items(candidates)[1]


# ---- votes -------------------------------------------------------------------------------------------------------


def test_a_vote_becomes_a_ranking_with_the_candidates_in_the_order_shown(items):
    item = next(iter(items.values()))
    ranking = parse_vote(vote(item.id), items).ranking(item)
    assert [candidate.text for candidate in ranking.candidates] == ["Answer 0.1", "Answer 0.2", "Answer 0.0"]
    assert ranking.ranks == (2, 1, 2) and ranking.shown
    assert [candidate.author for candidate in ranking.candidates] == ["author 1", "author 2", "author 0"]
    assert (ranking.annotator, ranking.seconds, ranking.source, ranking.group) == ("anna", 3.2, "test", "g")


def test_best_and_worst_leave_the_others_tied_in_between(tmp_path):
    _, items = open_items(write(tmp_path / "c", [proposal(0, 4)]).path)
    (item,) = items.values()
    row = vote(item.id, [[2], [0, 3], [1]], mode="best-worst", order=[0, 1, 2, 3])
    assert parse_vote(row, items).ranking(item).ranks == (2, 3, 1, 2)


def test_candidates_with_the_same_text_are_one_answer_and_get_one_rank(tmp_path):
    same = replace(proposal(0), candidates=(Candidate("A", "x"), Candidate("B"), Candidate("A", "y")))
    _, items = open_items(write(tmp_path / "c", [same]).path)
    (item,) = items.values()
    ranking = parse_vote(vote(item.id, [[1], [0]], order=[0, 1]), items).ranking(item)
    assert [(c.text, c.author) for c in ranking.candidates] == [("A", "x"), ("A", "y"), ("B", "")]
    assert ranking.ranks == (2, 2, 1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"item": "0" * 16}, "item: not one of the candidates"),
        ({"item": 3}, "item: not one of the candidates"),
        ({"verdict": "best"}, "verdict: not one of"),
        ({"mode": None}, "mode: not one of"),
        ({"order": [0, 1]}, "order: not every answer once"),
        ({"order": [0, 1, True]}, "order: not a list of whole numbers"),
        ({"tiers": [[0], [1]]}, "tiers: not every answer once"),
        ({"tiers": [[0], [], [1, 2]]}, "tiers: not every answer once"),
        ({"tiers": "012"}, "tiers: not a list of lists"),
        ({"tiers": [[0, 1], [2]], "mode": "best-worst"}, "not one best and one worst"),
        ({"verdict": "cannot-tell"}, "tiers: given without the verdict ranked"),
        ({"seconds": float("nan")}, "seconds: not a number"),
        ({"seconds": -1}, "seconds: not a number"),
        ({"time": "2026-01-02T03:04:05"}, "time: not ISO 8601 with a time zone"),
        ({"comment": "x" * 2001}, "comment: not text of at most"),
        ({"comment": "\ud800"}, "comment: not valid Unicode"),
        ({"annotator": " "}, "annotator: empty"),
    ],
)
def test_a_bad_vote_is_refused_with_the_field(items, changes, fault):
    with pytest.raises(BadRecord, match=fault):
        parse_vote(vote(next(iter(items))) | changes, items)


def test_a_vote_without_a_field_is_refused_with_its_name(items):
    for name in ("annotator", "verdict", "mode", "order", "seconds", "time"):
        row = vote(next(iter(items)))
        row[f"{name}_"] = row.pop(name)
        with pytest.raises(BadRecord, match=f"^{name}: is missing"):
            parse_vote(row, items)


def test_names_are_kept_in_one_form():
    assert annotator_name("  Zoe\u0308   B. ") == "Zoë B."
    for bad in ("", "x" * 81, "a\x1b[2J", "\u202eanna", None):
        with pytest.raises(BadRecord):
            annotator_name(bad)


def test_a_later_vote_replaces_the_ranking_and_the_journal_keeps_both(candidates):
    with book(candidates) as votes:
        first, second = list(votes.items)[:2]
        for row in (vote(first), vote(second), vote(first, [[0], [1], [2]])):
            votes.add(parse_vote(row, votes.items))
        assert ranks(votes.out) == {"Question 0?": (2, 3, 1), "Question 1?": (2, 1, 2)}
        votes.add(parse_vote(vote(second, [], verdict="cannot-tell"), votes.items))
        assert list(ranks(votes.out)) == ["Question 0?"]
    assert len(votes.out.with_suffix(".journal").read_text().splitlines()) == 5
    with book(candidates) as again:
        assert again.summary()["annotators"] == {"anna": {"ranked": 1, "cannot_tell": 1, "skipped": 0}}
        assert again.summary()["rankings"] == {"0": 3, "1": 1}


def test_a_comment_is_kept_with_the_ranking(candidates):
    with book(candidates) as votes:
        votes.add(parse_vote(vote(next(iter(votes.items)), comment=" both wrong "), votes.items))
    assert json.loads(votes.out.read_text())["comment"] == "both wrong"
    assert last_line(run("import", "jsonl", votes.out, "--out", candidates.parent / "d", "--json"))["written"] == 1


def test_a_journal_that_was_cut_off_loses_only_its_last_line_and_a_bad_line_is_skipped(candidates, capsys):
    with book(candidates) as votes:
        for item in list(votes.items)[:3]:
            votes.add(parse_vote(vote(item), votes.items))
    journal = votes.out.with_suffix(".journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1] + b'{"item": 1}\n' + lines[2] + lines[3][:40])
    votes.out.unlink()
    with book(candidates) as again:
        assert list(ranks(again.out)) == ["Question 0?", "Question 1?"]
    said = " ".join(capsys.readouterr().err.split())
    assert "cut off in the middle" in said and "r.journal:3: skipped: item" in said


def test_files_of_something_else_and_of_another_process_are_refused(candidates, tmp_path):
    jsonl(tmp_path / "mine.jsonl", [{"prompt": "Q?", "answer": "A"}])
    with pytest.raises(UserError, match="is there already"):
        book(candidates, "mine.jsonl")
    with book(candidates) as votes, pytest.raises(UserError, match="another `rlhf data rank` is writing it"):
        book(candidates)
    assert not votes.out.exists(), "an empty file would be no dataset"
    other = write(tmp_path / "other", [proposal(9)]).path
    with pytest.raises(UserError, match="belongs to other candidates"):
        book(other)
    (tmp_path / "x.journal").write_text("hello\n")
    with pytest.raises(UserError, match="no journal of this version"):
        book(candidates, "x.jsonl")


def test_a_vote_that_does_not_reach_the_disk_does_not_count(candidates, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with book(candidates) as votes:
        first, second = list(votes.items)[:2]
        votes.add(parse_vote(vote(first), votes.items))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match="No space left"):
                votes.add(parse_vote(vote(second), votes.items))
        assert len(votes.latest) == 1
    with book(candidates) as again:
        assert list(again.latest) == [("anna", first)]


def test_a_vote_whose_ranking_cannot_be_written_counts_and_the_file_is_made_again(candidates):
    with book(candidates) as votes:
        first, second = list(votes.items)[:2]
        votes.add(parse_vote(vote(first), votes.items))
        kept = votes.out.rename(votes.out.with_suffix(".kept"))
        votes.out.mkdir()  # so that the file cannot be written
        with pytest.raises(UserError, match=r"r\.jsonl: cannot be written: (?s:.*)Votes are kept in the journal"):
            votes.add(parse_vote(vote(second), votes.items))
        votes.out.rmdir()
        kept.rename(votes.out)
        votes.settle()
        assert list(ranks(votes.out)) == ["Question 0?", "Question 1?"]
        votes.out.unlink()
        votes.add(parse_vote(vote(list(votes.items)[2]), votes.items))
        assert list(ranks(votes.out)) == ["Question 0?", "Question 1?", "Question 2?"]


def test_rankings_that_somebody_has_edited_are_not_replaced(candidates):
    with book(candidates) as votes:
        for item in votes.items:
            votes.add(parse_vote(vote(item), votes.items))
        votes.add(parse_vote(vote(item, [[0], [1, 2]]), votes.items))
    lines = votes.out.read_text().splitlines(keepends=True)
    votes.out.write_text(lines[0] + lines[1].replace("[2, 1, 2]", "[1, 2, 3]") + lines[2])
    with pytest.raises(UserError, match=r"r\.jsonl:2: was changed"):
        book(candidates)
    votes.out.write_text("".join(lines[:2]) + lines[2][:20])  # as after a crash
    with book(candidates) as again:
        assert again.out.read_text() == "".join(lines)


# ---- who gets what -----------------------------------------------------------------------------------------------


def hand_out(assignment, name):
    item, _ = assignment.next(name)
    return item and item.id


def test_the_least_ranked_prompt_comes_first_and_two_annotators_get_different_ones(candidates):
    with book(candidates) as votes:
        ids = list(votes.items)
        desk = Assignment(votes, per_item=1)
        assert [hand_out(desk, "anna"), hand_out(desk, "bob"), hand_out(desk, "anna")] == [ids[0], ids[1], ids[0]]
        votes.add(parse_vote(vote(ids[0]), votes.items))
        assert hand_out(desk, "anna") == ids[2], "bob has the second on the screen"
        for item in ids[2:]:
            votes.add(parse_vote(vote(item), votes.items))
        assert hand_out(desk, "anna") is None, "only what bob has open is left"
        assert desk.progress("anna")["left"] == 1
        assert desk.next("anna", held_too=True) == (votes.items[ids[1]], False), "bob may have gone home"
        votes.add(parse_vote(vote(ids[1], annotator="bob"), votes.items))
        assert hand_out(desk, "bob") is None and hand_out(desk, "anna") is None


def test_without_a_number_per_prompt_everybody_ranks_everything(candidates):
    with book(candidates) as votes:
        desk = Assignment(votes)
        for item in votes.items:
            votes.add(parse_vote(vote(item), votes.items))
        assert hand_out(desk, "anna") is None and desk.progress("anna")["left"] == 0
        assert desk.progress("bob") == {"ranked": 0, "cannot_tell": 0, "skipped": 0, "left": 4, "seconds": None}
        assert desk.progress("anna")["seconds"] == 3.2


def test_skipped_prompts_come_last_and_what_nobody_can_tell_is_not_asked_again(candidates):
    with book(candidates) as votes:
        ids = list(votes.items)
        desk = Assignment(votes)
        votes.add(parse_vote(vote(ids[0], [], verdict="skipped"), votes.items))
        votes.add(parse_vote(vote(ids[1], [], verdict="cannot-tell"), votes.items))
        assert hand_out(desk, "anna") == ids[2]
        for item in ids[2:]:
            votes.add(parse_vote(vote(item), votes.items))
        assert desk.next("anna") == (votes.items[ids[0]], True)
        assert desk.history("anna") == ids[1:]
