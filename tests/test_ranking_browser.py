"""The ranking page in headless Chromium: dragging by mouse and finger, keys alone, undo, resume, two people, a file."""

from __future__ import annotations

import json
import threading
import time

import pytest
from chromium import CONTROL, Chromium, needs_chromium
from rows import last_line, run, write

from data_tools.ranking_page.page import Settings, share
from data_tools.ranking_page.server import Desk, open_book, open_items, server_at
from rlhf.data.schema import Candidate, Message, Proposal
from rlhf.data.store import open_dataset

pytestmark = [needs_chromium, pytest.mark.slow]
EVIL = "<img src=x onerror=\"document.title='bad'\"></script><script>document.title='bad'</script> **bold**"
LONG = "A sentence that says the same thing again. " * 80 + "x" * 500_000 + " word" * 100_000
PROPOSALS = [
    Proposal(
        (Message("system", "Be brief."), Message("user", "Hi?"), Message("assistant", "Hi!"), Message("user", EVIL)),
        candidates=(Candidate(EVIL, "model x"), Candidate(LONG, "model y"), Candidate("القاهرة هي عاصمة مصر."),
                    Candidate("short")),
    ),
    *(Proposal((Message("user", f"Question {i}?"),), candidates=tuple(Candidate(f"{i}.{k}") for k in range(3)))
      for i in range(1, 4)),
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with Chromium() as started:
        yield started


class Site:
    """A page on loopback, and the rankings that come out."""

    def __init__(self, candidates, mode="rank"):
        self.dataset, items = open_items(candidates)
        self.book = open_book(self.dataset, items, candidates.parent / f"rankings-{mode}.jsonl").__enter__()
        settings = Settings(self.dataset.fingerprint, mode, 0, len(items))
        self.server = server_at(candidates.parent / "page.address", Desk(self.book, settings).routes())
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    def close(self):
        self.server.stop()
        self.thread.join()
        self.server.close()
        self.book.__exit__()

    def rankings(self):
        return list(open_dataset(self.book.out, "ranking").records())


@pytest.fixture
def candidates(tmp_path):
    return write(tmp_path / "candidates", PROPOSALS).path


@pytest.fixture
def site(candidates):
    opened = Site(candidates)
    yield opened
    opened.close()


def enter(page, name):
    """Give a name and start."""
    page.wait("document.activeElement.id === 'name'")
    page.eval("document.querySelector('#name').select()")
    page.type(name)
    page.key("Enter")
    page.wait("!document.querySelector('#top').hidden")


def expect(page, places, why=""):
    """Wait until the numbers of the answers by place, best first, are these."""
    found = """[...document.querySelectorAll('#places .tier')].map(t =>
      [...t.querySelectorAll('.chip')].map(c => Number(c.dataset.answer) + 1))"""
    page.wait(f"JSON.stringify({found}) === '{json.dumps(places, separators=(',', ':'))}'", why)


def at(page, where):
    """Wait until a prompt is on the screen, such as "2 of 4"."""
    page.wait(f"document.querySelector('#where').textContent.startsWith('{where}')")


def by_rank(ranking):
    return [sorted(c.text for c, r in zip(ranking.candidates, ranking.ranks) if r == rank)
            for rank in range(1, max(ranking.ranks) + 1)]  # fmt: skip


def test_answers_are_dragged_by_mouse_tied_undone_and_saved_as_they_were_shown(browser, site):
    page = browser.page(site.server.url)
    enter(page, "Anna")
    at(page, "1 of 4")
    texts = page.eval("[...document.querySelectorAll('.answer .text')].map(e => e.textContent)")
    assert sorted(texts) == sorted(c.text for c in PROPOSALS[0].candidates) and page.eval("document.title") != "bad"
    assert page.eval("document.querySelectorAll('#turns .turn').length") == 4
    page.drag("#places [data-answer='1']", ".gap")
    page.drag("[data-card='3'] .chip", ".gap[data-at='0']")  # from its card, to the top
    page.drag("#places [data-answer='0']", ".tier[data-at='1']")
    expect(page, [[4], [2, 1]])
    page.drag("#places [data-answer='0']", ".gap[data-at='2']")
    expect(page, [[4], [2], [1]])
    page.key("z", modifiers=CONTROL)
    expect(page, [[4], [2, 1]])
    page.click("#redo")
    page.click("#undo")
    page.drag("#places [data-answer='2']", ".pool")  # where it is: nothing changes
    page.drag("#places [data-answer='2']", ".gap[data-at='2']")
    expect(page, [[4], [2, 1], [3]])
    page.click("#note")
    page.type("مرحبا, s c 1")
    page.click(".more")
    page.wait("document.querySelector('.more').textContent === 'Show less'")
    page.key("Enter")  # a click on a button does not make it the one that Enter presses
    at(page, "2 of 4")
    (ranking,) = site.rankings()
    assert [c.text for c in ranking.candidates] == texts and ranking.ranks == (2, 2, 3, 1)
    assert ranking.annotator == "Anna" and ranking.seconds > 0 and ranking.shown
    assert json.loads(site.book.out.read_text())["comment"] == "مرحبا, s c 1"
    assert page.faults() == []


def test_a_finger_drags_on_a_phone_and_nothing_is_wider_than_the_screen(browser, site):
    page = browser.page(site.server.url, 390, 844, touch=True)
    enter(page, "Bob")
    page.drag("#places [data-answer='2']", ".gap")
    page.drag("#places [data-answer='0']", ".gap[data-at='1']")
    page.drag("#places [data-answer='1']", ".tier[data-at='0']")
    page.click("[data-card='3'] .chip")  # a tap
    expect(page, [[3, 2], [1], [4]])
    page.click("#places [data-answer='3']")
    expect(page, [[3, 2], [1]])
    page.click("#tie")
    page.click("#places [data-answer='3']")
    expect(page, [[3, 2], [1, 4]])
    assert page.eval("document.documentElement.scrollWidth") == 390
    assert page.eval("[...document.querySelectorAll('#board button')].every(b => b.getBoundingClientRect().width > 35)")
    page.click("#save")
    at(page, "2 of 4")
    assert sorted(site.rankings()[0].ranks) == [1, 1, 2, 2]
    assert page.faults() == []


def test_keys_alone_rank_skip_go_back_and_reach_the_end(browser, site):
    page = browser.page(site.server.url)
    enter(page, "kim")
    page.key("2", "1", "=", "4", "3")
    expect(page, [[2], [1, 4], [3]])
    page.wait("document.querySelector('#live').textContent === 'Answer 3: place 3 of 3'")
    assert page.eval("document.querySelector('[data-card=\"0\"] .chip').ariaLabel") == (
        "Answer 1, place 2 of 3, tied with 4"
    )
    page.key("u", "Enter")
    expect(page, [[2], [1, 4]], "not saved while an answer is left")
    page.key("3", "Enter")
    at(page, "2 of 4")
    page.key("s")
    page.wait("document.querySelector('#turns').textContent.includes('Question 2')")
    page.key("c")
    at(page, "3 of 4")
    page.key("Tab")  # from the title to the first answer
    page.eval("document.querySelector('#places [data-answer=\"0\"]').focus()")
    page.key(" ")
    page.key("2", "3")
    page.key("ArrowDown")
    expect(page, [[2, 1], [3]])
    page.key("ArrowDown", "ArrowDown")
    expect(page, [[2], [3, 1]])
    page.key("b")
    page.wait("document.querySelector('#turns').textContent.includes('Question 2')")
    assert "cannot tell" in page.text("#notice")
    page.key("b")
    page.wait("document.querySelector('#turns').textContent.includes('onerror')")
    expect(page, [[2], [1, 4], [3]])
    page.key("1", "1", "Enter")  # from the second place to the last one
    page.wait("document.querySelector('#turns').textContent.includes('Question 3')")
    expect(page, [[2], [3, 1]], "what was begun is kept")
    page.key("Enter")
    page.wait("!document.querySelector('#end').hidden")
    assert "skipped" in page.text("#endtitle")
    page.click("#endskipped")
    page.wait("document.querySelector('#turns').textContent.includes('Question 1')")
    page.key("3", "2", "1", "Enter")
    page.wait("document.querySelector('#endtitle').textContent.includes('All done')")
    assert len(site.rankings()) == 3 and page.faults() == []
    assert site.book.counts("kim") == {"ranked": 3, "cannot_tell": 1, "skipped": 0}


def test_two_annotators_and_a_second_tab_lose_no_click_and_a_closed_page_goes_on(browser, site):
    anna, bob = browser.page(site.server.url), browser.page(site.server.url, 390, 844, touch=True)
    enter(anna, "anna")
    enter(bob, "bob")
    assert "Question 1" in bob.text("#turns"), "anna has the first on the screen"
    second = browser.tab(site.server.url, anna.context)
    enter(second, "anna")
    assert "another tab" in second.text("#notice")
    second.key("4", "3", "2", "1", "Enter")
    at(second, "2 of 4")
    anna.key("1", "2", "3", "4", "Enter")
    anna.wait("document.querySelector('#notice').textContent.includes('another tab')")
    expect(anna, [[4], [3], [2], [1]])
    assert len(site.book.latest) == 1
    anna.key("u")
    expect(anna, [[1], [2], [3], [4]])
    anna.key("Enter")
    at(anna, "2 of 4")
    anna.key("2")
    for page in (anna, second):
        page.close()
    bob.key("1", "2", "3", "Enter")
    at(bob, "2 of 4")
    again = browser.tab(site.server.url, anna.context)
    assert again.eval("document.querySelector('#name').value") == "anna"
    enter(again, "anna")
    at(again, "2 of 4")
    expect(again, [[2]], "a ranking that was begun is kept in the browser")
    again.key("Backspace", "b")
    again.wait("document.querySelector('#turns').textContent.includes('onerror')")
    expect(again, [[1], [2], [3], [4]])
    assert {(r.annotator, len(r.ranks)) for r in site.rankings()} == {("anna", 4), ("bob", 3)}


def test_while_the_server_is_away_the_page_waits_with_the_vote(browser, candidates):
    site = Site(candidates)
    page = browser.page(site.server.url)
    enter(page, "anna")
    site.close()
    page.key("1", "2", "3", "4", "Enter")
    page.wait("document.querySelector('#notice').textContent.includes('cannot be reached')")
    site = Site(candidates)
    at(page, "2 of 4")
    assert len(site.rankings()) == 1
    site.close()


def test_best_and_worst_are_chosen_by_dragging_and_by_keys(browser, candidates):
    site = Site(candidates, mode="best-worst")
    page = browser.page(site.server.url, 390, 844, touch=True)
    enter(page, "anna")
    page.drag("#places [data-answer='3']", ".tier[data-at='1']")
    page.drag("#places [data-answer='1']", ".tier[data-at='0']")
    page.drag("#places [data-answer='0']", ".tier[data-at='0']")
    expect(page, [[1], [4]], "the new best one takes the place of the other")
    page.click("#save")
    at(page, "2 of 4")
    page.key("2", "3", "Enter")
    at(page, "3 of 4")
    site.close()
    assert [r.ranks for r in site.rankings()] == [(1, 2, 2, 3), (2, 1, 3)]


def test_the_file_works_without_a_server_and_its_result_is_merged(browser, candidates, tmp_path):
    dataset, items = open_items(candidates)
    share(tmp_path / "page.html", Settings(dataset.fingerprint, "rank", 7, len(items), "zoë"), items)
    url = (tmp_path / "page.html").as_uri()
    page = browser.page(url)
    page.downloads_to(tmp_path / "down")
    assert page.eval("document.querySelector('#name').value") == "zoë"
    page.wait("document.activeElement.id === 'name'")
    page.type("\u202e")
    page.key("Enter")
    page.wait("document.querySelector('#notice').textContent.includes('cannot be seen')", "the merge would refuse it")
    enter(page, "zoë")
    texts = page.eval("[...document.querySelectorAll('.answer .text')].map(e => e.textContent)")
    page.key("3", "=", "1", "2", "4", "Enter")
    at(page, "2 of 4")
    page.key("c")
    at(page, "3 of 4")
    page.key("1")
    page.close()
    page = browser.tab(url, page.context)  # closed, and opened again
    enter(page, "zoë")
    at(page, "3 of 4")
    expect(page, [[1]])
    page.key("2", "3", "Enter")
    at(page, "4 of 4")
    page.key("s")
    page.wait("!document.querySelector('#end').hidden")
    page.click("#endsave")
    file = tmp_path / "down" / "rankings-zoë.json"
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, list((tmp_path / "down").glob("*"))
        time.sleep(0.05)
    assert page.faults() == []
    found = last_line(run("rank", candidates, "--merge", file, "--json"))
    assert (found["read"], found["added"], found["rejected"]) == (4, 4, 0)
    assert found["annotators"] == {"zoë": {"ranked": 2, "cannot_tell": 1, "skipped": 1}}
    first, second = open_dataset(found["out"], "ranking").records()
    assert [c.text for c in first.candidates] == texts and first.ranks == (1, 2, 1, 3)
    assert [c.author for c in first.candidates if c.text == EVIL] == ["model x"]
    assert by_rank(second) == [[c.text] for c in second.candidates]
