"""The process group: ranks, collectives, start and stop, and naming the rank that is lost.

Ranks are started by torchrun, the deepspeed launcher or accelerate, which all set RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

from rlhf.core.errors import UserError
from rlhf.core.lazy import dist, torch


def rank() -> int:
    """The rank of this process; 0 if there is one process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def grouped() -> bool:
    """Whether this process is in a process group, alone or with others; engines are then DeepSpeed's."""
    return dist.is_initialized()


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start(timeout_seconds: int, deepspeed_alone: bool = False) -> None:
    """Set up this process and join the process group, through DeepSpeed: gloo on CPU, nccl on GPU.

    Args:
        timeout_seconds: How long a collective operation waits for a rank.
        deepspeed_alone: Form a group of one process too, which DeepSpeed needs.

    Raises:
        UserError: The group has a different size than the launcher announced.
    """
    # Small attention probabilities become denormal (below 1e-38), which CPUs multiply a hundred times more slowly. Set
    # before torch starts its threads, which inherit it.
    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if dist.is_initialized() or (world_size() == 1 and not deepspeed_alone):
        return
    if "MASTER_ADDR" not in os.environ:  # one process, started without a launcher
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))} | one
    import deepspeed
    import deepspeed.ops

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        # else DeepSpeed spends a minute compiling an operator that nothing here uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_seconds), verbose=False)
    if dist.get_world_size() != world_size():
        raise UserError(f"the process group has {dist.get_world_size()} ranks, the launcher announced {world_size()}")
    _Heartbeat.begin(timeout_seconds)


def free_port(address: str = "") -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def stop() -> None:
    """Leave the process group, and let this process (a notebook, perhaps) calculate with denormal numbers again."""
    _Heartbeat.end()
    torch.set_flush_denormal(False)
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """The `value` of rank 0 on every rank. One collective."""
    return _from_rank_zero(value) if world_size() > 1 else value


def _from_rank_zero(value: Any) -> Any:
    found = [value]
    dist.broadcast_object_list(found, src=0, device=device() if torch.cuda.is_available() else None)
    return found[0]


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank. One collective."""
    return bool(all_max(torch.tensor(float(flag), device=device())).item()) if world_size() > 1 else flag


def all_max(value: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of `value` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate [n_r, ...] tensors of all ranks in rank order; the n_r may differ. Two collectives.

    Returns:
        [sum n_r, ...] on the same device, the same on every rank.
    """
    if world_size() == 1:
        return rows
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    sizes[rank()] = rows.shape[0]
    counts = all_sum(sizes).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


class _Heartbeat:
    """Every rank increments a counter in a shared store each second, so that the others can see which rank is lost."""

    interval = 1.0
    patience = 5.0
    """How long rank 0 may take to answer, in seconds, before it counts as lost."""
    _thread: threading.Thread | None = None
    _stopped = threading.Event()
    _store: Any = None

    @classmethod
    def begin(cls, timeout_seconds: int) -> None:
        host = os.environ["MASTER_ADDR"]
        wait = timedelta(seconds=min(timeout_seconds, 30))
        if rank() == 0:  # a separate store, because the group's is blocked while a collective waits
            cls._store = dist.TCPStore(host, 0, world_size(), is_master=True, timeout=wait, wait_for_workers=False)
        port = _from_rank_zero(cls._store.port if rank() == 0 else None)
        if rank() != 0:
            cls._store = dist.TCPStore(host, port, world_size(), is_master=False, timeout=wait)
        cls._store.set(f"host/{rank()}", socket.gethostname())
        cls._stopped.clear()
        cls._beat()
        cls._thread = threading.Thread(target=cls._run, daemon=True, name="heartbeat")
        cls._thread.start()

    @classmethod
    def _beat(cls) -> None:
        cls._store.add(f"beat/{rank()}", 1)

    @classmethod
    def _run(cls) -> None:
        while not cls._stopped.wait(cls.interval):
            try:
                cls._beat()
            except RuntimeError:
                return  # rank 0 is lost; the next collective of the main thread raises an error

    @classmethod
    def end(cls) -> None:
        cls._stopped.set()
        if cls._thread is not None:
            cls._thread.join(timeout=5)
        cls._thread = None

    @classmethod
    def silent_ranks(cls) -> str:
        """The ranks whose counters have stopped, in words."""
        if cls._store is None:
            return "an unknown rank"
        found: list[str] = []
        # Rank 0 serves the store. If it is stopped or its host is gone, a request never returns, whatever the store's
        # timeout is; so a thread asks.
        asking = threading.Thread(target=lambda: found.append(cls._compare_counters()), daemon=True)
        asking.start()
        asking.join(timeout=6 * cls.interval + cls.patience)
        return found[0] if found else cls._rank_zero()

    @classmethod
    def _compare_counters(cls) -> str:
        try:
            before = [cls._store.add(f"beat/{r}", 0) for r in range(world_size())]
            time.sleep(3 * cls.interval)
            after = [cls._store.add(f"beat/{r}", 0) for r in range(world_size())]
            lost = [r for r in range(world_size()) if r != rank() and after[r] == before[r]]
            names = [f"rank {r} (host {cls._store.get(f'host/{r}').decode()})" for r in lost]
        except RuntimeError:
            return cls._rank_zero()
        return " and ".join(names) or "another rank, which is still alive but stuck or far behind"

    @staticmethod
    def _rank_zero() -> str:
        return f"rank 0 (host {os.environ['MASTER_ADDR']})"


def name_lost_ranks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a stage: if a collective fails because a rank is lost, raise an error that names the rank."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            signs = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "socket")
            if world_size() > 1 and any(sign in str(error).lower() for sign in signs):
                raise UserError(
                    f"rank {rank()} lost contact with {_Heartbeat.silent_ranks()}",
                    f"A collective operation failed: {str(error).splitlines()[0][:200]}",
                    "Look at the output of that rank first. Then continue from the last checkpoint with --resume.",
                ) from error
            raise

    return guarded
