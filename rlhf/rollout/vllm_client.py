"""The sampler `vllm-server`: rank 0 sends weights and all prompts to a server, which it starts unless there is one."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import urllib.parse
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.distributed.child_process import child_environment, how_it_ended
from rlhf.models.vocabulary import token_count
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.rollout.vllm import description, dtype_of, sent_weights
from rlhf.rollout.vllm_server import TOKEN

PART_BYTES = 1 << 28
"""Weights are sent in parts of about this size, so that no second copy of the model is needed here."""
CONTINUE = "Continue from the last checkpoint with --resume."
PATIENCE = 30.0
"""Seconds within which a server that works must answer `/health`."""


def start(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer,
    ends: list[int], url: str | None, **options: Any,
) -> Callable[[], list[Completion]]:  # fmt: skip
    """Send the weights as they are now, and start to sample the prompts of all ranks. Every rank calls it.

    Returns:
        A function that waits for this rank's completions. Every rank calls it.

    Raises:
        UserError: There is no server, or it has ended, or it refuses.
    """
    everyone = _gather([list(prompts), list(seeds)])
    first = sum(len(one[0]) for one in everyone[: distributed.rank()])
    waiting: Future[list[Completion]] | None = None
    if distributed.rank() == 0:
        server = _server(model, chat, sampling, url, **options)
        request = {
            "version": server.send(model),
            "prompts": [prompt for one in everyone for prompt in one[0]],
            "seeds": [seed for one in everyone for seed in one[1]],
            "sampling": asdict(sampling), "ends": ends, "tokens": token_count(chat.tokenizer),
        }  # fmt: skip
        waiting = server.submit(request)

    def wait() -> list[Completion]:
        found: list[Completion] = distributed.from_main(server.wait(waiting) if waiting is not None else None)
        return found[first : first + len(prompts)]

    return wait


def _gather(mine: Any) -> list[Any]:
    """The values of all ranks, on all ranks."""
    found = [mine]
    if distributed.world_size() > 1:
        found = [None] * distributed.world_size()
        torch.distributed.all_gather_object(found, mine)
    return found


class Server:
    """A server that this process sends to; `child` is its process, where this one started it."""

    def __init__(self, url: str, token: str, child: subprocess.Popen[str] | None = None) -> None:
        self.url, self.token, self.child = url, token, child
        self.run, self.sent = secrets.token_hex(8), 0
        self.line = ThreadPoolExecutor(1)  # requests are made in order

    def call(self, method: str, path: str, body: bytes = b"", timeout: float | None = None) -> dict[str, Any]:
        """One request. Raises a UserError if the server is lost or refuses."""
        address = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self.token}"})
            reply = connection.getresponse()
            content: dict[str, Any] = json.loads(reply.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.lost(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if reply.status != 200:
            raise UserError(
                f"rollout.sampler: the server {self.url} refuses {path}: {content.get('error')}",
                remedy=CONTINUE,
            )
        return content

    def lost(self, why: str) -> UserError:
        """The error of a server that does not answer."""
        how = _how(self.child) if self.child is not None else None
        if how is None:
            restart = "" if self.child is not None else "Start it again with `rlhf serve-sampler`. "
            return UserError(f"rollout.sampler: the server {self.url} does not answer", why, restart + CONTINUE)
        return UserError(f"rollout.sampler: the server {self.url} {how}", "Its own message is above.", CONTINUE)

    @torch.no_grad()
    def send(self, model: Any) -> str:
        """Send the weights with adapters merged. Gives the name of this version."""
        self.sent += 1
        version, part, size = f"{self.run}_{self.sent}", 0, 0
        tensors: dict[str, torch.Tensor] = {}

        def flush() -> None:
            nonlocal part, size
            self.call("POST", f"/weights/{version}/{part}", save(tensors), timeout=600)
            tensors.clear()
            part, size = part + 1, 0

        dtype = getattr(torch, dtype_of(model))
        for name, weight in sent_weights(model):
            tensors[name] = weight.to("cpu", dtype).contiguous()
            size += tensors[name].nbytes
            if size >= PART_BYTES:
                flush()
        flush()
        return version

    def submit(self, request: dict[str, Any]) -> Future[list[Completion]]:
        """Sample in the background, after the requests before."""
        body = json.dumps(request).encode()
        asked = lambda: self.call("POST", "/sample", body)["completions"]  # noqa: E731
        return self.line.submit(lambda: [Completion(*row) for row in asked()])

    def wait(self, waiting: Future[list[Completion]]) -> list[Completion]:
        """The result; meanwhile the server must keep answering."""
        while True:
            try:
                return waiting.result(timeout=5)
            except TimeoutError:
                self.call("GET", "/health", timeout=PATIENCE)


_servers: weakref.WeakKeyDictionary[Any, Server] = weakref.WeakKeyDictionary()


def _server(model: Any, chat: ChatTokenizer, sampling: SamplingParams, url: str | None, **options: Any) -> Server:
    """The server of a model: the one at `url`, or one that this process starts at the first rollout."""
    if model not in _servers:
        if url is not None:
            _servers[model] = connect(url)
        else:
            _servers[model] = _launch(model, chat, sampling, **options)
    return _servers[model]


def connect(url: str) -> Server:
    """A server that was started before.

    Raises:
        UserError: No token in the environment, or no answer.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise UserError(f"rollout.sampler: {TOKEN} is not set", remedy="Export what `rlhf serve-sampler` printed.")
    server = Server(url, token)
    server.call("GET", "/health", timeout=PATIENCE)
    return server


def _launch(
    model: Any, chat: ChatTokenizer, sampling: SamplingParams, *, python: str | None, devices: str | None,
    **options: Any,
) -> Server:  # fmt: skip
    """A server in a process of its own, which ends with the model and with this process."""
    words = options | {
        "model": str(description(model, chat)), "sequences": sampling.batch_size, "dtype": dtype_of(model),
    }  # fmt: skip
    token = secrets.token_urlsafe(32)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = child_environment(**{TOKEN: token, "PYTHONPATH": path})
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    child = subprocess.Popen(
        [python or sys.executable, "-m", "rlhf.rollout.vllm_server", json.dumps(words)],
        stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    weakref.finalize(model, _end, child)
    assert child.stdout is not None
    port = child.stdout.readline().strip()
    if not port:
        raise UserError(
            f"rollout.sampler: the server did not start: its process {_how(child)}",
            "Its own message is above.",
        )
    return Server(f"http://127.0.0.1:{port}", token, child)


def _how(child: subprocess.Popen[str]) -> str | None:
    """How the process ended, waiting a moment for it; None if it runs."""
    try:
        return f"(pid {child.pid}) {how_it_ended(child.wait(timeout=5))}"
    except subprocess.TimeoutExpired:
        return None


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()
