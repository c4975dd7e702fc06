"""Asks a server with OpenAI's chat API: many requests at once, retried, cached, counted."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.core.limits import parse_json
from rlhf.servers.cache import ReplyCache
from rlhf.servers.config import OPENAI, ServerConfig
from rlhf.servers.pace import LONGEST_WAIT, Pace, backoff, retry_after
from rlhf.servers.replies import MALFORMED, ChatRequest, Failure, Reply, Usage, read_completion

if TYPE_CHECKING:
    import openai
else:
    openai = lazy("openai")

WINDOW = 4
"""Requests that are under way or answered but not yet given out, for each that may wait for the server: a slow answer
holds up only those that follow it, and only in the order of the results."""
MOST_FAILURES = 10
"""So many requests in a row without an answer end the command."""
RETRIED = (408, 409, 429)
NOT_SENT = "not sent"
GO_ON = "Start the same command again later; answers in the cache are not paid for again."
NO_CHAT_API = "Check the address: it must be the base of OpenAI's chat API, which often ends in /v1."


class ChatServer:
    """A server with OpenAI's chat API. A context manager, which closes the connections.

    Args:
        config: Which server, and the limits.
        cache: Where replies are kept; None keeps none.
        wait: Waits a number of seconds; by default until the time is over or the iteration of `ask` ends.

    Raises:
        UserError: The package openai is not installed, or the key is missing.
    """

    def __init__(
        self, config: ServerConfig, cache: ReplyCache | None = None, wait: Callable[[float], object] | None = None
    ) -> None:
        self.config, self.cache, self.usage = config, cache, Usage()
        self._key = config.key()
        self._wait, self._pace = wait, Pace(config.requests_per_minute)
        self._lock = threading.Lock()
        self._failed_in_a_row = self._answered = 0
        self._client: Any = None
        self._model = config.model

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    @property
    def model(self) -> str:
        """The model's name on the server.

        Raises:
            UserError: None is configured, and the server does not list exactly one.
        """
        if not self._model:
            names = self._listed()
            if len(names) != 1:
                found = f"lists {len(names)} models: {', '.join(names[:20])}" if names else "lists no model"
                raise UserError(f"{self.config.url}: {found}", remedy="Name the model.")
            self._model = names[0]
        return self._model

    @property
    def cost(self) -> float:
        """What this process has paid for, at the configured prices. Cached replies are not paid for again."""
        return self.config.cost(self.usage.prompt_tokens, self.usage.completion_tokens)

    def request_options(self, max_tokens: int) -> dict[str, Any]:
        """The field that limits the completion: OpenAI's newer models take another name than all other servers."""
        return {"max_completion_tokens" if self.config.host == OPENAI else "max_tokens": max_tokens}

    # ---- asking ------------------------------------------------------------------------------------------------------

    def ask(self, requests: Iterable[ChatRequest]) -> Iterator[Reply | Failure]:
        """Send requests, at most `concurrency` at a time, and give the results in the order of the requests.

        A request that is equal to another one shares its reply. When the iteration ends early, requests under way are
        waited for, so that their replies, which are paid for, reach the cache.

        Raises:
            UserError: The server cannot be reached, refuses the key or the model, or fails again and again.
        """
        waiting: deque[tuple[str, Future[Reply | Failure]]] = deque()
        pool, ended = ThreadPoolExecutor(self.config.concurrency, "server"), threading.Event()
        try:
            for request in requests:
                key = self._key_of(request)
                same = next((future for other, future in waiting if other == key), None)
                waiting.append((key, same or self._submit(pool, ended, request, key)))
                while len(waiting) >= WINDOW * self.config.concurrency:
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            ended.set()  # no further retries and no waits for them
            pool.shutdown(wait=True, cancel_futures=True)

    def _key_of(self, request: ChatRequest) -> str:
        return ReplyCache.key(self.config.url, self._body(request), request.number)

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        messages = [{"role": m["role"], "content": m["content"]} for m in request.messages]
        return {"model": self.model, "messages": messages, **request.options, **self.config.extra_body}

    def _submit(
        self, pool: ThreadPoolExecutor, ended: threading.Event, request: ChatRequest, key: str
    ) -> Future[Reply | Failure]:
        found = self.cache.get(key) if self.cache is not None else None
        if found is None:
            self._connected()  # in this thread, so that a missing package or key is reported at once
            return pool.submit(self._answer, ended, request, key)
        self._count(found)
        done: Future[Reply | Failure] = Future()
        done.set_result(found)
        return done

    def _answer(self, ended: threading.Event, request: ChatRequest, key: str) -> Reply | Failure:
        try:
            result = self._send(ended, self._body(request), random.Random(key))
            if isinstance(result, Reply) and self.cache is not None:
                self.cache.put(key, result)
            self._count(result)
        except BaseException:
            ended.set()  # here, so that this thread does not start on the next request
            raise
        return result

    def _count(self, result: Reply | Failure) -> None:
        if isinstance(result, Reply):
            self.usage.add(result)
            with self._lock:
                self._answered, self._failed_in_a_row = self._answered + 1, 0
            return
        if result.reason == NOT_SENT:
            return
        self.usage.count("failures")
        with self._lock:
            # a server that answers others may refuse many requests in a row, such as a block of long prompts
            refused = result.reason == REFUSED
            self._failed_in_a_row += not refused or not self._answered
            failed = self._failed_in_a_row
        if failed >= MOST_FAILURES:
            what = f"{self.config.url}: {failed} requests in a row got no answer: {result.reason}"
            other = result.reason == MALFORMED and not self._answered
            raise UserError(what, result.detail, NO_CHAT_API if other else GO_ON)

    # ---- one request -------------------------------------------------------------------------------------------------

    def _send(self, ended: threading.Event, body: dict[str, Any], chance: random.Random) -> Reply | Failure:
        """One request with its retries."""
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        for attempt in range(self.config.retries + 1):
            self._check_budget()
            self._sleep(self._pace.take(), ended)
            if ended.is_set():
                return Failure(NOT_SENT)  # nobody reads it
            try:
                raw = self._connected().chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=rest
                )
                return read_completion(
                    parse_json(self._without_key(raw.http_response.text))
                )  # should it repeat the key
            except openai.APIStatusError as error:
                failure = self._refused(error)
                if failure is not None:
                    return failure
                pause = retry_after(error.response.headers)
                result = Failure(f"the server failed: status {error.status_code}", self._message(error))
            except openai.APITimeoutError:
                pause, seconds = None, self.config.timeout_seconds
                result = Failure("the server did not answer in time", f"{seconds:g} seconds")
            except (openai.APIConnectionError, ValueError) as error:
                malformed = isinstance(error, ValueError)
                reason = MALFORMED if malformed else "the connection to the server failed"
                pause, result = None, Failure(reason, self._message(error.__cause__ or error))
            if attempt < self.config.retries:
                self._sleep(self._pause(attempt, pause, chance, result), ended)
        return result

    def _sleep(self, seconds: float, ended: threading.Event) -> None:
        if seconds > 0:
            (self._wait or ended.wait)(seconds)

    def _pause(self, attempt: int, asked: float | None, chance: random.Random, failure: Failure) -> float:
        """Seconds to wait before a retry: as long as the server asks for, else longer each time."""
        if asked is not None and asked > LONGEST_WAIT:
            what = f"{self.config.url}: asks for a pause of {asked:,.0f} seconds ({failure.reason})"
            raise UserError(what, failure.detail, GO_ON)
        self.usage.count("retries")
        if not asked:
            return backoff(attempt, chance)
        self._pace.hold(asked)  # the limit holds for all requests
        return asked

    def _refused(self, error: openai.APIStatusError) -> Failure | None:
        """The failure if the server refuses this request alone; None if the request may be sent again.

        Raises:
            UserError: It would refuse every request.
        """
        status, url, message = error.status_code, self.config.url, self._message(error)
        if status in (401, 403):
            name = self.config.key_variable
            sent = f"the key in {name}" if name else "a request without a key"
            remedy = f"Check {name}." if name else "Name the environment variable that holds the key."
            raise UserError(f"{url}: refuses {sent}: status {status}", message, remedy)
        if status == 404:
            raise UserError(
                f"{url}: has no model {self.model!r}, or is not the base of the API: status 404", message,
                "Check the address, which often ends in /v1, and the model's name.",
            )  # fmt: skip
        if status == 402 or error.code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise UserError(f"{url}: the account has no credit left: status {status}", message, GO_ON)
        if status in RETRIED or status >= 500:
            return None
        return Failure(REFUSED, f"status {status}: {message}")

    def _check_budget(self) -> None:
        most = self.config.max_cost
        if most is not None and self.cost >= most:
            raise UserError(
                f"{self.config.url}: {self.cost:.4g} has been paid, and the limit is {most:g}",
                remedy="Raise the limit and start the same command again; the answers so far are not paid for again.",
            )

    # ---- the connection ----------------------------------------------------------------------------------------------

    def _connected(self) -> Any:
        """The client of the package openai, which is made at the first request: a cache needs no server."""
        config = self.config
        with self._lock:
            if self._client is not None:
                return self._client
            try:
                # A proxy for the network cannot reach a server on this machine.
                http = openai.DefaultHttpxClient(trust_env=not config.is_loopback)
            except ImportError:
                what = f"{config.url}: asking a server needs the package openai, which is not installed"
                raise UserError(what, remedy="Install it: pip install 'rlhf-rankings[servers]'") from None
            self._client = openai.OpenAI(
                base_url=config.url, api_key=self._key or "none", timeout=config.timeout_seconds, max_retries=0,
                http_client=http,
            )  # fmt: skip
            return self._client

    def _listed(self) -> list[str]:
        """Names of the server's models."""
        client = self._connected()
        try:
            return sorted({str(model.id) for model in client.models.list()})
        except openai.APIStatusError as error:
            self._refused(error)
            return []
        except openai.APIConnectionError as error:
            why = self._message(error.__cause__ or error)
            raise UserError(f"{self.config.url}: no server answers", why, "Check the address; start it.") from None

    def _message(self, error: BaseException) -> str:
        """What an error says, in a line, without the key."""
        text = str(error)
        with contextlib.suppress(Exception):  # the body of an error may be anything
            text = str(getattr(error, "body", None)["message"])  # type: ignore[index]
        text = " ".join(self._without_key(text).split())
        return text if len(text) <= 500 else text[:500] + " ..."

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


REFUSED = "the server refused the request"
