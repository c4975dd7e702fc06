"""A judge on a server: compares two answers in both orders, or rates one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rlhf.judging.config import JudgeConfig
from rlhf.judging.prompt import Kind, conversation, read_prompt, read_rating, read_verdict
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import ChatServer
from rlhf.servers.replies import ChatRequest, Failure, Reply

V = TypeVar("V")
Messages = Sequence[Mapping[str, str]]
Verdict = Literal["A", "B", "C"]
_SWAPPED: dict[Verdict, Verdict] = {"A": "B", "B": "A", "C": "C"}


@dataclass(frozen=True)
class PairVerdicts:
    """The verdicts on two answers: `first` with the first answer shown as A, `second` with it shown as B, both in
    terms of the answers (A is the first answer). None is an unreadable verdict."""

    first: Verdict | None
    second: Verdict | None

    @property
    def readable(self) -> bool:
        return self.first is not None and self.second is not None

    @property
    def consistent(self) -> bool:
        """Whether both orders give the same verdict."""
        return self.readable and self.first == self.second

    @property
    def credit(self) -> float | None:
        """1 if the first answer wins, 0 if the second, 0.5 for a tie; None if a verdict is unreadable.

        An answer wins if it wins in both orders; everything else is a tie (Zheng et al. 2023, arXiv:2306.05685).
        """
        if not self.readable:
            return None
        return {"A": 1.0, "B": 0.0}.get(str(self.first), 0.5) if self.consistent else 0.5

    @property
    def shown_first(self) -> list[bool]:
        """Of each verdict that is no tie, whether it favours the answer that was shown first (as A)."""
        shown = [] if self.first in (None, "C") else [self.first == "A"]
        return shown + ([] if self.second in (None, "C") else [self.second == "B"])


class Judge:
    """A model on a server that judges. A context manager, which closes the connections.

    Args:
        config: Which server, and the limits.
        kind: Whether it compares or rates.

    Raises:
        UserError: The prompt cannot be read, or the key is missing.
    """

    def __init__(self, config: JudgeConfig, kind: Kind) -> None:
        self.config, self.prompt = config, read_prompt(kind, config.prompt)
        self.server = ChatServer(config.server_config(), ReplyCache(config.cache))
        self.failures: Counter[str] = Counter()
        """Why replies are missing, and how often."""
        self.unreadable = 0
        """Requests without a verdict that can be read."""
        self.example = ""
        """The beginning of the first reply without a verdict."""

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def facts(self) -> dict[str, Any]:
        """What identifies the judge in results: no key, no time."""
        config = self.config
        return {
            "url": config.url, "model": self.server.model, "kind": self.prompt.kind, "prompt": self.prompt.version,
            "prompt_fingerprint": self.prompt.fingerprint, "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }  # fmt: skip

    def compare(self, pairs: Iterable[tuple[Messages, str, str]]) -> Iterator[PairVerdicts]:
        """Verdicts on pairs (prompt's messages, first answer, second answer), each asked in both orders.

        Raises:
            UserError: The server cannot be used; see `ChatServer.ask`.
        """
        verdicts = (
            self._read(read_verdict, text)
            for text in self._texts(
                self._request(prompt=conversation(messages), answer_a=a, answer_b=b)
                for messages, one, two in pairs
                for a, b in ((one, two), (two, one))
            )
        )
        for first, second in zip(*[verdicts] * 2):
            yield PairVerdicts(first, None if second is None else _SWAPPED[second])

    def rate(self, answers: Iterable[tuple[Messages, str]]) -> Iterator[float | None]:
        """Ratings from 1 to 10 of answers (prompt's messages, answer); None for one without a readable rating.

        Raises:
            UserError: The server cannot be used; see `ChatServer.ask`.
        """
        requests = (self._request(prompt=conversation(messages), answer=answer) for messages, answer in answers)
        yield from (self._read(read_rating, text) for text in self._texts(requests))

    def _request(self, **values: str) -> ChatRequest:
        options = {"temperature": self.config.temperature, **self.server.request_options(self.config.max_tokens)}
        if self.server.config.send_seed:
            options["seed"] = 0
        return ChatRequest([{"role": "user", "content": self.prompt.render(**values)}], options)

    def _texts(self, requests: Iterable[ChatRequest]) -> Iterator[str | None]:
        for reply in self.server.ask(requests):
            if isinstance(reply, Failure):
                self.failures[reply.reason] += 1
            yield reply.text if isinstance(reply, Reply) else None

    def _read(self, read: Callable[[str], V | None], text: str | None) -> V | None:
        """The verdict in a reply; None, which is counted, without a reply or a verdict."""
        verdict = None if text is None else read(text)
        self.unreadable += verdict is None
        if verdict is None and text is not None and not self.example:
            self.example = text[:200] or "(an empty reply)"
        return verdict

    def why_unreadable(self) -> str:
        """Why verdicts are missing: failed requests by reason, and a reply without a verdict."""
        why = [f"{count:,}: {reason}" for reason, count in self.failures.items()]
        return "; ".join([*why, *([f"a reply: {self.example!r}"] if self.example else [])])
