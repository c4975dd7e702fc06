"""Seeds of independent random streams, and random orders that follow from such seeds."""

from __future__ import annotations

from rlhf.core.lazy import np, torch


def stream_seed(*parts: int) -> int:
    """A 63-bit seed from non-negative parts (run seed, purpose, update, episode, ...), mixed by SeedSequence."""
    # `spawn_key` pads the first part, so that (1,) and (1, 0) differ
    sequence = np.random.SeedSequence(parts[0], spawn_key=parts[1:])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def stream_seeds(count: int, *parts: int) -> list[int]:
    """The seeds of the streams (*parts, 0) to (*parts, count - 1)."""
    return [stream_seed(*parts, number) for number in range(count)]


def permutation(count: int, *seed: int) -> list[int]:
    """A random order of 0..count-1, determined by the seed parts."""
    generator = torch.Generator().manual_seed(stream_seed(*seed))
    return torch.randperm(count, generator=generator).tolist()


def endless(count: int, first: int, number: int, *seed: int) -> list[int]:
    """Elements `first`, `first + 1`, ... of repeated passes through 0..count-1, reshuffled for each pass.

    The arguments determine them, so the position in the data needs no saved state.
    """
    passes = range(first // count, (first + number - 1) // count + 1)
    order = [row for turn in passes for row in permutation(count, *seed, turn)]
    start = first - passes.start * count
    return order[start : start + number]
