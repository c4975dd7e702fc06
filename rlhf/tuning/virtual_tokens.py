"""How the virtual tokens of prompt tuning start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def first_virtual_tokens(
    words: Tensor, chat: Any, tokens: int, init: str, text: str | None, labels: Sequence[str] | None
) -> Tensor:
    """Initial virtual tokens [tokens, H] from the word embeddings [V, H]."""
    if init == "random":
        return words.mean(0) + words.std(0) * torch.randn(tokens, words.shape[1], dtype=words.dtype)
    encode = lambda piece: chat.tokenizer.encode(piece, add_special_tokens=False)  # noqa: E731
    if text is not None:
        ids = encode(text)
        if not ids:
            raise UserError("tuning.text: the text has no tokens")
        return words[torch.tensor(ids * (tokens // len(ids) + 1))[:tokens]]
    special = set(chat.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(chat.tokenizer)) if i not in special])
    rows = words[ordinary[torch.randperm(len(ordinary)).repeat(tokens // len(ordinary) + 1)[:tokens]]]
    for index, label in enumerate((labels or [])[:tokens]):
        rows[index] = words[torch.tensor(encode(label))].mean(0)
    return rows
