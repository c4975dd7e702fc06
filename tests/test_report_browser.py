"""The report in a browser: it fits phones and screens, says numbers at the pointer and by keyboard, follows a run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny
from chromium import UNREADABLE, Chromium, needs_chromium
from report_runs import HOSTILE, write_chain

from rlhf.report.gather import gather
from rlhf.report.page import render
from rlhf.report.watch import LivePage
from rlhf.runs.lock import LOCK


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a chain of runs whose texts are hostile, with the numbers of tokens."""
    folder = tmp_path_factory.mktemp("browser")
    chain = write_chain(folder / "mine", HOSTILE, tokens=True)
    (folder / "page.html").write_text(render(gather([chain])), "utf-8")
    return f"file://{folder}/page.html"


@pytest.fixture(scope="module")
def browser():
    with Chromium() as found:
        yield found


def press(page, key: str, code: int) -> None:
    """Press a key that writes no letter."""
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)


WIDE = "document.documentElement.scrollWidth <= innerWidth"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_the_page_fits_and_follows_the_readers_mode(width, dark, browser, file):
    page = browser.page(file, width=width, touch=width < 600, dark=dark)
    assert page.eval(WIDE) and page.eval(UNREADABLE) == []
    assert page.eval("getComputedStyle(document.querySelector('#frontier .canvas.narrow')).display") == (
        "block" if width < 600 else "none"
    )
    back = page.eval("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == dark
    assert page.eval("Math.min(...[...document.querySelectorAll('.canvas')].map(one => one.clientWidth || 999))") > 250
    assert page.faults() == []
    page.close()


@pytest.mark.slow
@needs_chromium
def test_charts_and_tokens_say_their_numbers_at_the_pointer_and_by_keyboard(browser, file):
    page = browser.page(file)
    chart = "[aria-label^='Score: ']"
    x, y = page.point(chart)
    page._mouse("mouseMoved", x, y)
    tip = page.wait(f'document.querySelector("{chart} .tip").innerText')
    assert tip.startswith("step ") and "training prompts: " in tip
    page.eval(f'document.querySelector("{chart}").focus()')
    press(page, "End", 35)
    said = page.eval(f'document.querySelector("{chart} .said").textContent')
    assert said.startswith("step 4") and "held out 1" in said
    x, y = page.point(".answer .token:nth-child(2)")
    page._mouse("mouseMoved", x, y)
    assert "advantage: " in page.wait("document.querySelector('body > .tip').innerText")
    page.eval("document.querySelector('.answer[tabindex]').focus()")
    press(page, "ArrowRight", 39)
    assert "advantage" in page.eval("document.querySelector('.answer[tabindex] .said').textContent")
    heat = "[...document.querySelectorAll('.token')].map(one => one.style.getPropertyValue('--much')).join()"
    before = page.eval(heat)
    page.click(".picker [data-measure=advantage]")
    assert page.eval("document.querySelector('[data-measure=advantage]').ariaPressed") == "true"
    assert page.eval(heat) != before
    assert page.faults() == []  # nothing of what the runs wrote has run
    page.close()


def test_the_live_page_is_drawn_again_when_a_run_has_logged_and_only_then(tmp_path):
    drawn = []
    run = write_chain(tmp_path / "mine") / "ppo"
    live = LivePage([run], lambda: drawn.append(1) or f"page {len(drawn)}")
    assert [live.reply().body, live.reply().body] == [b"page 1", b"page 1"]
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 5}\n')
    assert live.reply().body == b"page 2" and "connect-src 'self'" in live.reply().policy
    for number, name in enumerate(("ppo/best-of.json", "ppo/evaluation.json", "reward/evaluation.json"), 3):
        (run.parent / name).write_text("{}")
        assert [live.reply().body, live.reply().body] == [f"page {number}".encode()] * 2, name
    with open(run / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process goes on with the run
        assert live.reply().body == b"page 6"
    assert live.reply().body == b"page 7"  # it has been killed


def test_before_there_is_a_run_the_page_says_so(tmp_path):
    live = LivePage([tmp_path / "<b>none"], lambda: render(gather([tmp_path / "<b>none"])))
    assert b"&lt;b&gt;none: no such folder" in live.reply().body and b"<b>" not in live.reply().body


@pytest.mark.slow
@needs_chromium
def test_watch_follows_a_run_on_loopback_with_a_token_and_ends_cleanly(tmp_path, browser):
    run = write_chain(tmp_path / "mine") / "ppo"
    command = [sys.executable, "-m", "stages.cli", "report", str(run), "--watch"]
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY)}
    watching = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = watching.stdout.readline().split()[-1]
        assert url.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url.rsplit("/", 2)[0] + "/guessed/")
        page = browser.page(url)
        page.eval("document.querySelector('#config details').open = true")
        assert "step 4 of 4" in page.text("#doctor")
        row = {"step": 6, "objective/entropy": 2.0}
        with open(Path(run) / "metrics.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        page.wait("document.querySelector('#doctor').innerText.includes('step 6 of 4')")
        assert page.eval("document.querySelector('#config details').open")
        assert page.faults() == []
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0, watching.stderr.read()
        page.wait("document.querySelector('.live').textContent.includes('has ended')")
    finally:
        watching.kill()
        watching.wait()
