"""Config of the specialist stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlhf.config.base import ModelConfig, Paths, Strict, SupervisedConfig
from rlhf.core.table import Pick
from rlhf.specialist.heads import HEADS
from rlhf.tuning.methods import TUNING, Tuning


class LabelledData(Strict):
    train: Paths
    """Files of labelled rows (JSON lines, JSON, CSV, TSV, Parquet, Arrow; compressed or not), folders of them, or glob
    patterns. The options of `task` name their columns."""
    eval: Paths = []
    """Held-out files. The default is the rows of `train` whose column `split` says eval (or dev, validation)."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Without held-out files or a column `split`: the fraction of the rows to hold out. Which ones depends on their
    text and `seed` alone, so equal texts are on the same side."""


class SpecialistConfig(SupervisedConfig):
    task: Annotated[Pick, HEADS]
    """What is learned: `text`, `pair`, `tags` or `span`, with the columns of the rows as options."""
    data: LabelledData
    """The labelled rows."""
    tuning: Tuning = TUNING.pick("full")
    """Which weights to train besides the head: a row of the tuning table (`full`, `last-layers`, `lora`, ...)."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if not self.tuning.row.traits["merges"]:
            yield (
                f"tuning: {self.tuning.name!r} cannot be merged into the weights, and the result is a whole model that "
                "transformers loads; use full, last-layers, modules or lora"
            )
        if self.data.hold_out and self.data.eval:
            yield "data.hold_out: leave it out where data.eval names held-out files"
        for name in ("chat_template", "control_tokens_in_text", "resize_embeddings"):
            if getattr(self.model, name) != ModelConfig.model_fields[name].default:
                yield f"model.{name}: a specialist reads plain text, without a chat template; leave it out"
