"""Which server is asked, and within which limits."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Strict
from rlhf.core.errors import UserError

OPENAI = "api.openai.com"
OPENAI_KEY = "OPENAI_API_KEY"


class ServerConfig(Strict):
    url: Annotated[str, Field(min_length=1)]
    """The base of a server with OpenAI's chat API, such as http://localhost:8000/v1 or https://api.openai.com/v1."""
    model: str = ""
    """The model's name on the server. By default the only one that the server lists."""
    key_env: str = ""
    """The environment variable that holds the key. By default OPENAI_API_KEY for api.openai.com, and no key for any
    other server, so that a key is sent only where it belongs."""
    concurrency: PositiveInt = 8
    """The most requests that wait for an answer at the same time."""
    requests_per_minute: PositiveFloat | None = None
    """The most requests that are sent in a minute, retries included. No limit by default."""
    retries: NonNegativeInt = 6
    """How often a request is sent again after status 408, 409, 429 or 5xx, a time-out, or a broken connection."""
    timeout_seconds: PositiveFloat = 300.0
    """How long one request may take."""
    price_input: NonNegativeFloat = 0.0
    """Price of a million prompt tokens, in the currency of your choice."""
    price_output: NonNegativeFloat = 0.0
    """Price of a million completion tokens."""
    max_cost: PositiveFloat | None = None
    """Send no further request when this process has paid this much; needs the prices. No limit by default."""
    send_seed: bool = True
    """Send a seed with each request. Turn it off for a server that refuses the field."""
    extra_body: dict[str, Any] = {}
    """More fields of every request, such as {"reasoning_effort": "low"}."""

    def faults(self) -> Iterator[str]:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"url: {self.url!r} is not an http or https address; write it as http://HOST:PORT/v1"
        if parts.username or parts.password or parts.query or parts.fragment:
            # the value is not repeated here: it may hold a key
            yield (
                "url: has a user name, password, query or fragment, which would be written to files; name the "
                "environment variable that holds the key instead"
            )
        if self.max_cost is not None and not (self.price_input or self.price_output):
            yield "max_cost: needs price_input and price_output"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        """Whether the server runs on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def key_variable(self) -> str:
        """The environment variable that holds the key; empty if the server needs none."""
        return self.key_env or (OPENAI_KEY if self.host == OPENAI else "")

    def key(self) -> str:
        """The key from the environment, or an empty text.

        Raises:
            UserError: The variable is not set, or the key would cross a network unencrypted.
        """
        name = self.key_variable
        if not name:
            return ""
        value = os.environ.get(name, "").strip()
        if not value:
            raise UserError(
                f"{self.url}: the environment variable {name}, which should hold the key, is not set",
                remedy=f"Set it: read -rs {name}; export {name}",
            )
        if urlsplit(self.url).scheme == "http" and not self.is_loopback:
            raise UserError(
                f"{self.url}: the key in {name} would be sent unencrypted over the network",
                remedy="Use https, or a tunnel to the server (ssh -L) and its address on this machine.",
            )
        return value

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of this many tokens."""
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6
