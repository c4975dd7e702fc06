"""The sampler `vllm-server`: rank 0 sends weights and all prompts to a server, which it starts unless there is one.

A server that this run started and that dies is restarted once, and is sent the same weights and prompts, so that the
run continues exactly. For this, the folder of the sent weights belongs to this process.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from rlhf import distributed
from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.distributed.exchange_folder import ExchangeFolder
from rlhf.distributed.launch import child_environment, how_it_ended
from rlhf.models.vocabulary import token_count
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.rollout.vllm import description, dtype_of, sent_weights
from rlhf.rollout.vllm_server import TOKEN
from rlhf.tuning.lora_weights import LoraShape, lora_shape, lora_weights

PART_BYTES = 1 << 27
"""Weights are sent in parts of about this size, so that no second copy of the model is needed here."""
CONTINUE = "Continue from the last checkpoint with --resume."
PATIENCE = 30.0
"""Seconds within which a live server must answer `/health`."""


def start(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer,
    ends: list[int], url: str | None, **options: Any,
) -> Callable[[], list[Completion]]:  # fmt: skip
    """Send the weights as they are now, and start to sample the prompts of all ranks. Every rank calls it.

    Returns:
        A function that waits for this rank's completions. Every rank calls it.

    Raises:
        UserError: There is no server, or it has ended (for the second time, if this run starts it), or it refuses.
    """
    everyone = _gather([list(prompts), list(seeds)])
    first = sum(len(one[0]) for one in everyone[: distributed.rank()])
    shape = None if sampling.merge_adapters else lora_shape(model)
    server: SamplerServer | None = None
    if distributed.rank() == 0:
        server = _server(model, chat, sampling, url, shape, **options)
    alone: bool = distributed.from_main(server is not None and server.takes(shape))
    dtype = getattr(torch, dtype_of(model))
    sent = _send(server, model, alone, dtype)
    request = {
        "prompts": [prompt for one in everyone for prompt in one[0]],
        "seeds": [seed for one in everyone for seed in one[1]],
        "sampling": asdict(sampling), "ends": ends, "tokens": token_count(chat.tokenizer),
    }  # fmt: skip
    waiting = server.submit(request | sent) if server is not None else None

    def wait() -> list[Completion]:
        nonlocal sent, waiting
        while True:
            found: list[Completion] | None = distributed.from_main(waiting() if waiting is not None else None)
            if found is not None:
                return found[first : first + len(prompts)]
            # The server was started again. What was sent for this rollout is in its folder; a base is not.
            if alone:
                sent |= {"weights": _send_base(server, model, dtype)}
            waiting = server.submit(request | sent) if server is not None else None

    return wait


def _gather(mine: Any) -> list[Any]:
    """The values of all ranks, on all ranks."""
    found = [mine]
    if distributed.world_size() > 1:
        found = [None] * distributed.world_size()
        torch.distributed.all_gather_object(found, mine)
    return found


def _send(server: SamplerServer | None, model: Any, alone: bool, dtype: torch.dtype) -> dict[str, str | None]:
    """Send the weights merged, or (`alone`) the adapter to a base that is sent once. Every rank calls it.

    Returns:
        The fields of a request that name them.
    """
    while True:  # again if the server is lost on the way; it is started again once
        weights = _send_base(server, model, dtype) if alone else _upload(server, sent_weights(model), dtype)
        adapter = _upload(server, lora_weights(model), dtype) if alone and weights else None
        if weights and (adapter or not alone):
            return {"weights": weights, "adapter": adapter}


def _send_base(server: SamplerServer | None, model: Any, dtype: torch.dtype) -> str | None:
    """The version of the base on the server, which is sent if it is not there; None if the server was lost."""
    known: str | None = distributed.from_main(server.base_of(model) if server is not None else None)
    if known is not None:
        return known
    sent = _upload(server, sent_weights(model, merge=False), dtype)
    if server is not None and sent is not None:
        server.base = (weakref.ref(model), sent)
    return sent


@torch.no_grad()
def _upload(
    server: SamplerServer | None, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> str | None:
    """Rank 0 sends the weights, which every rank takes one after another.

    Returns:
        The name of this version, on every rank; None if the server was lost, and started again.
    """
    upload = Upload(server, dtype) if server is not None else None
    for name, weight in weights:
        if upload is not None:
            upload.add(name, weight)
    return distributed.from_main(upload.finish() if upload is not None else None)


class ServerLost(UserError):
    """A server that has ended or does not answer."""


class SamplerServer:
    """A server that this process sends to.

    Args:
        url: Its address.
        token: What its requests carry.
        launch: Starts it again, and gives address and process; None for a server that a user started.
    """

    def __init__(self, url: str, token: str, launch: Launch | None = None) -> None:
        self.url, self.token, self.launch = url, token, launch
        self.child: subprocess.Popen[str] | None = None
        self.run, self.sent = secrets.token_hex(8), 0
        self.starts, self.lost_in_rollout = 0, False
        self.base: tuple[Any, str] | None = None
        """A weak reference to the model whose base the server has, and its version; None if it has none."""
        if launch is not None:
            self._launch(launch)
        self.line = ThreadPoolExecutor(1)  # requests are made in order
        self.facts = self.call("GET", "/health", timeout=PATIENCE)

    def _launch(self, launch: Launch) -> None:
        self.url, self.child = launch()
        self.starts += 1

    def takes(self, shape: LoraShape | None) -> bool:
        """Whether the server computes with an adapter of this shape, so that it can be sent without the base."""
        return shape is not None and shape.rank <= self.facts.get("lora_rank", 0)

    def base_of(self, model: Any) -> str | None:
        """The version of the model's base, if the server has it."""
        return self.base[1] if self.base is not None and self.base[0]() is model else None

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

    def lost(self, why: str) -> ServerLost:
        """The error of a server that does not answer."""
        how = _how(self.child) if self.child is not None else None
        if how is None:
            restart = "" if self.child is not None else "Start it again with `rlhf serve-sampler`. "
            return ServerLost(f"rollout.sampler: the server {self.url} does not answer", why, restart + CONTINUE)
        return ServerLost(f"rollout.sampler: the server {self.url} {how}", "Its own message is above.", CONTINUE)

    def restart(self, error: ServerLost) -> None:
        """Start a lost server again. Raises the error if a user started it, or it was lost in this rollout before."""
        if self.launch is None or self.lost_in_rollout:
            raise error
        warn(f"{error.what}; it is started again")
        self.lost_in_rollout = True
        self.end()
        self.line, self.base = ThreadPoolExecutor(1), None
        self._launch(self.launch)

    def end(self) -> None:
        """End the server's process, if this one started it, and drop its pending requests."""
        self.line.shutdown(wait=False, cancel_futures=True)
        if self.child is not None:
            _end(self.child)

    def submit(self, request: dict[str, Any]) -> Callable[[], list[Completion] | None]:
        """Sample in the background, after earlier requests.

        Returns:
            A function that waits for the completions; it gives None if the server was lost, and started again.
        """
        body, starts = json.dumps(request).encode(), self.starts
        future: Future[dict[str, Any]] = self.line.submit(lambda: self.call("POST", "/sample", body))

        def wait() -> list[Completion] | None:
            try:
                rows = self._result(future)["completions"]
            except (ServerLost, CancelledError) as error:
                if starts == self.starts:
                    assert isinstance(error, ServerLost)  # only `end` cancels requests
                    self.restart(error)
                return None
            self.lost_in_rollout = False
            return [Completion(*row) for row in rows]

        return wait

    def _result(self, future: Future[dict[str, Any]]) -> dict[str, Any]:
        """The result; meanwhile the server must keep answering."""
        while True:
            try:
                return future.result(timeout=5)
            except TimeoutError:
                self.call("GET", "/health", timeout=PATIENCE)


