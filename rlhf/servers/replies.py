"""What is asked, what comes back, and what it took."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pydantic
from pydantic import ConfigDict

MALFORMED = "the server's reply is not a chat completion"
_COUNTING = threading.Lock()


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion."""

    messages: Sequence[Mapping[str, str]]
    """{role, content}, as OpenAI's API takes them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, as the server names them: max_tokens, temperature, top_p, stop, seed, ..."""
    number: int = 0
    """Which of several samples of the same request. It is not sent; each number has its own cached reply."""


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Reply:
    """One completion.

    Raises:
        ValueError: A field has the wrong type.
    """

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
        """Its JSON form, which are the fields to make it from."""
        return {name: value for name, value in asdict(self).items() if name != "cached"}


@dataclass(frozen=True)
class Failure:
    """A request that got no completion: the server refused this one, or failed each time."""

    reason: str
    """In the same words for every such request, so that failures can be counted by it."""
    detail: str = ""


def read_completion(body: Any) -> Reply:
    """The first choice of a `chat.completion` object.

    Raises:
        ValueError: It is not such an object.
    """
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        return Reply(
            text=message.get("content") or "",
            finish_reason=choice.get("finish_reason") or "",
            prompt_tokens=counts[0] if type(counts[0]) is int else None,
            completion_tokens=counts[1] if type(counts[1]) is int else None,
            refusal=message.get("refusal") or "",
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise ValueError(MALFORMED) from None


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

    def add(self, reply: Reply) -> None:
        with _COUNTING:
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
        with _COUNTING:
            setattr(self, name, getattr(self, name) + 1)

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)
