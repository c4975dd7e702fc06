"""Token batches of demonstrations, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import pack_dataset

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.attention import VARLEN
from rlhf.models.forward import causal_lm, has_virtual_tokens, is_encoder_decoder
from rlhf.models.isolation import Text, packing_fault, windows
from rlhf.training.engine import Engine


def pack(table: Any, limit: int, model: Any) -> Any:
    """Rows of up to `limit` tokens with several demonstrations each, by best-fit decreasing (TRL's `bfd`).

    Raises:
        UserError: The demonstrations of a row would attend to each other, or share virtual tokens.
    """
    if is_encoder_decoder(model):
        raise UserError(
            "batch.packing: does not work with encoder-decoders",
            "The prompts of a row would attend to each other in the encoder.",
            "Set batch.packing=false.",
        )
    if has_virtual_tokens(model):
        raise UserError(
            "batch.packing: does not work with virtual tokens",
            "Only the first demonstration of a row would see them.",
            "Set batch.packing=false, or use another row of `tuning`.",
        )
    attention = model.config._attn_implementation
    if attention not in VARLEN:
        raise UserError(
            f"batch.packing: the attention implementation is {attention!r}",
            "With it, demonstrations that share a row would attend to each other.",
            "Set model.attn_implementation=flash_attention_2 (needs a GPU and flash-attn), or batch.packing=false.",
        )
    return pack_dataset(table.select_columns(["input_ids", "labels"]), limit, "bfd")


def check_packing(engine: Engine, model: Any, chat: ChatTokenizer, longest: int) -> None:
    """Test on the model that packed demonstrations of up to `longest` tokens are isolated. Every rank calls it.

    Raises:
        UserError: They are not; see `rlhf.models.isolation`.
    """

    def outputs(texts: Sequence[Text], packed: bool) -> list[Tensor]:
        labels = [[token if flag else -100 for token, flag in zip(ids, flags)] for ids, flags in texts]
        rows = [{"input_ids": ids, "labels": wanted} for (ids, _), wanted in zip(texts, labels)]
        return [engine.forward(token_batch(rows, chat, packed), 1).logprobs]

    vocab_size = model.config.get_text_config().vocab_size
    fault = packing_fault(outputs, vocab_size, longest, windows(model.config), engine.dtype)
    if fault is not None:
        raise UserError(
            f"batch.packing: packed demonstrations of {type(causal_lm(model)).__name__} {fault}",
            remedy="Set batch.packing=false.",
        )


@dataclass(frozen=True)
class TokenBatch:
    """Demonstrations as token rows, padded on the right, or packed one after the other into a single row."""

    input_ids: Tensor
    """int64 [B, T]; packed [1, T]."""
    attention_mask: Tensor | None
    """int64 [B, T], 1 where there is a token; None where packed."""
    position_ids: Tensor | None
    """int64 [1, T], from 0 in each packed demonstration; None where padded."""
    labelled: Tensor
    """bool [B, T], True at the assistant's tokens, which the loss is summed over; never at the first of a sequence."""


@dataclass(frozen=True)
class StepByStepBatch(TokenBatch):
    """The two tasks of demonstrations: the labels of all, then the rationales of those that have one. Never packed."""

    weights: Tensor
    """float32 [n], for each labelled token: the weight of its task, divided by the labelled tokens of its row."""
    is_label: Tensor
    """bool [n], for each labelled token whether it is of the label task."""
    demonstrations: int


def step_by_step_batch(rows: list[dict[str, Any]], chat: ChatTokenizer, rationale_weight: float) -> StepByStepBatch:
    """Rows of `encode_step_by_step` as a batch on this device."""
    tasks = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    tasks += [
        {"input_ids": row["rationale_ids"], "labels": row["rationale_labels"]} for row in rows if row["rationale_ids"]
    ]
    batch = token_batch(tasks, chat, packing=False)
    label = torch.arange(len(tasks), device=batch.labelled.device) < len(rows)
    each = torch.where(label, 1.0, rationale_weight) / batch.labelled.sum(-1).clamp_min(1)
    weights, is_label = (part[:, None].expand_as(batch.labelled)[batch.labelled] for part in (each, label))
    return StepByStepBatch(**vars(batch), weights=weights, is_label=is_label, demonstrations=len(rows))


@dataclass(frozen=True)
class DistillationBatch(TokenBatch):
    """Demonstrations, some of them with an answer that the student sampled. Never packed."""

    sampled: Tensor
    """bool [B]."""

    @property
    def demonstrated(self) -> Tensor:
        """bool [n], for each labelled token whether it is a demonstration's."""
        return ~self.sampled[:, None].expand_as(self.labelled)[self.labelled]


def token_batch(rows: list[dict[str, Any]], chat: ChatTokenizer, packing: bool) -> TokenBatch:
    """Rows with `input_ids` and `labels` (and `seq_lengths` where rows were packed) as a batch on this device."""
    device = distributed.device()
    if not packing:
        ids, mask = chat.pad([row["input_ids"] for row in rows], device)
        labels, _ = chat.pad([row["labels"] for row in rows], device)
        labelled = (labels != -100) & mask.bool()
        labelled[:, 0] = False
        return TokenBatch(ids, mask, None, labelled)
    lengths = [length for row in rows for length in row.get("seq_lengths", [len(row["input_ids"])])]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    ids, labels = (
        torch.tensor([[token for row in rows for token in row[name]]], device=device)
        for name in ("input_ids", "labels")
    )
    return TokenBatch(ids, None, positions, (labels != -100) & (positions > 0))
