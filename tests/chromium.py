"""Headless Chromium for tests of pages: real mouse, touch and keys, screenshots, downloads.

It speaks the Chrome DevTools Protocol through a pipe (`--remote-debugging-pipe`: JSON messages that end with a zero
byte), so neither a driver nor a package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--force-device-scale-factor=1", "--hide-scrollbars", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
PATIENCE = 180.0
"""Seconds to wait for a reply or a condition: far more than a loaded machine needs."""
CONTRAST = """[...document.querySelectorAll("p, td, th, summary, h1, h2, h3, h4")].filter(e => {
  const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => rgb(c).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(document.body).backgroundColor)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
}).length"""
"""How many texts of a page have less contrast with it than WCAG's AA asks for."""
UNREADABLE = """[...document.querySelectorAll("svg.plot")].flatMap(plot => {
  const place = plot.getBoundingClientRect();
  return place.height === 0 ? [] : [...plot.querySelectorAll("text")].filter(e => {
    const box = e.getBoundingClientRect(), size = parseFloat(getComputedStyle(e).fontSize) * place.width
      / plot.viewBox.baseVal.width;
    return size < 10 || box.left < place.left - 2 || box.right > place.right + 2 || box.top < place.top - 2
      || box.bottom > place.bottom + 2;
  }).map(e => e.textContent);
})"""
"""Texts of a page's plots that are smaller than 10 pixels, or not within their plot."""
KEYS = {
    "Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "Backspace": (8, ""), " ": (32, " "),
    "ArrowUp": (38, ""), "ArrowDown": (40, ""),
}  # fmt: skip
"""Name of a key that is no letter -> its code and its text."""
CONTROL = 2


class Chromium:
    """A browser process with an empty profile; a context manager."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads from handle 3 and writes to 4. (Not `sh`: dash takes handles of one digit only.)
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *OPTIONS[:-1], f"--user-data-dir={self._profile.name}", OPTIONS[-1]],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._unread, self._count = b"", 0
        self.events: list[dict[str, Any]] = []
        """What the browser reported: requests, exceptions, messages on the console."""

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._count:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._unread:
            assert time.monotonic() < end, "the browser does not answer"
            if select.select([self._in], [], [], 1)[0]:
                part = os.read(self._in, 1 << 16)
                assert part, "the browser has ended"
                self._unread += part
        first, _, self._unread = self._unread.partition(b"\0")
        return json.loads(first)

    def page(self, url: str, width: int = 1280, height: int = 900, touch: bool = False, dark: bool = False) -> Page:
        """A page in a profile of its own, as on another person's machine."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        return self.tab(url, context, width, height, touch, dark)

    def tab(
        self, url: str, context: str, width: int = 1280, height: int = 900, touch: bool = False, dark: bool = False
    ) -> Page:
        """Another tab in the profile of a page (`Page.context`)."""
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session, context, touch)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        page.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.goto(url)
        return page


class Page:
    """One tab. Selectors are CSS; points are in CSS pixels of the viewport."""

    def __init__(self, browser: Chromium, target: str, session: str, context: str, touch: bool) -> None:
        self.browser, self.target, self.session, self.context, self.touch = browser, target, session, context, touch

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def goto(self, url: str) -> None:
        """Load a page and wait until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href !== 'about:blank' || {json.dumps(url)} === "
                  "'about:blank'")  # fmt: skip

    def close(self) -> None:
        """Close the tab; its profile stays."""
        self.browser.call("Target.closeTarget", targetId=self.target)

    def eval(self, script: str) -> Any:
        """The value of a JavaScript expression, after its promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, why: str = "") -> Any:
        """Wait until an expression is true; its value. `why` it should be, for the error."""
        end = time.monotonic() + PATIENCE
        while not (value := self.eval(f"(() => {{ try {{ return {script} }} catch {{ return false }} }})()")):
            assert time.monotonic() < end, f"never true: {script} {why}"
            time.sleep(0.05)
        return value

    def text(self, selector: str = "body") -> str:
        return self.eval(f"document.querySelector({json.dumps(selector)}).innerText")

    def point(self, selector: str) -> tuple[float, float]:
        """The middle of an element, which is scrolled into view if need be."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        return tuple(
            self.eval(f"""(() => {{
          const e = document.querySelector({json.dumps(selector)});
          e.scrollIntoView({{block: "nearest", behavior: "instant"}});
          const b = e.getBoundingClientRect();
          return [b.x + b.width / 2, b.y + b.height / 2] }})()""")
        )

    # ---- what a person does

    def click(self, selector: str) -> None:
        """A click, or a tap on a touch screen."""
        x, y = self.point(selector)
        if self.touch:
            self._touch("touchStart", x, y)
            self._touch("touchEnd")
        else:
            self._mouse("mouseMoved", x, y)
            self._mouse("mousePressed", x, y)
            self._mouse("mouseReleased", x, y)

    def drag(self, item: str, place: str, at: float = 0.5, drop: bool = True) -> None:
        """Move an element in small steps, as a hand does, to a height (0 top, 1 bottom) of another one."""
        self.point(place)
        x, y = self.point(item)
        box = f"document.querySelector({json.dumps(place)}).getBoundingClientRect()"
        left, top, width, height = self.eval(f"(b => [b.x, b.y, b.width, b.height])({box})")
        to_x, to_y = left + width / 2, top + height * at
        steps = [(x + (to_x - x) * i / 12, y + (to_y - y) * i / 12) for i in range(13)]
        if self.touch:
            self._touch("touchStart", x, y)
            for point in steps:
                self._touch("touchMove", *point)
            time.sleep(0.15)  # a finger that leaves while it moves flings, and the browser ignores the next tap
            if drop:
                self._touch("touchEnd")
        else:
            self._mouse("mouseMoved", x, y)
            self._mouse("mousePressed", x, y)
            for point in steps:
                self._mouse("mouseMoved", *point, buttons=1)
            if drop:
                self._mouse("mouseReleased", to_x, to_y)

    def _mouse(self, kind: str, x: float, y: float, buttons: int = 0) -> None:
        button = "none" if kind == "mouseMoved" and not buttons else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def _touch(self, kind: str, *point: float) -> None:
        self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": point[0], "y": point[1]}] if point else [])

    def key(self, *keys: str, modifiers: int = 0) -> None:
        """Press keys one after the other: a letter, a digit, or a name of `KEYS`."""
        for key in keys:
            code, text = KEYS.get(key, (ord(key.upper()) if len(key) == 1 else 0, key))
            event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            text = "" if modifiers & CONTROL else text
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Put text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    # ---- what comes out

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is in view, or of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def downloads_to(self, folder: Path) -> None:
        """Let the page save files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.browser.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), browserContextId=self.context
        )

    def faults(self) -> list[str]:
        """Exceptions and errors on the console so far (a refused request is one), and requests to other hosts."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:")):
                    found.append(f"a request to {url}")
        return found
