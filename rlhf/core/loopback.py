"""A small web server for this machine alone: a fixed set of paths behind a secret token, and nothing else.

It listens on 127.0.0.1. Three checks keep others out: the token in the path, which other users of the machine cannot
guess; the Host header, so that a page of another site cannot reach it under a name of its own (DNS rebinding); and
the content type of requests with a body, which a form of another site cannot send.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

from rlhf.core.errors import UserError

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
"""Names that a Host header may have, with any port: a tunnel (`ssh -L`) may use another port at its other end."""
MOST_BYTES = 1 << 16
"""Most bytes of a request's body."""
MOST_CONNECTIONS = 256
"""Connections at once; further ones are closed. A browser opens up to 6."""
IDLE_SECONDS = 60
"""After this time without a request, or in the middle of one, a connection is closed."""
JSON = "application/json"
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
"""The content security policy of replies that are no page."""


class HttpReply(NamedTuple):
    """The answer to a request."""

    body: bytes
    kind: str = JSON
    status: int = 200
    policy: str = NOTHING
    """Its Content-Security-Policy."""


def json_reply(value: Any, status: int = 200) -> HttpReply:
    """A value as JSON, in ASCII."""
    return HttpReply(json.dumps(value).encode(), status=status)


Routes = Mapping[tuple[str, str], Callable[[bytes], HttpReply]]
"""Method and path below the token, such as ("POST", "save"), -> what makes the reply from the request's body."""


class LoopbackServer:
    """Serves routes on loopback, each request in a thread of its own.

    Args:
        routes: What is served. A GET has an empty body.
        port: The port; 0 takes a free one.
        token: The secret in the path; None makes a new one, of 128 random bits.

    Raises:
        UserError: The port is not free.
    """

    def __init__(self, routes: Routes, port: int = 0, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(16)
        handler = type("Handler", (_Handler,), {"routes": routes, "token": self.token})
        try:
            self._server = _Server((ADDRESS, port), handler)
        except OSError as error:
            remedy = "Name another --port, or leave it out."
            raise UserError(f"--port {port}: cannot be used: {error.strerror}", remedy=remedy) from None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The address of the route ("GET", "")."""
        return f"http://{ADDRESS}:{self.port}/{self.token}/"

    def serve(self) -> None:
        """Serve until an exception such as KeyboardInterrupt, or until `stop` is called in another thread."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `serve`."""
        self._server.shutdown()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection early is no error."""


class _Handler(BaseHTTPRequestHandler):
    routes: ClassVar[Routes]
    token: ClassVar[str]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server_version, sys_version = "rlhf", ""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        refusal, make = self._checked(method)
        if refusal:
            self.close_connection = True  # its body is not read
            self._send(json_reply({"error": refusal[1]}, refusal[0]))
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            reply = make(body)
        except UserError as error:
            reply = json_reply({"error": str(error)}, 500)
        self._send(reply)

    def _checked(self, method: str) -> tuple[tuple[int, str] | None, Any]:
        """Status and reason of a refusal, or None and what makes the reply."""
        if not is_local(self.headers.get("Host", "")) or not self._same_origin():
            return (403, "Open the page under the address that was printed."), None
        _, token, *rest = self.path.split("/", 2) if self.path.count("/") > 1 else ("", "", "")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            return (404, "This address is not valid any more. Open the one that was printed last."), None
        make = self.routes.get((method, rest[0]))
        if make is None:
            return (404, "There is nothing here."), None
        size = self.headers.get("Content-Length", "" if method == "POST" else "0")
        if "Transfer-Encoding" in self.headers or not (size.isascii() and size.isdecimal()):
            return (411, "The length of the request is not given."), None
        if int(size[:20]) > MOST_BYTES:
            return (413, f"The request is longer than {MOST_BYTES:,} bytes."), None
        if method == "POST" and self.headers.get_content_type() != JSON:
            return (415, f"The content type is not {JSON}."), None
        return None, make

    def _same_origin(self) -> bool:
        origin = self.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc == self.headers.get("Host")

    def _send(self, reply: HttpReply) -> None:
        self.send_response(reply.status)
        headers = HEADERS | {"Content-Type": f"{reply.kind}; charset=utf-8", "Content-Length": str(len(reply.body))}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in (headers | {"Content-Security-Policy": reply.policy}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: their paths hold the token."""


def is_local(host: str) -> bool:
    """Whether a Host header names this machine's loopback address."""
    name, _, port = host.partition(":")
    return name.lower() in HOSTS and (not port or port.isdecimal())
