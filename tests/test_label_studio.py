"""Label Studio: what annotators see, and that the ranking which comes home is the one that was made.

The slow tests start a real Label Studio from the package index in an environment of its own (LABEL_STUDIO_VENV, or made
on the spot in about a minute).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rows import last_line, run

from data_tools.annotate import label_studio
from data_tools.annotate.label_studio import label_config, pull, push, task
from rlhf.core.errors import UserError
from rlhf.data.jsonl import from_dict, to_dict
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <i>there</i>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Tell a joke."},
]
ROWS = [
    {
        "prompt": "Name a fruit.", "split": "train", "group": "food", "source": "mine",
        "candidates": [
            {"text": "A car.", "author": "sft", "author_kind": "model"},
            {"text": "An <b>apple</b>.", "author": "ppo", "author_kind": "model"},
            {"text": "Pear.", "author": "eva", "author_kind": "person"},
        ],
    },
    {"prompt": "What is the news?", "split": "eval", "candidates": ["None.", "<script>x</script>", "Rain.", "Snow."]},
    {"messages": CHAT, "candidates": ["Knock knock.", "No."]},
    {"prompt": "Another?", "candidates": ["Yes.", "No."]},
]  # fmt: skip


@pytest.fixture
def candidates(tmp_path):
    """A dataset of four proposals."""
    with DatasetWriter(tmp_path / "candidates", "proposal", overwrite=True) as writer:
        for row in ROWS:
            writer.write(from_dict(row))
    return tmp_path / "candidates"


# ---- without a server --------------------------------------------------------------------------------------------


def test_a_task_holds_the_prompt_and_the_answers_and_not_who_wrote_them():
    made = task(from_dict(ROWS[0]))
    assert made["prompt"] == "Name a fruit."
    assert [item["body"] for item in made["items"]] == ["A car.", "An <b>apple</b>.", "Pear."]
    assert [item["title"] for item in made["items"]] == ["Answer 1", "Answer 2", "Answer 3"]
    assert not {"sft", "ppo", "eva", "model", "person"} & set(json.dumps(made).replace('"', " ").split())
    said = task(from_dict(ROWS[2]))["prompt"]
    assert said == "SYSTEM: Be brief.\n\nUSER: Hi <i>there</i>\n\nASSISTANT: Hello.\n\nUSER: Tell a joke."


@pytest.mark.parametrize("places", [None, 2, 5])
def test_the_interface_is_xml_with_the_buckets_best_first(places):
    config = label_config(places)
    assert ET.fromstring(config).find("Ranker").get("name") == "ranking"
    names = ["ranked"] if places is None else [f"place-{i + 1}" for i in range(places)]
    assert label_studio._buckets(config) == names


@pytest.mark.parametrize("config", ["", "<View>", "<View><Choices name='x'/></View>"])
def test_an_interface_without_our_ranker_has_no_buckets(config):
    assert label_studio._buckets(config) == []


def annotation(number, who, updated, cancelled=False):
    return {"id": number, "completed_by": who, "updated_at": updated, "was_cancelled": cancelled}


def test_the_last_ranking_of_each_person_counts_and_cancelled_ones_stay_to_be_counted():
    each = {"annotations": [
        annotation(1, 7, "2026-01-01"), annotation(4, 7, "2026-01-03"), annotation(2, 8, "2026-01-02"),
        annotation(3, 8, "2026-01-05", cancelled=True),
    ]}  # fmt: skip
    gone = label_studio._keep_latest(each, {7: "ann@example.com"})
    assert [one["id"] for one in gone] == [1]
    assert [(one["id"], one["completed_by"]) for one in each["annotations"]] == [
        (2, 8), (4, "ann@example.com"), (3, 8),
    ]  # fmt: skip


def test_without_a_key_or_a_server_the_command_says_what_to_do(candidates, monkeypatch):
    monkeypatch.delenv(label_studio.KEY, raising=False)
    with pytest.raises(UserError, match="LABEL_STUDIO_API_KEY is not set"):
        push(candidates, "http://127.0.0.1:1")
    monkeypatch.setenv(label_studio.KEY, "x" * 40)
    with pytest.raises(UserError, match="no answer from a Label Studio server") as error:
        push(candidates, "http://127.0.0.1:1")
    assert "xxxx" not in str(error.value)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1: no answer from a Label Studio server") as error:
        push(candidates, "http://me:secret@127.0.0.1:1")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="no answer from a Label Studio server"):
        pull(candidates, "no url", candidates.parent / "r")
    assert not (candidates.parent / "r").exists()


def test_only_proposals_are_pushed(tmp_path):
    rankings = tmp_path / "r.jsonl"
    rankings.write_text('{"prompt": "a", "candidates": ["b", "c"], "ranks": [1, 2]}\n')
    with pytest.raises(UserError, match="contains rankings, but proposals are needed"):
        push(rankings, "http://127.0.0.1:1")


# ---- with a real server ------------------------------------------------------------------------------------------

VERSION = "1.23.2"
TOKEN, EMAIL, PASSWORD = "0123456789abcdef0123456789abcdef01234567", "ann@example.com", "rank-well-1"


@pytest.fixture(scope="module")
def environment():
    """The environment with Label Studio and selenium."""
    place = Path(os.environ.get("LABEL_STUDIO_VENV") or Path(tempfile.gettempdir()) / f"rlhf-label-studio-{VERSION}")
    if not (place / "bin" / "label-studio").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        words = ["--python", place / "bin" / "python", "install", "-q", "--no-compile"]
        packages = [f"label-studio=={VERSION}", "selenium>=4.20"]
        subprocess.run([sys.executable, "-m", "pip", *words, *packages], check=True, timeout=600)
    return place


TABLES_AT_ONCE = """
from collections import defaultdict
from django.core.management import call_command
from label_studio import server

