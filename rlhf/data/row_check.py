"""Finds the records that a model's chat template refuses, without weights and before a training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.base import ModelConfig
from rlhf.core.console import track
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.encode_records import EncodingCounts, first_refused


@dataclass
class RowCheck:
    """What a chat template does with records. The template is tried once for each order of turns."""

    chat: ChatTokenizer
    records: int = 0
    counts: EncodingCounts = field(default_factory=EncodingCounts)
    spelled: int = 0
    """Records with text that spells a control token and is encoded as text."""
    _orders: dict[tuple[str, ...], RefusedText | None] = field(default_factory=dict)

    def add(self, records: Iterable[Any], what: str) -> None:
        """Check records of any kind, with a progress bar."""
        for record in track(records, f"checking {what}"):
            self.records += 1
            try:
                self._check(record)
            except RefusedText as error:
                self.counts.refuse(record, error)

    def _check(self, record: Any) -> None:
        texts = [*(message.content for message in record.messages), *record.answers]
        self.spelled += any(self.chat.renderer.marked(text) != text for text in texts)
        order = tuple(message.role for message in record.messages)
        if order not in self._orders:
            try:
                self.chat.renderer.render(record.messages, True)
                self._orders[order] = None
            except RefusedText as error:
                self._orders[order] = error
        if (fault := self._orders[order]) is not None:
            raise fault

    def describe(self) -> str:
        """The result in one line."""
        refused = self.counts.refused
        parts = [f"accepts {self.records - len(refused):,} of {self.records:,} records"]
        if refused:
            parts.append(f"{len(refused):,} would be rejected, {first_refused(refused)}")
        if self.spelled:
            parts.append(f"{self.spelled:,} spell a control token, which is encoded as text")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The counts, and each refused record."""
        return {"records": self.records, "spelled": self.spelled, "refused": self.counts.refused}


def row_check(model: str, **options: Any) -> RowCheck:
    """A check with the tokenizer of a run, a model folder or a hub name.

    Args:
        model: The run, folder or name.
        options: More fields of `ModelConfig`: chat_template, control_tokens_in_text, trust_remote_code.

    Raises:
        UserError: See `load_tokenizer`.
    """
    inner = Path(model) / "model"
    folder = inner if (inner / "tokenizer_config.json").is_file() else model
    return RowCheck(load_tokenizer(ModelConfig(path=model, **options), str(folder)))
