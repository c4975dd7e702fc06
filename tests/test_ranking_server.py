"""`rlhf data rank --web`: requests, many annotators at once, kills."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest
import tiny
from ranking_votes import book, ranks, vote, write_candidates

from data_tools.ranking_page.page import Settings
from data_tools.ranking_page.server import Desk, open_book, open_items, show
from rlhf.core.loopback import MOST_BYTES, LoopbackServer
from rlhf.data.store import open_dataset


@pytest.fixture
def candidates(tmp_path):
    return write_candidates(tmp_path)


@pytest.fixture
def items(candidates):
    return open_items(candidates)[1]


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
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "PYTHONUNBUFFERED": "1"}
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
