"""A server with OpenAI's chat API on this machine, which answers as a test says, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Response:
    """What the server sends: a status, a body (a text, or an object for JSON), headers."""

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def completion(text: Any, finish_reason: str = "stop", **message: Any) -> Response:
    """A chat completion; it has counted 10 prompt tokens, and a completion token for each word."""
    usage = {"prompt_tokens": 10, "completion_tokens": len(str(text).split())}
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Response(body)


def fault(status: int, message: str = "", **headers: str) -> Response:
    """An error as OpenAI's API words it."""
    return Response(
        {"error": {"message": message, "code": None}}, status, {k.replace("_", "-"): v for k, v in headers.items()}
    )


@dataclass
class ChatServer:
    """A running server."""

    url: str
    asked: list[dict[str, Any]]
    """The bodies of the chat requests, in the order in which they came."""
    headers: list[dict[str, str]]
    most_at_once: int = 0


@contextmanager
def chat_server(
    answer: Callable[[dict[str, Any], int], Response], models: tuple[str, ...] = ("m",)
) -> Iterator[ChatServer]:
    """Run a server on this machine.

    Args:
        answer: (body of the request, how many chat requests came before) -> the response.
        models: The models that the server lists.
    """
    lock, running = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(Response({"object": "list", "data": [{"id": m, "object": "model"} for m in models]}))

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running, number = running + 1, len(found.asked)
                found.most_at_once = max(found.most_at_once, running)
                found.asked.append(body)
                found.headers.append({name.lower(): value for name, value in self.headers.items()})
            response = answer(body, number)
            with lock:
                running -= 1
            self._send(response)

        def _send(self, response: Response) -> None:
            text = response.body if isinstance(response.body, str) else json.dumps(response.body)
            data = text.encode()
            self.send_response(response.status)
            kind = "text/html" if isinstance(response.body, str) else "application/json"
            for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | response.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1", [], [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
