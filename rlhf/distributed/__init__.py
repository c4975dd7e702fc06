"""Several processes: the process group and its collectives, launching, DeepSpeed files."""

from rlhf.distributed.process_group import (
    all_gather_rows,
    all_max,
    all_sum,
    any_rank,
    barrier,
    device,
    from_main,
    grouped,
    name_lost_ranks,
    rank,
    start,
    stop,
    world_size,
)

__all__ = [
    "all_gather_rows", "all_max", "all_sum", "any_rank", "barrier", "device", "from_main", "grouped", "name_lost_ranks",
    "rank", "start", "stop", "world_size",
]  # fmt: skip
