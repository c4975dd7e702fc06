"""What is asked, what comes back, and what it took."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MALFORMED = "the server's reply is not a chat completion"


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion."""

    messages: Sequence[Mapping[str, str]]
    """{role, content}, as OpenAI's API takes them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, as the server names them: max_tokens, temperature, top_p, stop, seed, ..."""
    number: int = 0
    """Which of several samples of the same request. It is not sent; each number has its own cached reply."""


@dataclass(frozen=True)
class Reply:
    """One completion."""

    text: str
    finish_reason: str
    """`stop` if the model ended it, `length` if it was cut off; other words are the server's own."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    refusal: str = ""
    """The server's own field for a model that declines to answer."""
    reasoning: str = ""
    """What a reasoning model thought before its answer, if the server returns it separately."""
    cached: bool = field(default=False, compare=False)
    """Whether it was read from the disk."""

    def as_dict(self) -> dict[str, Any]:
        """Its JSON form; see `reply_from`."""
        return {name: value for name, value in asdict(self).items() if name != "cached"}


@dataclass(frozen=True)
class Failure:
    """A request that got no completion: the server refused this one, or failed each time."""

    reason: str
    """In the same words for every such request, so that failures can be counted by it."""
    detail: str = ""


def reply_from(row: Any, cached: bool) -> Reply:
    """A reply from its JSON form.

    Raises:
        ValueError: A field is missing or has the wrong type.
    """
    if not isinstance(row, dict) or set(row) != set(Reply("", "").as_dict()):
        raise ValueError("not a reply")
    texts = [row[name] for name in ("text", "finish_reason", "refusal", "reasoning")]
    counts = [row[name] for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(text, str) for text in texts) or not all(n is None or type(n) is int for n in counts):
        raise ValueError("not a reply")
    return Reply(**row, cached=cached)


def read_completion(body: Any) -> Reply:
    """The first choice of a `chat.completion` object.

    Raises:
        ValueError: It is not such an object.
    """
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        reply = Reply(
            text=message.get("content") or "",
            finish_reason=choice.get("finish_reason") or "",
            prompt_tokens=counts[0] if type(counts[0]) is int else None,
            completion_tokens=counts[1] if type(counts[1]) is int else None,
            refusal=message.get("refusal") or "",
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(MALFORMED) from None
    return reply_from(reply.as_dict(), cached=False)


@dataclass
class Usage:
    """What was sent and received. Threads may add to it."""

    requests: int = 0
    """Completions that the server made, each of which may cost something."""
    retries: int = 0
    failures: int = 0
    """Requests without a completion after all retries."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Completions whose tokens the server did not count."""
    cached: int = 0
    """Completions read from the disk."""
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, reply: Reply) -> None:
        with self._lock:
            prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
            if reply.cached:
                self.cached += 1
                self.cached_prompt_tokens += prompt
                self.cached_completion_tokens += completion
                return
            self.requests += 1
            self.prompt_tokens += prompt
            self.completion_tokens += completion
            self.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None

    def count(self, name: str) -> None:
        """Add one to `retries` or `failures`."""
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