class ForNoApp(defaultdict):
    def __contains__(self, app):
        return True

def make_tables():
    import core.urls  # and with it all models
    from django.conf import settings
    settings.MIGRATION_MODULES = ForNoApp(lambda: None)
    call_command("migrate", run_syncdb=True, verbosity=0)

server._apply_database_migrations = make_tables
server.main()
"""
"""Label Studio with the tables that its models have, without the hundreds of migrations that once led there."""


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    """The URL of a fresh server on loopback, with SQLite, and one user."""
    data = tmp_path_factory.mktemp("label-studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    quiet = {"COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "HOME": str(data), "LOG_LEVEL": "ERROR"}
    command = [
        environment / "bin" / "python",
        "-c",
        TABLES_AT_ONCE,
        "start",
        "--no-browser",
        "--internal-host",
        "127.0.0.1",
    ]
    command += ["-p", str(port), "--data-dir", data, "--username", EMAIL, "--password", PASSWORD]
    command += ["--user-token", TOKEN, "--enable-legacy-api-token"]
    environ = {"PATH": f"{environment / 'bin'}:/usr/bin:/bin", **quiet}
    with open(data / "log", "w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        _wait(url, process, data / "log")
        yield url
    finally:
        process.terminate()
        process.wait(120)


def _wait(url, process, log):
    for _ in range(1440):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture
def client(server, monkeypatch):
    """A client as the front end, and the key in the environment."""
    from label_studio_sdk import LabelStudio

    monkeypatch.setenv(label_studio.KEY, TOKEN)
    return LabelStudio(base_url=server, api_key=TOKEN)


def rank(client, number, *order, change=None):
    """Submit a ranking of a task as the front end does, or change an annotation."""
    value = {"ranker": {"_": [], "ranked": [str(index) for index in order]}}
    result = [{"from_name": "ranking", "to_name": "answers", "type": "ranker", "value": value}]
    if change is not None:
        return client.annotations.update(change, result=result)
    return client.annotations.create(number, result=result, lead_time=4.5, was_cancelled=False)


def texts_by_rank(record):
    return [c.text for _, c in sorted(zip(record.ranks, record.candidates), key=lambda pair: pair[0])]


@pytest.mark.slow
def test_the_rankings_made_through_the_api_are_pulled(server, client, candidates, tmp_path):
    first = run("label-studio", "push", candidates, "--url", server, "--json")
    assert first.exit_code == 0, first.output
    again = last_line(run("label-studio", "push", candidates, "--url", server, "--json"))
    assert (last_line(first)["pushed"], again["pushed"], again["already"]) == (4, 0, 4)
    assert TOKEN not in first.output
    number = again["project"]
    fruit, news, joke, _ = sorted(each.id for each in client.tasks.list(project=number))

    made = rank(client, fruit, 1, 2, 0)
    client.annotations.create(news, result=[], was_cancelled=True)
    out = tmp_path / "rankings"
    found = last_line(run("label-studio", "pull", candidates, "--url", server, "--out", out, "--json"))
    assert (found["read"], found["written"], found["rejected"], found["new"]) == (4, 1, 3, 1)
    assert found["reasons"] == {"the annotation was cancelled": 1, "the task has no annotation": 2}
    (record,) = open_dataset(out, "ranking", verify=True).records()
    assert texts_by_rank(record) == ["An <b>apple</b>.", "Pear.", "A car."]
    assert (record.annotator, record.seconds, record.shown) == (EMAIL, 4.5, True)
    assert (record.source, record.group, record.split) == ("mine", "food", "train")
    assert {c.text: c.author for c in record.candidates} == {"A car.": "sft", "An <b>apple</b>.": "ppo", "Pear.": "eva"}

    rank(client, fruit, 2, 1, 0, change=made.id)
    rank(client, joke, 1, 0)
    rank(client, joke, 0, 1)
    found = pull(candidates, server, out)
    assert (found["written"], found["new"], found["changed"], found["gone"]) == (2, 1, 1, 0)
    assert found["reasons"]["a later annotation by the same person counts"] == 1
    records = {record.messages[-1].content: record for record in open_dataset(out).records()}
    assert texts_by_rank(records["Name a fruit."]) == ["Pear.", "An <b>apple</b>.", "A car."]
    assert texts_by_rank(records["Tell a joke."]) == ["Knock knock.", "No."]
    assert TOKEN not in "".join(file.read_text("utf-8", "replace") for file in out.iterdir())

    client.annotations.delete(made.id)
    found = pull(candidates, server, out)
    assert (found["written"], found["new"], found["changed"], found["gone"]) == (1, 0, 0, 1)


@pytest.mark.slow
def test_ties_are_places_and_an_interface_with_annotations_is_not_changed(server, client, candidates, tmp_path):
    number = push(candidates, server, title="ties", ties=True, project=_fresh(client, "ties"))["project"]
    fruit = min(each.id for each in client.tasks.list(project=number))
    value = {"ranker": {"_": [], "place-1": ["2", "0"], "place-2": [], "place-3": ["1"]}}
    result = [{"from_name": "ranking", "to_name": "answers", "type": "ranker", "value": value}]
    client.annotations.create(fruit, result=result, was_cancelled=False)
    pull(candidates, server, tmp_path / "r", project=number)
    (record,) = open_dataset(tmp_path / "r").records()
    assert dict(zip((c.text for c in record.candidates), record.ranks)) == {
        "A car.": 1, "An <b>apple</b>.": 2, "Pear.": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="its interface has other places"):
        push(candidates, server, project=number)
    with pytest.raises(UserError, match="no such project"):
        push(candidates, server, project=99_999)


def _fresh(client, title):
    return client.projects.create(title=title, label_config=label_config()).id


@pytest.mark.slow
def test_a_wrong_key_is_reported_without_showing_it(server, candidates, monkeypatch):
    monkeypatch.setenv(label_studio.KEY, "f" * 40)
    with pytest.raises(UserError, match="refuses the key") as error:
        push(candidates, server)
    assert "ffff" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_ranking_dragged_in_a_browser_is_pulled(server, client, environment, candidates, tmp_path):
    rows = [to_dict(record) for record in open_dataset(candidates).records()][:1]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    number = push(tmp_path / "one.jsonl", server, title="by hand")["project"]
    script = Path(__file__).with_name("label_studio_browser.py")
    words = [server, EMAIL, PASSWORD, number, tmp_path / "screen.png", 3, 1, 2]
    command = [environment / "bin" / "python", script, *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    shown, title = done.stdout.splitlines()[-2:]
    assert (shown, title) == ("3 1 2", "Label Studio"), "answers are text: no script in them may run"
    pull(tmp_path / "one.jsonl", server, tmp_path / "r")
    (record,) = open_dataset(tmp_path / "r").records()
    assert texts_by_rank(record) == ["Pear.", "A car.", "An <b>apple</b>."]
    assert record.seconds > 0
