"""Whether texts that share a row are isolated from each other, tested on the model itself.

Model families differ in what separates two texts: masks, positions, or nothing. The test encodes several texts in one
row, then replaces the tokens of all but the first: the outputs of the first must not change. They must also equal those
of the text in a row of its own, at a length beyond the model's sliding windows if the run has such texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Text = tuple[list[int], list[bool]]
"""Token ids, and a flag at each token whose outputs are needed; the first token has none."""
WINDOWS = (
    "sliding_window", "sliding_window_size", "window_size", "attention_window", "attention_window_size",
    "attention_chunk_size", "local_attention",
)  # fmt: skip
"""Names, in the configs of model families, of the attention window in tokens."""
SHORT = 64
"""Tokens of the test text where no text of a run is longer than a window."""
EDGE = 12
"""Tokens at both ends of the test text whose outputs are compared. Convolutions reach only the first ones."""


def windows(config: Any) -> list[int]:
    """The sliding windows and chunks of a model's attention, in tokens."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in WINDOWS)
    return [size for size in found if isinstance(size, int) and size > 0]


def packing_fault(
    outputs: Callable[[Sequence[Text], bool], Sequence[Tensor]],
    vocab_size: int,
    longest: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> str | None:
    """Why texts cannot be packed into one row, as a verb phrase; None if they can.

    Args:
        outputs: (texts, packed) -> tensors [n] of the flagged tokens, from texts in one row or in a row each.
        vocab_size: Token ids are below it.
        longest: Tokens of the longest text of the run.
        sizes: The model's `windows`. The test text is longer than every window below `longest`.
        dtype: The dtype in which the outputs are computed.
    """
    length = min(longest, max((size + EDGE for size in sizes if size < longest), default=SHORT))
    flags = [place > 0 and (place <= EDGE or place >= length - EDGE) for place in range(length)]
    mine = (_tokens(length, 0, vocab_size), flags)
    neighbours = [[(_tokens(size, seed, vocab_size), [False] * size) for size in (EDGE, 5)] for seed in (1, 2)]
    try:
        with torch.no_grad():
            one, two = (outputs([before, mine, after], True) for before, after in neighbours)
            alone = outputs([mine], False)
    except Exception as error:  # families raise different errors for lengths in place of a mask
        return f"cannot be computed: {str(error).strip().split(chr(10))[0] or type(error).__name__}"
    if not all(unmoved(a, b, dtype) for a, b in zip(one, two)):
        return "attend to each other"
    if not all(agree(a, b, dtype) for a, b in zip(one, alone)):
        return f"get other outputs than in a row of their own (tested with {length} tokens)"
    return None


def _tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    return [(place * 37 + seed * 17 + 11) % vocab_size for place in range(count)]


def unmoved(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs are the same after tokens of other texts changed, up to rounding of kernels for other shapes."""
    return _close(before, after, 1e-6 if dtype == torch.float32 else 1e-3)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs are the same up to rounding, which depends on the number of rows and the kernel."""
    return _close(found, expected, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def _close(one: Tensor, other: Tensor, relative: float) -> bool:
    return torch.allclose(one, other, rtol=0, atol=relative * float(other.abs().max()))
