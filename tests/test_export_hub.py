"""An export is pushed to a hub on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import finished
import huggingface_hub
import pytest

from rlhf.core.errors import UserError
from stages.export import command


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs; keeps what it was sent."""

    received: ClassVar[list[tuple[str, Any]]] = []

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer hf_good"
        self._answer({"name": "someone", "type": "user"} if known else {"error": "bad token"}, 200 if known else 401)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.received.append((self.path, body))
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"http://{self.headers['Host']}/someone/model", "name": "someone/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        else:
            self._answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/someone/model/commit/1",
                    "commitOid": "1" * 40,
                    "hookOutput": "",
                }
            )

    def log_message(self, *words: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, and someone logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    Hub.received = []
    yield Hub
    server.shutdown()


def test_an_export_is_pushed_to_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    words = ["--push-to-hub", "someone/model", "--license", "mit", "--json"]
    said, _ = finished.invoke(command, finished.sft(tmp_path / "run"), "--out", tmp_path / "out", *words)
    commit = [json.loads(line) for line in hub.received[-1][1].splitlines()]
    sent = {line["value"]["path"] for line in commit if line["key"] == "file"}
    assert sent == {file.name for file in (tmp_path / "out").iterdir()}
    assert "path = 'someone/model'" in (tmp_path / "out" / "README.md").read_text()
    assert "someone/model" in finished.last_json(said)["pushed"]


def test_a_bad_login_is_found_before_anything_is_loaded(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished.sft(tmp_path / "run")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(UserError, match="refused or cannot be reached"):
        finished.invoke(command, run, "--out", tmp_path / "out", "--push-to-hub", "someone/model")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_local_model_is_not_pushed(hub: type[Hub], tmp_path: Path) -> None:
    run = finished.sft(tmp_path / "run", "lora")
    words = ["--format", "adapter", "--push-to-hub", "someone/model", "--license", "mit"]
    with pytest.raises(UserError, match="Nobody else could load it"):
        finished.invoke(command, run, "--out", tmp_path / "out", *words)
    assert not hub.received and not (tmp_path / "out").exists()
