"""The options of commands that ask a teacher, a local model or one on a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from rlhf.cli import options, task_options
from rlhf.cli.sampling_options import SamplingOptions
from rlhf.config.load import check_config
from rlhf.core.errors import UserError, blame, nearest
from rlhf.core.limits import parse_yaml
from rlhf.inference.teacher import LocalTeacher, ServerTeacher, Teacher, is_server, refuse_both
from rlhf.runs.parents import resolve_model_path
from rlhf.runs.run import stage_of
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import ChatServer
from rlhf.servers.config import ServerConfig

CUE = "Let's think step by step. End with one line: The answer is ..."
"""The cue of --rationales (Kojima et al. 2022, with a form from which the answer can be read)."""
TeacherName = Annotated[
    str, typer.Option(metavar="RUN|MODEL|URL", help="A run, a model, or a server such as http://localhost:8000/v1.")
]
Cache = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where replies are kept; OUT.replies by default.")]


@dataclass(frozen=True)
class AskingOptions:
    """How a teacher is asked, and which of its answers are kept.

    Args:
        n: Answers to each prompt; 1, or 4 candidates.
        rationales: Ask the teacher to think step by step before it answers.
        cue (TEXT): What --rationales adds to each prompt.
        check: Keep only answers that equal the demonstration's; see --pattern.
    """

    n: Annotated[int | None, typer.Option("--n", "-n", min=1)] = None
    rationales: bool = False
    cue: str = CUE
    pattern: task_options.Pattern = None
    check: bool = False
    system: options.System = None


@dataclass(frozen=True)
class ServerOptions:
    """The model of a server, and limits of requests.

    Args:
        teacher_model (NAME): The model's name on the server; by default its only one.
        key_env (VARIABLE): The environment variable with the server's key. By default OPENAI_API_KEY, only for
            api.openai.com.
        concurrency: Most concurrent requests; 8 by default.
        requests_per_minute: Most requests per minute; no limit by default.
        retries: Most retries of a failed request; 6 by default.
        timeout_seconds: Longest time for one request; 300 by default.
        price_input: Price of a million prompt tokens, to count the cost.
        price_output: Price of a million completion tokens.
        max_cost: Stop when this much has been paid.
        send_seed: Send a seed with each request; on by default.
        extra_body (JSON): More fields of requests, such as '{"reasoning_effort": "low"}'.
    """

    teacher_model: str | None = None
    key_env: str | None = None
    concurrency: options.PositiveOrNone = None
    requests_per_minute: Annotated[float | None, typer.Option(min=0.01)] = None
    retries: Annotated[int | None, typer.Option(min=0)] = None
    timeout_seconds: Annotated[float | None, typer.Option(min=0.1)] = None
    price_input: Annotated[float | None, typer.Option(min=0)] = None
    price_output: Annotated[float | None, typer.Option(min=0)] = None
    max_cost: Annotated[float | None, typer.Option(min=0)] = None
    send_seed: Annotated[bool | None, typer.Option("--send-seed/--no-send-seed")] = None
    extra_body: str | None = None

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
            with blame("--extra-body"):
                values["extra_body"] = parse_yaml(values["extra_body"])
        return check_config(ServerConfig, {"url": url, **values}, "the teacher's options")


def distill_words(values: Mapping[str, Any]) -> list[str]:
    """Options of `rlhf data distill` by name as words of its command line.

    Args:
        values: `teacher`, and options of `AskingOptions`, `SamplingOptions` and `ServerOptions`.

    Raises:
        ValueError: There is no teacher, no such option, or a value has another type.
    """
    groups = (AskingOptions, SamplingOptions, ServerOptions)
    names = {field.name for group in groups for field in fields(group)}
    if not isinstance(values.get("teacher"), str):
        raise ValueError("teacher: name a run, a model, or the address of a server")
    words = ["--teacher", values["teacher"]]
    given = {name: value for name, value in values.items() if name != "teacher"}
    for name in given:
        if name not in names:
            raise ValueError(f"{name}: `rlhf data distill` has no such option; {nearest(name, names)}")
    for group in groups:
        mine = {field.name: given[field.name] for field in fields(group) if field.name in given}
        try:
            TypeAdapter(group).validate_python(mine)
        except ValidationError as error:
            raise ValueError("; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())) from None
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] if value else ["--no-send-seed"] if name == "send_seed" else []
        else:
            words += [f"{option}={one}" for one in (value if isinstance(value, list) else [value]) if one is not None]
    return words


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
        with ChatServer(server.config(teacher), replies) as opened:
            yield ServerTeacher(opened, _request_options(opened, sampling), sampling.seed)
        return
    resolve_model_path(teacher)
    if stage_of(teacher) == "reward":
        raise UserError(f"{teacher}: is a reward model, which writes no answers", remedy="Name an SFT or PPO run.")
    yield LocalTeacher(teacher, sampling.params(teacher), sampling.open, sampling.seed, replies)


def _request_options(server: ChatServer, sampling: SamplingOptions) -> dict[str, Any]:
    """The given sampling options as fields of a request. `top_k` and `min_tokens` are vLLM's and SGLang's names."""
    values: dict[str, Any] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "min_tokens": sampling.min_new_tokens, "stop": sampling.stop or None,
    }  # fmt: skip
    limit = {} if sampling.max_new_tokens is None else server.request_options(sampling.max_new_tokens)
    return limit | {name: value for name, value in values.items() if value is not None}
