"""`rlhf data rank`: orders as people type them, what is on the disk when, undo, skip, quit, kill, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import last_line, run, write

from data_tools.annotate.terminal import RankingsFile, default_out, parse_order, show_order
from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Message, Proposal, Ranking, dense_ranks
from rlhf.data.store import open_dataset

REPOSITORY = Path(__file__).resolve().parents[1]


# ---- orders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("2 > 1 = 4 > 3", (2, 1, 3, 2)),
        ("2>1=4>3", (2, 1, 3, 2)),
        ("2143", (2, 1, 4, 3)),
        ("2 1 4 3", (2, 1, 4, 3)),
        (" 2, 1 = 4, 3 ", (2, 1, 3, 2)),
        ("1=2=3=4", (1, 1, 1, 1)),
        ("21=43", (2, 1, 3, 2)),
    ],
)
def test_an_order_names_the_best_answer_first_and_ties_by_the_equals_sign(text, ranks):
    assert parse_order(text, 4) == ranks


def test_with_ten_answers_numbers_need_separators():
    assert parse_order("10 > 1 2 3 4 5 6 7 8 = 9", 10) == (2, 3, 4, 5, 6, 7, 8, 9, 9, 1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("2 > 1", "missing: 3, 4"),
        ("2 > 1 > 2 > 3", "answer 2 appears twice"),
        ("5 1 2 3", "there is no answer 5; they are numbered 1 to 4"),
        ("0123", "there is no answer 0"),
        ("2 < 1 3 4", "'<' is neither"),
        ("two", "'t' is neither"),
        ("٢143", "'٢' is neither"),
        ("> 2143", "> needs an answer on both sides"),
        ("2 > = 143", "= needs an answer on both sides"),
        ("2143 =", "= needs an answer on both sides"),
        ("", "missing: 1, 2, 3, 4"),
    ],
)
def test_what_is_no_order_is_reported_with_the_fault(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_order(text, 4)


@given(st.lists(st.integers(1, 12), min_size=2, max_size=12).map(dense_ranks))
def test_an_order_that_is_shown_reads_back_as_the_same_ranks(ranks):
    assert parse_order(show_order(ranks), len(ranks)) == ranks


# ---- sessions through a pipe -------------------------------------------------------------------------------------


def proposal(number: int, answers: int = 4) -> Proposal:
    candidates = tuple(Candidate(f"Answer {number}.{k}", f"run {k}", "model") for k in range(1, answers + 1))
    return Proposal((Message("user", f"Question {number}?"),), "test", "g", "train", candidates)


@pytest.fixture
def candidates(tmp_path):
    write(tmp_path / "candidates", [proposal(i) for i in range(4)])
    return tmp_path / "candidates"


def told(candidates: Path, *lines: str, annotator: str = "anna", words: tuple[str, ...] = ()):
    """A session in which these lines are typed."""
    from typer.testing import CliRunner

    from data_tools.commands.cli import app

    words = ("rank", str(candidates), "--annotator", annotator, "--json", *words)
    return CliRunner().invoke(app, words, input="".join(line + "\n" for line in lines))


def saved(path: Path) -> list[Ranking]:
    return list(open_dataset(path, "ranking").records())


def test_a_ranking_is_what_was_typed_with_annotator_time_and_the_order_shown(candidates):
    found = told(candidates, "2 > 1 = 4 > 3", "q")
    (ranking,) = saved(candidates.parent / "rankings-anna.jsonl")
    assert ranking.ranks == (2, 1, 3, 2)
    assert ranking.candidates == proposal(0).candidates and ranking.shown
    assert (ranking.source, ranking.group, ranking.split) == ("test", "g", "train")
    assert ranking.annotator == "anna" and ranking.time is not None and ranking.time.endswith("+00:00")
    assert ranking.seconds is not None and ranking.seconds < 60
    assert last_line(found)["ranked"] == 1 and last_line(found)["left"] == 3


def test_nothing_says_who_wrote_an_answer(candidates):
    shown = told(candidates, "1234", "s", "q").stdout
    assert "Answer 1.3" in shown and "run" not in shown and "model" not in shown


def test_a_session_continues_where_the_last_one_stopped(candidates):
    told(candidates, "1234", "1234", "q")
    found = told(candidates, "4321", "4321")
    assert "3 of 4" in found.stdout and "Question 1?" not in found.stdout
    assert last_line(found) | {"out": ""} == {
        "out": "", "annotator": "anna", "proposals": 4, "ranked": 4, "left": 0, "skipped": 0,
    }  # fmt: skip
    assert [r.ranks[0] for r in saved(candidates.parent / "rankings-anna.jsonl")] == [1, 1, 4, 4]
    assert "Question" not in told(candidates).stdout, "all is done"


def test_a_skipped_prompt_is_not_saved_and_comes_again_next_time(candidates):
    found = told(candidates, "s", "1234", "q")
    assert last_line(found)["skipped"] == 1
    assert "Question 0?" in told(candidates, "q").stdout
    assert [r.messages[0].content for r in saved(candidates.parent / "rankings-anna.jsonl")] == ["Question 1?"]


def test_undo_takes_the_last_ranking_off_the_disk_and_asks_again(candidates):
    found = told(candidates, "1234", "2134", "u", "4321", "q")
    rankings = saved(candidates.parent / "rankings-anna.jsonl")
    assert [r.ranks for r in rankings] == [(1, 2, 3, 4), (4, 3, 2, 1)]
    assert last_line(found)["ranked"] == 2


def test_undo_after_a_skip_brings_the_skipped_prompt_back(candidates):
    found = told(candidates, "1234", "s", "u", "4321", "q")
    assert [r.messages[0].content for r in saved(candidates.parent / "rankings-anna.jsonl")] == [
        "Question 0?", "Question 1?",
    ]  # fmt: skip
    assert last_line(found)["skipped"] == 0


def test_undo_reaches_back_into_an_earlier_session_and_stops_at_the_first_ranking(candidates):
    told(candidates, "1234", "q")
    found = told(candidates, "u", "u", "q")
    assert "nothing to take back" in found.stdout and last_line(found)["ranked"] == 0
    assert not (candidates.parent / "rankings-anna.jsonl").exists(), "an empty file would be no dataset"


def test_undo_does_not_touch_what_another_annotator_added_to_the_same_file(candidates):
    out = candidates.parent / "both.jsonl"
    told(candidates, "1234", "q", words=("--out", str(out)))
    told(candidates, "4321", "q", annotator="bob", words=("--out", str(out)))
    found = told(candidates, "u", "q", words=("--out", str(out)))
    assert "nothing to take back" in found.stdout
    assert [r.annotator for r in saved(out)] == ["anna", "bob"]


def test_what_is_no_ranking_is_asked_again(candidates):
    found = told(candidates, "12", "", "best is 2", "h", "1234", "q")
    assert "missing: 3, 4" in found.stdout and "'b' is neither" in found.stdout
    assert last_line(found)["ranked"] == 1


def test_identical_answers_with_different_ranks_are_refused_with_the_reason(tmp_path):
    same = replace(proposal(0, 3), candidates=(Candidate("A"), Candidate("B"), Candidate("A")))
    write(tmp_path / "candidates", [same])
    found = told(tmp_path / "candidates", "123", "1=3>2")
    assert "identical candidates have different ranks" in found.stdout and last_line(found)["ranked"] == 1


def test_escape_sequences_in_texts_do_not_reach_the_terminal(tmp_path):
    bad = Proposal(
        (Message("user", "Q\x1b]0;title\x07 [red]?"),), candidates=(Candidate("\x1b[2Jgone"), Candidate("b\r\nc\x9b1m"))
    )
    write(tmp_path / "candidates", [bad])
    shown = told(tmp_path / "candidates", "12").stdout
    assert not any(mark in shown for mark in "\x1b\x07\x9b\r")
    assert "[red]?" in shown and "[2Jgone" in shown


def test_long_answers_are_wrapped_and_nothing_of_them_is_left_out(tmp_path):
    long = "ж" * 950
    write(tmp_path / "c", [replace(proposal(0, 2), candidates=(Candidate(long), Candidate("one two " * 40)))])
    shown = told(tmp_path / "c", "12").stdout
    assert shown.count("ж") == 950 and shown.count("two") == 40
    assert max(len(line) for line in shown.splitlines() if "ж" in line or "two" in line) <= 100


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_the_default_file_is_named_after_the_annotator_and_is_in_the_folder_of_the_candidates():
    assert default_out(Path("data/r1/candidates"), "Anna B.") == Path("data/r1/rankings-Anna-B..jsonl")
    assert default_out(Path("c"), "../../etc/x").parent == Path(".")


def test_a_file_of_something_else_is_not_added_to(candidates):
    out = candidates.parent / "demos.jsonl"
    out.write_text('{"prompt": "Q?", "answer": "A"}\n', "utf-8")
    found = told(candidates, "1234", words=("--out", str(out)))
    assert isinstance(found.exception, UserError) and "demos.jsonl:1" in str(found.exception)
    assert out.read_text("utf-8") == '{"prompt": "Q?", "answer": "A"}\n'


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--annotator", " "), "--annotator: empty"),
        (("--annotator", "a", "--out", "x.parquet"), "JSON lines"),
        (("--annotator", "a", "--out", "."), "JSON lines"),
    ],
)
def test_faults_of_the_command_are_reported(candidates, words, fault):
    assert fault in str(run("rank", candidates, *words).exception)


def test_rankings_are_no_proposals(tmp_path):
    one = proposal(0)
    write(tmp_path / "r", [Ranking(one.messages, candidates=one.candidates, ranks=(1, 2, 3, 4))])
    assert "proposals are needed" in str(run("rank", tmp_path / "r", "--annotator", "a").exception)


def test_two_sessions_cannot_write_one_file(candidates):
    out = candidates.parent / "rankings-anna.jsonl"
    with RankingsFile(out), pytest.raises(UserError, match="another `rlhf data rank` is writing it"):
        RankingsFile(out)


# ---- what a crash leaves -----------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_reported_and_asked_again(candidates):
    told(candidates, "1234", "2134", "q")
    out = candidates.parent / "rankings-anna.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])
    found = told(candidates, "3214", "q")
    assert "cut off in the middle" in found.stderr and last_line(found)["ranked"] == 2
    assert [r.ranks[0] for r in saved(out)] == [1, 3]


def test_a_last_line_without_its_newline_is_kept(candidates):
    told(candidates, "1234", "q")
    out = candidates.parent / "rankings-anna.jsonl"
    out.write_bytes(out.read_bytes().rstrip(b"\n"))
    told(candidates, "4321", "q")
    assert [r.ranks[0] for r in saved(out)] == [1, 4]


def process(candidates: Path, **pipes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stages.cli", "data", "rank", str(candidates), "--annotator", "anna"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, **pipes)


def test_a_kill_in_the_middle_loses_only_the_prompt_that_was_on_the_screen(candidates):
    session = process(candidates, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert session.stdin is not None and session.stdout is not None
    session.stdin.write(b"1234\n2134\n34")  # the third is being typed
    session.stdin.flush()
    seen = b""
    while seen.count(b"Saved") < 2:
        seen += os.read(session.stdout.fileno(), 4096)
    session.kill()
    session.wait()
    session.stdin.close()
    session.stdout.close()
    out = candidates.parent / "rankings-anna.jsonl"
    assert [r.ranks for r in saved(out)] == [(1, 2, 3, 4), (2, 1, 3, 4)]
    assert "3 of 4" in told(candidates, "q").stdout


def test_a_full_disk_is_reported_and_leaves_whole_lines(candidates, monkeypatch):
    out = candidates.parent / "rankings-anna.jsonl"
    told(candidates, "1234", "q")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with RankingsFile(out) as file:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            file.add(file.rankings[0])
    assert len(saved(out)) == 1


# ---- a real terminal ---------------------------------------------------------------------------------------------


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, candidates: Path) -> None:
        self.handle, side = pty.openpty()
        self.process = process(candidates, stdin=side, stdout=side, stderr=side, start_new_session=True)
        os.close(side)
        self.unread = ""

    def until(self, text: str, seconds: float = 240) -> str:
        """What is shown up to the next `text`."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, self.unread
            if select.select([self.handle], [], [], 0.1)[0]:
                self.unread += os.read(self.handle, 4096).decode(errors="replace")
        shown, found, self.unread = self.unread.partition(text)
        return shown + found

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def end(self) -> int:
        status = self.process.wait(120)
        os.close(self.handle)
        return status


def test_it_works_in_a_terminal_with_line_editing_and_ends_with_ctrl_d(candidates):
    terminal = Terminal(candidates)
    terminal.until("order> ")
    terminal.type("1243\x7f\x7f34\n")  # two characters taken back
    assert "Saved: 1 > 2 > 3 > 4" in terminal.until("2 of 4")
    terminal.until("order> ")
    terminal.type("\x04")
    assert "1 of 4 ranked" in terminal.until("The same command continues")
    assert terminal.end() == 0


def test_ctrl_c_ends_with_130_and_everything_saved(candidates):
    terminal = Terminal(candidates)
    terminal.until("order> ")
    terminal.type("4=3>1=2\n")
    terminal.until("2 of 4")
    terminal.until("order> ")
    time.sleep(0.5)  # as a person would: a signal in the moment between prompt and reading waits for the next key
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.until("1 of 4 ranked")
    assert terminal.end() == 130
    rows = [json.loads(line) for line in (candidates.parent / "rankings-anna.jsonl").read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [[2, 2, 1, 1]]
