"""The options of commands that ask a teacher, a local model or one on a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli.sampling_options import SamplingOptions
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.core.limits import parse_yaml
from rlhf.inference.teacher import LocalTeacher, ServerTeacher, Teacher, is_server, refuse_both
from rlhf.runs.run import is_run, read_run, resolve_model_path
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import Server
from rlhf.servers.config import ServerConfig


@dataclass(frozen=True)
class ServerOptions:
    """Which model of a server is asked, and within which limits."""

    teacher_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name on the server; by default its only one.")
    ] = None
    key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help="The environment variable with the server's key. By default OPENAI_API_KEY for api.openai.com alone.",
        ),
    ] = None
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests under way at once; 8 by default.")] = (
        None
    )
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.01, help="Most requests in a minute; no limit by default.")
    ] = None
    retries: Annotated[
        int | None, typer.Option(min=0, help="Times that a failed request is sent again; 6 by default.")
    ] = None
    timeout_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Longest time for one request; 300 by default.")
    ] = None
    price_input: Annotated[
        float | None, typer.Option(min=0, help="Price of a million prompt tokens, to count the cost.")
    ] = None
    price_output: Annotated[float | None, typer.Option(min=0, help="Price of a million completion tokens.")] = None
    max_cost: Annotated[float | None, typer.Option(min=0, help="Stop when this much has been paid.")] = None
    send_seed: Annotated[
        bool | None,
        typer.Option("--send-seed/--no-send-seed", help="Send a seed with each request; on by default."),
    ] = None
    extra_body: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='More fields of requests, such as \'{"reasoning_effort": "low"}\'.'),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that are given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def config(self, url: str) -> ServerConfig:
        """The server's config.

        Raises:
            UserError: A value is wrong.
        """
        values = self.given()
        if "teacher_model" in values:
            values["model"] = values.pop("teacher_model")
        if "extra_body" in values:
            try:
                values["extra_body"] = parse_yaml(values["extra_body"])
            except ValueError as error:
                raise UserError(f"--extra-body: {error}") from None
        return check_config(ServerConfig, {"url": url, **values}, "the teacher's options")


@contextmanager
def open_teacher(
    teacher: str, sampling: SamplingOptions, server: ServerOptions, cache: str | Path
) -> Iterator[Teacher]:
    """A local model or a server's, with its replies kept in a folder. Nothing is loaded before the first question.

    Args:
        teacher: A run, a model folder, a hub name, or the address of a server.
        sampling: How it is sampled. Of a server's model, only what is given; the server decides the rest.
        server: Options of servers.
        cache: The folder.

    Raises:
        UserError: There is no such model, an option does not fit, or the key is missing.
    """
    refuse_both(teacher, server.given())
    replies = ReplyCache(cache)
    if is_server(teacher):
        with Server(server.config(teacher), replies) as opened:
            yield ServerTeacher(opened, _request_options(opened, sampling), sampling.seed)
        return
    resolve_model_path(teacher)
    if is_run(teacher) and read_run(teacher)["stage"] == "reward":
        raise UserError(f"{teacher}: is a reward model, which writes no answers", remedy="Name an SFT or PPO run.")
    yield LocalTeacher(teacher, sampling.params(teacher), sampling.open, sampling.seed, replies)


def _request_options(server: Server, sampling: SamplingOptions) -> dict[str, Any]:
    """The given sampling options as fields of a request. `top_k` and `min_tokens` are vLLM's and SGLang's names."""
    values: dict[str, Any] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "min_tokens": sampling.min_new_tokens, "stop": sampling.stop or None,
    }  # fmt: skip
    limit = {} if sampling.max_new_tokens is None else server.request_options(sampling.max_new_tokens)
    return limit | {name: value for name, value in values.items() if value is not None}
