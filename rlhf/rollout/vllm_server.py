"""The server of the sampler `vllm-server`: a vLLM engine behind HTTP, for one trainer.

    python -m rlhf.rollout.vllm_server '{"model": FOLDER, ...}'     what a run starts by itself
    rlhf serve-sampler MODEL                                        what a user starts

A rollout is one request with all prompts, so that vLLM batches them the same way each time: this makes runs repeat
exactly, which vLLM's own server with a request for each prompt cannot. Every request but `/health` needs the token.

    GET  /health                      what the server runs
    POST /weights/VERSION/PART        a safetensors file: a part of the weights, or an adapter
    POST /sample                      {"weights", "adapter", "prompts", "seeds", "sampling", "ends", "tokens"}
                                      -> completions; weights and adapter are versions
"""

from __future__ import annotations

import hmac
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError
from rlhf.distributed.exchange_folder import ExchangeFolder
from rlhf.distributed.launch import end_with_parent
from rlhf.rollout import vllm_engine
from rlhf.rollout.types import SamplingParams

TOKEN = "RLHF_SAMPLER_TOKEN"
"""Environment variable with the token that server and run share."""
BLOCK = 1 << 20
MOST_JSON = 1 << 30
"""Most bytes of a request to sample."""


class Sampler:
    """The engine, the folder of what was sent, and the version of the weights that the engine has.

    What was sent for a rollout is kept until its completions are done, so that another engine can use it if this one
    dies. The base of adapters is deleted at once.
    """

    def __init__(self, llm: Any, folder: Path) -> None:
        self.llm, self.folder, self.version = llm, folder, ""
        self.lock = threading.Lock()
        """vLLM's engine is used by one thread at a time."""

    def sample(self, asked: dict[str, Any]) -> list[list[Any]]:
        """Completions with the weights, and the adapter, of the versions asked for: rows (ids, ended, log-probs)."""
        options = asked["sampling"]
        sampling = SamplingParams(**options | {"stop": tuple(options["stop"])})
        with self.lock:
            weights, adapter = self._sent(asked["weights"]), None
            self._load(weights)
            if asked["adapter"]:
                shutil.rmtree(weights, ignore_errors=True)
                weights = adapter = self._sent(asked["adapter"])
                if not (adapter / vllm_engine.ADAPTER).exists():
                    (adapter / "000000.safetensors").rename(adapter / vllm_engine.ADAPTER)
            found = vllm_engine.generate(
                self.llm, asked["prompts"], asked["seeds"], sampling, asked["ends"], asked["tokens"], adapter
            )
            shutil.rmtree(weights, ignore_errors=True)
        return [list(asdict(one).values()) for one in found]

    def _sent(self, version: str) -> Path:
        if not re.fullmatch(r"\w{1,80}", version):
            raise ValueError(f"{version!r} is not a version")
        return self.folder / version

    def _load(self, weights: Path) -> None:
        """Give the engine the weights of a folder, unless it has them."""
        if weights.name == self.version:
            return
        if not weights.is_dir():
            raise ValueError(f"no weights of version {weights.name} were sent; the engine has {self.version or 'none'}")
        self.version = ""  # if loading fails, the engine has a mixture
        self.llm.collective_rpc("replace_weights", kwargs={"folder": str(weights)})
        self.version = weights.name


class SamplerHandler(BaseHTTPRequestHandler):
    """HTTP for a Sampler."""

    protocol_version = "HTTP/1.1"
    sampler: Sampler
    token: str
    facts: dict[str, Any]

    def log_message(self, *_: Any) -> None:
        """No line for each request."""

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._reply(200, {**self.facts, "version": self.sampler.version})
        self._reply(404, {"error": "unknown address"})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            self.close_connection = True  # the body is not read
            return self._reply(401, {"error": f"wrong or missing token; it is in {TOKEN} where the server was started"})
        weights = re.fullmatch(r"/weights/(\w{1,80})/(\d{1,6})", self.path)
        try:
            if weights:
                self._receive(self.sampler.folder / weights[1], int(weights[2]), size)
                return self._reply(200, {})
            if self.path == "/sample" and size <= MOST_JSON:
                return self._reply(200, {"completions": self.sampler.sample(json.loads(self.rfile.read(size)))})
            self.close_connection = True
            self._reply(404, {"error": "unknown address, or too large a request"})
        except Exception as error:  # the trainer reports it
            if vllm_engine.lost_a_process(self.sampler.llm):  # the server ends; its run may start another
                self.close_connection = True
                return
            self._reply(500, {"error": f"{type(error).__name__}: {error}"})

    def _receive(self, folder: Path, part: int, size: int) -> None:
        folder.mkdir(exist_ok=True)
        partial = folder / f"{part:06}.partial"
        with partial.open("wb") as file:
            while size:
                block = self.rfile.read(min(size, BLOCK))
                if not block:
                    raise ConnectionError("the weights were cut off")
                file.write(block)
                size -= len(block)
        partial.rename(partial.with_suffix(".safetensors"))

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(
    settings: dict[str, Any], host: str, port: int, tensor_parallel: int, token: str, ready: Callable[[int], None],
    folder: str | None = None,
) -> None:  # fmt: skip
    """Start the engine and answer requests until the process ends.

    Args:
        settings: For `vllm_engine.engine_options`.
        host: Address to listen on.
        port: 0 is any free one.
        tensor_parallel: Processes (GPUs) that hold a part of the model each.
        token: What requests must carry.
        ready: Called with the port once requests are answered.
        folder: For what is sent, where another process owns it.

    Raises:
        UserError: The engine does not start, a process of it died later, or the port is in use.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop in this process: batches repeat exactly
    options = vllm_engine.engine_options(**settings)
    try:
        server = ThreadingHTTPServer((host, port), SamplerHandler)
    except OSError as error:
        raise UserError(f"{host}:{port}: {error.strerror}", remedy="Choose another --port.") from None
    backend = "mp" if tensor_parallel > 1 else "uni"
    llm = vllm_engine.start(**options, tensor_parallel_size=tensor_parallel, distributed_executor_backend=backend)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder below is removed
    own = ExchangeFolder() if folder is None else None
    SamplerHandler.sampler, SamplerHandler.token = (
        Sampler(llm, own.path if own is not None else Path(folder or "")),
        token,
    )
    SamplerHandler.facts = {"model": settings["model"], "dtype": settings["dtype"], "tensor_parallel": tensor_parallel}
    SamplerHandler.facts |= {"lora_rank": vllm_engine.lora_rank(llm)}
    vllm_engine.when_a_process_dies(llm, server.shutdown)
    ready(server.server_address[1])
    server.serve_forever()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run that started it may not want to wait for its end
    raise UserError(
        "The server ends: a process that held a part of the model has died",
        "vLLM named it above. On Linux, `dmesg` says whether the kernel killed it because memory ran out.",
        "Start the server again; a PPO run that had it continues from its last checkpoint with --resume.",
    )


def main(words: dict[str, Any]) -> None:
    """Serve the run that started this process, and name the port on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not be read as the port

    def ready(port: int) -> None:
        print(port, file=answers, flush=True)

    tensor_parallel, folder = words.pop("tensor_parallel"), words.pop("folder")
    try:
        serve(words, "127.0.0.1", 0, tensor_parallel, os.environ.pop(TOKEN), ready, folder)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    end_with_parent()
    main(json.loads(sys.argv[1]))
