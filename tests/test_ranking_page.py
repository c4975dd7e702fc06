"""`rlhf data rank --share` and `--merge`: the page as a file, its scripts, and the results that come back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from ranking_votes import proposal, ranks, vote, write_candidates
from rows import last_line, run, write

from data_tools.ranking_page.book import VoteBook
from data_tools.ranking_page.page import SCRIPTS, Settings, render
from data_tools.ranking_page.server import open_items
from rlhf.data.schema import Candidate, Message
from rlhf.data.store import open_dataset

REPOSITORY = Path(__file__).resolve().parents[1]


EVIL = "</script><script>alert(1)</script><!-- **bold** \u2028"


@pytest.fixture
def candidates(tmp_path):
    return write_candidates(tmp_path)


@pytest.fixture
def items(candidates):
    return open_items(candidates)[1]


# ---- the page as a file, and its result --------------------------------------------------------------------------


def test_texts_cannot_end_the_script_and_the_file_needs_no_network(tmp_path):
    bad = replace(proposal(0), messages=(Message("user", EVIL),), candidates=(Candidate(EVIL), Candidate("b")))
    path = write(tmp_path / "c", [bad]).path
    found = run("rank", path, "--web", "--share", tmp_path / "page.html", "--annotator", "zoë")
    assert found.exit_code == 0, found.exception
    html = (tmp_path / "page.html").read_text("utf-8")
    assert html.count("</script>") == 2 and "alert(1)" in html and "<script>alert" not in html
    assert "connect-src &#39;none&#39;" in html and not re.search(r"(src|href)=\"(?!data:)", html)
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["settings"]["annotator"] == "zoë" and data["items"][0]["answers"] == [EVIL, "b"]
    assert "author" not in json.dumps(data)


def test_scripts_are_short_and_set_no_html():
    folder = REPOSITORY / "data_tools" / "ranking_page"
    assert sorted(SCRIPTS) == sorted(file.name for file in folder.glob("*.js"))
    for name in SCRIPTS:
        text = (folder / name).read_text("utf-8")
        assert len(text.splitlines()) < 400 and not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", text)
    assert "Rank answers" in render(Settings("f", "rank", 0, 1))


def result(candidates, rows, **changes):
    head = {"format": "rlhf-ranking-result", "version": 1, "fingerprint": open_dataset(candidates).fingerprint}
    path = candidates.parent / "result.json"
    path.write_text(json.dumps(head | {"mode": "rank", "seed": 0, "annotator": "zoë", "votes": rows} | changes))
    return path


def test_a_result_file_is_merged_row_by_row_and_only_once(candidates, items):
    ids = list(items)
    rows = [vote(ids[0]), vote(ids[1], [[0]]), vote("0" * 16), "x", vote(ids[2], [], verdict="skipped")]
    path = result(candidates, rows)
    found = last_line(run("rank", candidates, "--merge", path, "--json"))
    assert {name: found[name] for name in ("read", "added", "replaced", "known", "older", "rejected")} == {
        "read": 5, "added": 2, "replaced": 0, "known": 0, "older": 0, "rejected": 3,
    }  # fmt: skip
    (ranking,) = open_dataset(candidates.parent / "rankings-web.jsonl").records()
    assert ranking.annotator == "zoë" and ranking.time == "2026-01-02T03:04:05+00:00" and ranking.split == "train"
    rejected = [json.loads(line) for line in (candidates.parent / "rejected-rankings-web.jsonl").open()]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (2, "tiers: not every answer once"), (3, "item: not one of the candidates"), (4, "not an object"),
    ]  # fmt: skip
    assert last_line(run("rank", candidates, "--merge", path, "--json"))["known"] == 2


def test_a_result_that_replaces_every_vote_writes_the_rankings_once(candidates, items, monkeypatch):
    written = []
    write_rankings = VoteBook._write_rankings
    monkeypatch.setattr(VoteBook, "_write_rankings", lambda book: written.append(1) or write_rankings(book))
    for day, order in ((1, [[0], [1], [2]]), (2, [[2], [1], [0]])):
        votes = [vote(item, order, time=f"2026-01-0{day}T00:00:00+00:00") for item in items]
        run("rank", candidates, "--merge", result(candidates, votes), "--replace")
        assert len(written) == 2 * day  # when the journal is opened, and after all votes
    # the answers are shown in the order 1, 2, 0
    assert set(ranks(candidates.parent / "rankings-web.jsonl").values()) == {(2, 1, 3)}


def test_results_of_two_people_under_one_name_are_not_mixed(candidates, items):
    def merged(rows, *more, annotator="zoë"):
        return run("rank", candidates, "--merge", result(candidates, rows, annotator=annotator), *more, "--json")

    hers = [vote(item, vote=f"hers {item}") for item in [*items][:3]]
    assert last_line(merged(hers))["added"] == 3
    others = [vote(item, vote=f"others {item}", time="2026-01-01T00:00:00+00:00") for item in items]
    found = merged(others)
    assert '"zoë" has other votes on 3 of its prompts' in str(found.exception)
    found = merged(others, annotator="Zoë")
    assert 'Write "zoë" as `annotator`' in str(found.exception)
    assert last_line(merged(hers))["known"] == 3  # nothing was added
    assert last_line(merged([*hers[:2], *others[2:]]))["added"] == 1  # she went on with her result
    assert last_line(merged(others, annotator="another Zoë"))["added"] == 4
    assert last_line(merged(others, "--replace"))["older"] == 3


def test_of_two_votes_on_a_prompt_the_later_one_counts_in_whatever_order_they_are_merged(candidates, items):
    first = next(iter(items))
    later = result(candidates, [vote(first, [[0], [1], [2]], time="2026-01-02T04:30:00+01:00")])
    assert last_line(run("rank", candidates, "--merge", later, "--json"))["added"] == 1
    earlier = result(candidates, [vote(first)])
    assert last_line(run("rank", candidates, "--merge", earlier, "--json"))["older"] == 1
    assert ranks(candidates.parent / "rankings-web.jsonl") == {"Question 0?": (2, 3, 1)}
    last = result(candidates, [vote(first, time="2026-01-02T05:00:00+00:00")])
    assert last_line(run("rank", candidates, "--merge", last, "--json"))["replaced"] == 1
    assert ranks(candidates.parent / "rankings-web.jsonl") == {"Question 0?": (2, 1, 2)}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"fingerprint": "0" * 64}, "belongs to other candidates"),
        ({"format": "x"}, "is no result of a ranking page"),
        ({"version": 2}, "is no result of a ranking page"),
        ({"votes": {}}, "is no result of a ranking page"),
        ({"annotator": ""}, "annotator: empty"),
    ],
)
def test_a_file_that_is_no_result_of_these_candidates_is_refused_whole(candidates, changes, fault):
    found = run("rank", candidates, "--merge", result(candidates, [], **changes))
    assert fault in str(found.exception) and not (candidates.parent / "rankings-web.journal").exists()


def test_a_result_file_beyond_the_limit_is_refused_unread(candidates):
    with (candidates.parent / "result.json").open("wb") as file:
        file.truncate(2**28 + 1)  # without blocks on the disk
    found = run("rank", candidates, "--merge", candidates.parent / "result.json")
    assert "cannot be read: larger than 268,435,456 bytes" in str(found.exception)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "--annotator: is missing"),
        (("--web", "--annotator", "a"), "--annotator: has no effect with --web"),
        (("--annotator", "a", "--seed", "1"), "--seed: has no effect at the terminal"),
        (("--merge", "x.json", "--web"), "--web and --merge: one at a time"),
        (("--merge", "missing.json"), "--merge missing.json: cannot be read"),
        (("--share", "page.txt"), "the page is written as HTML"),
        (("--share", "p.html", "--annotator", "\x07"), "--annotator: has characters that cannot be seen"),
        (("--web", "--out", "x.csv"), "JSON lines"),
    ],
)
def test_faults_of_the_command_are_reported(candidates, words, fault):
    assert fault in str(run("rank", candidates, *words).exception)


@pytest.mark.parametrize(
    ("option", "value", "limit"), [("--per-item", "0", "1"), ("--seed", "-1", "0"), ("--port", "65536", "65535")]
)
def test_a_number_out_of_range_is_refused(candidates, option, value, limit):
    found = run("rank", candidates, "--web", option, value)
    assert found.exit_code == 2 and f"'{option}'" in found.output and f"equal to {limit}\n" in found.output
