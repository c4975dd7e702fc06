"""A frozen local teacher, whose next-token distributions a student learns from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.models.forward import causal_lm, head_logits, predicting_states
from rlhf.models.load import load_hf_config, load_policy, sequence_limit
from rlhf.models.vocabulary import token_count
from rlhf.runs.parents import resolve_model_path
from rlhf.sft.batches import TokenBatch
from rlhf.training.engine import Engine
from rlhf.training.placing import place


def check_teacher(path: str, config: ModelConfig, chat: ChatTokenizer) -> int:
    """The teacher's longest sequence, in tokens. Loads no weights.

    Args:
        path: The teacher, a run, model folder or hub name.
        config: The student's.
        chat: The student's tokenizer.

    Raises:
        UserError: The teacher's tokens are not the student's.
    """
    folder, teacher = resolve_model_path(path), _model_config(path, config)
    theirs = load_tokenizer(teacher, folder)
    mine, other = chat.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()
    if mine != other:
        different = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
        first = different[0]
        raise UserError(
            f"distillation.logits.teacher: {path} has another vocabulary than {config.path}: {len(other):,} tokens "
            f"against {len(mine):,}; {len(different):,} differ, among them {first!r}, which has the id "
            f"{other.get(first)} there and {mine.get(first)} here",
            "Distributions over different tokens cannot be compared.",
            "Choose a teacher of the student's family; or let it write answers, which any student can learn from: "
            "rlhf data distill.",
        )
    if theirs.fingerprints() != chat.fingerprints():
        warn(
            f"distillation.logits.teacher: {path} has another chat template than {config.path}; it gets the student's,"
            " which it may not have been trained on"
        )
    return sequence_limit(teacher, load_hf_config(teacher, folder))


def _model_config(path: str, student: ModelConfig) -> ModelConfig:
    return ModelConfig(
        path=path, trust_remote_code=student.trust_remote_code, attn_implementation=student.attn_implementation
    )


class FrozenTeacher:
    """A frozen teacher on this process's device, whole on each process.

    Args:
        path: A run, model folder or hub name.
        config: The student's.
        chat: The student's tokenizer, which is the teacher's as well; see `check_teacher`.
        engine: The student's engine, which decides the precision.
    """

    def __init__(self, path: str, config: ModelConfig, chat: ChatTokenizer, engine: Engine) -> None:
        tokens, as_stored = token_count(chat.tokenizer), distributed.grouped()
        model = load_policy(_model_config(path, config), resolve_model_path(path), tokens=tokens, as_stored=as_stored)
        states = _States(model)
        if engine.stage < 3:
            self._states: Any = engine.freeze(states)
        else:  # frozen as under ZeRO-2: the chunks of its head are called outside of a forward pass of DeepSpeed's
            self._states = place(states.requires_grad_(False).eval(), engine.dtype)
        self._lm = causal_lm(model)

    @torch.no_grad()
    def states(self, batch: TokenBatch) -> Tensor:
        """Hidden states [n, H] that predict the labelled tokens, row by row."""
        return self._states(batch)

    def logits(self, states: Tensor) -> Tensor:
        """float32 logits [n, V] from hidden states."""
        return head_logits(self._lm, states)


class _States(nn.Module):
    """The teacher as the engine freezes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        return predicting_states(self.model, batch.input_ids, batch.attention_mask, batch.labelled)[0]
