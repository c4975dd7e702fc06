"""A model that is asked for texts: a local one, or one on a server. Replies are kept on disk and never made twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rlhf.core.console import progress
from rlhf.core.errors import UserError
from rlhf.data.schema import Prompt
from rlhf.data.tool_turns import has_tools
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import SamplingParams
from rlhf.runs.model_folder import fingerprint
from rlhf.runs.parents import parent_facts
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import ChatServer
from rlhf.servers.replies import ChatRequest, Failure, Reply, Usage

PROMPTS_AT_ONCE = 256
"""Prompts that a local model answers between two writes to the disk, divided by the answers to each."""
NO_TOOLS = "a prompt with turns of tools is not sent to a server"


class Teacher(Protocol):
    """A model that answers prompts."""

    usage: Usage

    @property
    def name(self) -> str:
        """What its answers are attributed to."""

    def facts(self) -> dict[str, Any]:
        """What a manifest records about it. It has no key and no time."""

    def parents(self) -> list[dict[str, Any]]:
        """What a dataset of its answers names as a parent besides datasets: the model, if it is on this disk."""

    def answers(self, prompts: Sequence[Prompt], n: int = 1) -> Iterator[list[Reply | Failure]]:
        """`n` replies to each prompt, in order; each depends on the seed, the prompt and its number alone.

        Raises:
            UserError: The model cannot be loaded, or the server cannot be used.
        """


class ServerTeacher:
    """A model on a server.

    Args:
        server: The server.
        options: Fields of its requests, as it names them.
        seed: Seed of all random streams; it is sent with each request unless the server's config says otherwise.
    """

    def __init__(self, server: ChatServer, options: dict[str, Any], seed: int) -> None:
        self._server, self._options, self._seed, self.usage = server, options, seed, server.usage

    @property
    def name(self) -> str:
        return self._server.model

    def facts(self) -> dict[str, Any]:
        config = self._server.config
        sampling = {**self._options, **config.extra_body, "seed": self._seed}
        return {"kind": "server", "url": config.url, "model": self.name, "sampling": sampling}

    def parents(self) -> list[dict[str, Any]]:
        return []  # a server's model is not on this disk, so it cannot be looked up again

    def answers(self, prompts: Sequence[Prompt], n: int = 1) -> Iterator[list[Reply | Failure]]:
        with progress(f"asking {self.name}", len(prompts), "prompts") as advance:
            plain = [prompt for prompt in prompts if not has_tools(prompt.messages)]
            replies = self._server.ask(self._request(prompt, k) for prompt in plain for k in range(n))
            for prompt in prompts:
                yield [Failure(NO_TOOLS)] * n if has_tools(prompt.messages) else list(islice(replies, n))
                advance()

    def _request(self, prompt: Prompt, number: int) -> ChatRequest:
        options = dict(self._options)
        if self._server.config.send_seed:  # 31 bits, because some servers read no more
            options["seed"] = stream_seed(self._seed, int(prompt.prompt_id, 16), number) & 0x7FFFFFFF
        return ChatRequest(prompt.chat, options, number)


class LocalTeacher:
    """A run, a model folder or a hub name.

    Args:
        path: The model.
        params: How it is sampled.
        load: Gives its policy; called when the first reply is not on disk.
        seed: Seed of all random streams.
        cache: Where replies are kept.
    """

    def __init__(
        self, path: str, params: SamplingParams, load: Callable[[str], Any], seed: int, cache: ReplyCache
    ) -> None:
        self._path, self.usage = path, Usage()
        self._params, self._load, self._seed, self._cache = params, load, seed, cache
        self._policy: Any = None
        self._model = parent_facts(path)
        if "fingerprint" not in self._model and Path(path).is_dir():
            self._model["fingerprint"] = fingerprint(Path(path))

    @property
    def name(self) -> str:
        return self._path

    def facts(self) -> dict[str, Any]:
        return {"kind": "model", **self._model, "sampling": self._sampling()}

    def parents(self) -> list[dict[str, Any]]:
        return [{"kind": "model", **self._model}]

    def _sampling(self) -> dict[str, Any]:
        names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p")
        kept = {name: getattr(self._params, name) for name in names}
        return {**kept, "stop": list(self._params.stop), "seed": self._seed}

    def answers(self, prompts: Sequence[Prompt], n: int = 1) -> Iterator[list[Reply | Failure]]:
        size = max(1, PROMPTS_AT_ONCE // n)
        for part in (prompts[start : start + size] for start in range(0, len(prompts), size)):
            found: dict[str, list[Reply | Failure | None]] = {
                one.prompt_id: [self._cache.get(self._key(one, k)) for k in range(n)] for one in part
            }
            missing = [prompt for prompt in part if any(reply is None for reply in found[prompt.prompt_id])]
            if missing:
                found |= self._sample(missing, n)
            for prompt in part:
                replies = [reply for reply in found[prompt.prompt_id] if reply is not None]
                for reply in replies:
                    if isinstance(reply, Reply):
                        self.usage.add(reply)
                    else:
                        self.usage.count("failures")
                yield replies

    def _key(self, prompt: Prompt, number: int) -> str:
        return ReplyCache.key(self._model, self._sampling(), prompt.chat, number)

    def _sample(self, prompts: list[Prompt], n: int) -> dict[str, list[Reply | Failure | None]]:
        from rlhf.data.chat_rendering import RefusedText
        from rlhf.inference.sampling import sample  # imports torch

        if self._policy is None:
            self._policy = self._load(self._path)
        found: dict[str, list[Reply | Failure | None]] = {}
        usable = []
        for prompt in prompts:
            try:
                self._policy.chat.prompt(prompt.messages)
                usable.append(prompt)
            except RefusedText as error:
                found[prompt.prompt_id] = [Failure("the chat template refuses the prompt", str(error))] * n
        for drawn in sample(self._policy, usable, self._params, self._seed, n):
            replies = [
                Reply(
                    one.text, "stop" if one.completion.ended else "length", len(one.prompt_ids), len(one.completion.ids)
                )
                for one in drawn
            ]
            for k, reply in enumerate(replies):
                self._cache.put(self._key(drawn[0].prompt, k), reply)
            found[drawn[0].prompt.prompt_id] = [*replies]
        return found


def is_server(teacher: str) -> bool:
    """Whether a teacher is the address of a server, not a run, folder or hub name."""
    return teacher.startswith(("http://", "https://"))


def refuse_both(teacher: str, given: dict[str, Any]) -> None:
    """Refuse options of servers for a local model.

    Raises:
        UserError: One is given.
    """
    if given and not is_server(teacher):
        name = next(iter(given))
        raise UserError(
            f"--{name.replace('_', '-')}: is for a teacher on a server, and {teacher} is a local model",
            remedy="Leave it out, or give the server's address as --teacher http://HOST:PORT/v1.",
        )
