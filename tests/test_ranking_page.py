"""`rlhf data rank --web`, `--share`, `--merge` without a browser: votes, files, who gets what, requests, results."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from rows import jsonl, last_line, run, write

from data_tools.ranking_page.book import Assignment, VoteBook
from data_tools.ranking_page.page import SCRIPTS, Settings, render
from data_tools.ranking_page.server import Desk, open_book, open_items, show
from data_tools.ranking_page.votes import annotator_name, parse_vote
from rlhf.core.errors import UserError
from rlhf.core.loopback import MOST_BYTES, LoopbackServer
from rlhf.data.schema import BadRecord, Candidate, Message, Proposal
from rlhf.data.store import open_dataset

REPOSITORY = Path(__file__).resolve().parents[1]
EVIL = "</script><script>alert(1)</script><!-- **bold** \u2028"


def proposal(number: int, answers: int = 3) -> Proposal:
    candidates = tuple(Candidate(f"Answer {number}.{k}", f"author {k}", "model") for k in range(answers))
    return Proposal((Message("user", f"Question {number}?"),), "test", "g", "train", candidates)


@pytest.fixture
def candidates(tmp_path):
    return write(tmp_path / "candidates", [proposal(i) for i in range(4)]).path


@pytest.fixture
def items(candidates):
    return open_items(candidates)[1]


def vote(item, tiers=((2,), (0, 1)), **changes):
    """A vote in its JSON form."""
    return {
        "annotator": "anna", "item": item, "verdict": "ranked", "mode": "rank", "order": [1, 2, 0], "tiers": tiers,
        "seconds": 3.25, "time": "2026-01-02T03:04:05+00:00", "comment": "", "vote": "",
    } | changes  # fmt: skip


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


# ---- the files ---------------------------------------------------------------------------------------------------


def book(candidates, name="r.jsonl") -> VoteBook:
    return open_book(*open_items(candidates), candidates.parent / name)


def ranks(path):
    return {r.messages[0].content: r.ranks for r in open_dataset(path, "ranking").records()}


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


# ---- the server --------------------------------------------------------------------------------------------------


class Client:
    """Requests to a server of a page."""

    def __init__(self, url):
        self.url = urlsplit(url)

    def send(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=60)
        for name, value in headers.items():
            assert value is not None, name
        sent = {"Content-Type": "application/json"} | {n.replace("_", "-"): v for n, v in headers.items()}
        connection.request(method, path, body, sent)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply, content

    def post(self, action, annotator="anna", **body):
        reply, content = self.send("POST", self.url.path + action, json.dumps({"annotator": annotator, **body}))
        return reply.status, json.loads(content)


@pytest.fixture
def votes(candidates):
    with book(candidates) as opened:
        yield opened


@pytest.fixture
def client(votes):
    server = LoopbackServer(Desk(votes, Settings(votes.fingerprint, "rank", 0, 4), per_item=2).routes())
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield Client(server.url)
    server.stop()
    thread.join()
    server.close()


def test_only_the_address_with_the_token_is_served_and_only_under_names_of_this_machine(client):
    page = client.url.path
    reply, content = client.send("GET", page)
    assert reply.status == 200 and content.startswith(b"<!doctype html>") and b"Answer 0" not in content
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert reply.headers["Referrer-Policy"] == "no-referrer" and reply.headers["Cache-Control"] == "no-store"
    wrong = page[:-2] + ("A" if page[-2] != "A" else "B") + "/"
    for path in ("/", "/favicon.ico", wrong, page + "../", page + "page.css", page + "save/", page.rstrip("/"), "x"):
        assert client.send("GET", path)[0].status in (404, 400), path
    for host in ("evil.example", f"evil.example:{client.url.port}", "127.0.0.1.evil.example", "localhost:1@e", ""):
        assert client.send("GET", page, Host=host)[0].status == 403, host
    assert client.send("GET", page, Host="localhost:9999")[0].status == 200, "through a tunnel"


def test_requests_of_other_sites_and_beyond_the_limits_are_refused(client):
    save, small = client.url.path + "save", b'{"annotator": "anna"}'
    assert client.send("POST", save, small, Origin="http://evil.example")[0].status == 403
    assert client.send("POST", save, small, Content_Type="text/plain")[0].status == 415
    assert client.send("POST", save, Content_Length=str(MOST_BYTES + 1))[0].status == 413
    assert client.send("POST", save, b"0\r\n\r\n", Transfer_Encoding="chunked")[0].status == 411
    assert client.send("POST", save, Content_Length="-5")[0].status == 411
    for body in (b"", b"[]", b"{", b"\xff", b'{"annotator": 1}', b"[" * 60000):
        assert client.send("POST", save, body)[0].status == 400, body[:9]
    assert client.send("PUT", save, small)[0].status == 501
    assert client.post("join")[0] == 200, "and it still serves"


def test_a_vote_is_taken_once_and_the_reply_holds_the_next_prompt(client, votes):
    _, joined = client.post("join", tab="one")
    task = joined["task"]
    assert joined["history"] == [] and task["version"] == 0 and task["vote"] is None
    assert "author" not in json.dumps(joined)
    row = vote(task["item"]["id"], vote="abc")
    for _ in range(2):  # the reply to the first is lost, so the page sends it again
        status, after = client.post("save", vote=row, version=0)
        assert status == 200 and after["task"]["item"]["id"] != task["item"]["id"]
    assert len(votes.out.read_text().splitlines()) == 1 and votes.versions["anna", row["item"]] == 1
    (ranking,) = open_dataset(votes.out).records()
    assert ranking.time > "2026-01-03", "the server's clock, not the page's"
    status, opened = client.post("open", item=row["item"])
    assert status == 200 and opened["vote"]["tiers"] == [[2], [0, 1]] and opened["version"] == 1


def test_a_vote_from_a_tab_that_has_not_seen_the_last_one_is_not_taken(client, votes):
    _, joined = client.post("join", tab="one")
    assert client.post("join", tab="two")[1]["shared"] is True
    row = vote(joined["task"]["item"]["id"], vote="from one")
    assert client.post("save", vote=row, version=0)[0] == 200
    status, now = client.post("save", vote=row | {"vote": "from two", "tiers": [[0], [1], [2]]}, version=0)
    assert status == 409 and now["vote"]["vote"] == "from one" and now["version"] == 1
    assert client.post("save", vote=row | {"vote": "from two"}, version=1)[0] == 200
    assert votes.versions["anna", row["item"]] == 2


def test_a_name_that_differs_in_capitals_alone_from_one_with_votes_is_asked_about(client, votes):
    assert client.post("join")[1]["namesake"] == ""
    item = next(iter(votes.items))
    client.post("save", vote=vote(item), version=0)
    for name, namesake in (("Anna", "anna"), ("anna", ""), ("ANNE", "")):
        body = json.dumps({"annotator": name}).encode()
        assert json.loads(client.send("POST", client.url.path + "join", body)[1])["namesake"] == namesake


def test_a_bad_vote_is_refused_and_the_page_learns_why(client, votes):
    assert client.post("save", vote=vote("0" * 16), version=0)[1] == {
        "error": "item: not one of the candidates ('0000000000000000')"
    }
    assert client.post("save", version=0)[0] == client.post("open", item="x")[0] == 400
    assert not votes.latest


def test_many_annotators_at_once_lose_no_vote(client, votes):
    acknowledged = []

    def annotate(name):
        found = client.post("join", name)[1]
        while found["task"] or found["progress"]["left"]:
            if not found["task"]:  # others have the rest open
                found = client.post("next", name)[1]
                continue
            row = vote(found["task"]["item"]["id"], vote=f"{name} {len(acknowledged)}")
            status, found = client.post("save", name, vote=row, version=found["task"]["version"])
            assert status == 200
            acknowledged.append((name, row["item"]))

    threads = [threading.Thread(target=annotate, args=(f"annotator {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(acknowledged) == sorted(votes.latest)
    assert votes.summary()["rankings"] == {"2": 4}
    assert len(votes.out.read_text().splitlines()) == len(acknowledged)


def process(candidates, *words):
    command = [sys.executable, "-m", "stages.cli", "data", "rank", str(candidates), "--web", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = next(line.strip() for line in server.stdout if line.startswith("http"))
    return server, url


@pytest.mark.slow
def test_a_kill_of_the_server_loses_no_acknowledged_vote_and_ctrl_c_ends_with_a_summary(candidates):
    server, url = process(candidates)
    client = Client(url)
    found = client.post("join")[1]
    done = []
    for _ in range(3):
        row = vote(found["task"]["item"]["id"], vote=f"v{len(done)}")
        found = client.post("save", vote=row, version=0)[1]
        done.append(row["item"])
    before = url
    server.kill()
    server.wait()
    server.stdout.close()
    out = candidates.parent / "rankings-web.jsonl"
    assert len(ranks(out)) == 3
    server, url = process(candidates, "--json")
    assert url == before, "pages that are open go on"
    assert (candidates.parent / "rankings-web.address").stat().st_mode & 0o777 == 0o600
    assert Client(url).post("join")[1]["history"] == done
    server.send_signal(signal.SIGINT)
    said, _ = server.communicate(timeout=120)
    assert server.returncode == 0 and json.loads(said.splitlines()[-1])["annotators"]["anna"]["ranked"] == 3


def test_a_summary_without_votes_names_no_file(candidates, items, capsys):
    with open_book(open_dataset(candidates), items, None) as book:
        show(book.summary())
    assert capsys.readouterr().out == "no vote yet; the same command continues\n"


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
