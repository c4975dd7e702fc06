"""Which judge is asked, and how: the same keys in a PPO config, in a YAML file and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from rlhf.config.base import Strict
from rlhf.config.load import check_config, inline_values, read_values
from rlhf.core.errors import UserError
from rlhf.servers.config import ServerConfig


class JudgeConfig(Strict):
    url: str
    """The base of a server with OpenAI's chat API, such as http://localhost:8000/v1."""
    model: str = ""
    """The model's name on the server; by default its only one."""
    key_env: str = ""
    """The environment variable that holds the key; by default OPENAI_API_KEY for api.openai.com alone."""
    prompt: str = ""
    """A file with the judge's prompt; by default ours."""
    max_tokens: PositiveInt = 512
    """Longest reply, in tokens."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    cache: str = "judge-replies"
    """The folder where replies are kept, so that none is paid for twice."""
    server: dict[str, Any] = {}
    """More keys of the server's limits: concurrency, requests_per_minute, retries, timeout_seconds, price_input,
    price_output, max_cost, send_seed, extra_body."""

    @model_validator(mode="after")
    def _server_is_right(self) -> JudgeConfig:
        if twice := sorted({"url", "model", "key_env"} & set(self.server)):
            raise ValueError(f"server: {', '.join(twice)} is a key of the judge itself")
        self.server_config()
        return self

    def server_config(self) -> ServerConfig:
        """The server's own config.

        Raises:
            ValueError: A value is wrong (pydantic's error).
        """
        return ServerConfig(url=self.url, model=self.model, key_env=self.key_env, **self.server)


class RewardJudgeConfig(JudgeConfig):
    agreement: str = ""
    """The file that `rlhf judge` has written for this judge."""
    unmeasured: bool = False
    """Use a judge without such a file."""


def read_judge(spec: str) -> JudgeConfig:
    """A judge.

    Args:
        spec: The address of a server, a mapping such as ``{url: ..., model: ...}``, or a YAML file of one.

    Raises:
        UserError: It is none of these, or a value is wrong.
    """
    if spec.startswith(("http://", "https://")):
        return check_config(JudgeConfig, {"url": spec}, "the judge")
    if (values := inline_values(spec, "judge")) is not None:
        return check_config(JudgeConfig, values, "the judge")
    if not Path(spec).is_file():
        raise UserError(
            f"judge {spec}: is neither the address of a server, nor a mapping, nor a file",
            remedy="Name one, such as http://localhost:8000/v1 or '{url: http://localhost:8000/v1, model: NAME}'.",
        )
    return check_config(JudgeConfig, read_values(spec), spec)