class Upload:
    """An upload of weights to a server, in parts."""

    def __init__(self, server: SamplerServer, dtype: torch.dtype) -> None:
        server.sent += 1
        self.server, self.dtype, self.version = server, dtype, f"{server.run}_{server.sent}"
        self.tensors: dict[str, torch.Tensor] = {}
        self.parts = self.size = 0
        self.error: ServerLost | None = None
        """Once it is set, weights are still gathered, which all ranks do together, but not sent."""

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Take a weight, and send a part if it is large enough."""
        if self.error is not None:
            return
        self.tensors[name] = weight.to("cpu", self.dtype, copy=True).contiguous()
        self.size += self.tensors[name].nbytes
        if self.size >= PART_BYTES:
            self._flush()

    def finish(self) -> str | None:
        """Send the rest. Gives the version; None if the server was lost, and started again."""
        if self.error is None:
            self._flush()
        if self.error is None:
            return self.version
        self.server.restart(self.error)
        return None

    def _flush(self) -> None:
        body = save(self.tensors)
        self.tensors.clear()
        try:
            self.server.call("POST", f"/weights/{self.version}/{self.parts}", body, timeout=600)
        except ServerLost as error:
            self.error = error
        self.parts, self.size = self.parts + 1, 0


Launch = Callable[[], tuple[str, subprocess.Popen[str]]]
_servers: weakref.WeakKeyDictionary[Any, SamplerServer] = weakref.WeakKeyDictionary()


def _server(
    model: Any, chat: ChatTokenizer, sampling: SamplingParams, url: str | None, shape: LoraShape | None,
    **options: Any,
) -> SamplerServer:  # fmt: skip
    """The server of a model: the one at `url`, or one that this process starts at the first rollout."""
    if model not in _servers:
        if url is not None:
            _servers[model] = connect(url)
        else:
            token = secrets.token_urlsafe(32)
            adapter: dict[str, Any] = {} if shape is None else {"lora_rank": shape.rank, "lora_modules": shape.modules}
            server = SamplerServer("", token, _launcher(model, chat, sampling, token, **options, **adapter))
            weakref.finalize(model, server.end)
            _servers[model] = server
    return _servers[model]


def connect(url: str) -> SamplerServer:
    """A server that was started before.

    Raises:
        UserError: No token in the environment, or no answer.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise UserError(f"rollout.sampler: {TOKEN} is not set", remedy="Export what `rlhf serve-sampler` printed.")
    return SamplerServer(url, token)


def _launcher(
    model: Any, chat: ChatTokenizer, sampling: SamplingParams, token: str, *, python: str | None, devices: str | None,
    **options: Any,
) -> Launch:  # fmt: skip
    """A function that starts a server in a process of its own, which ends with this process."""
    exchange = ExchangeFolder()  # is removed with the function
    words = options | {
        "model": str(description(model, chat)), "sequences": sampling.batch_size, "dtype": dtype_of(model),
    }  # fmt: skip
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = child_environment(**{TOKEN: token, "PYTHONPATH": path})
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices

    def launch() -> tuple[str, subprocess.Popen[str]]:
        settings = json.dumps(words | {"folder": str(exchange.path)})
        child = subprocess.Popen(
            [python or sys.executable, "-m", "rlhf.rollout.vllm_server", settings],
            stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        port = child.stdout.readline().strip()
        if not port:
            raise UserError(
                f"rollout.sampler: the server did not start: its process {_how(child)}",
                "Its own message is above.",
            )
        return f"http://127.0.0.1:{port}", child

    return launch


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
