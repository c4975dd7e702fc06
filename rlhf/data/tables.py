"""Tokenised training data: written to Arrow files once, memory-mapped by every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.compute as pc

from rlhf import distributed
from rlhf.config.base import DataConfig
from rlhf.core.console import is_main, track
from rlhf.core.errors import UserError
from rlhf.core.files import append_jsonl, write_json
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.encode_records import (
    EncodingCounts,
    encode_demonstration,
    encode_prompt,
    encode_ranking,
    encode_step_by_step,
)
from rlhf.data.selection import eval_records, open_datasets, train_records

IDS, TEXT, INTEGER, NUMBER = pa.list_(pa.int32()), pa.string(), pa.int32(), pa.float64()
ENCODERS: dict[str, tuple[Callable[..., dict[str, Any] | None], dict[str, pa.DataType]]] = {
    "demonstration": (encode_demonstration, {"input_ids": IDS, "labels": IDS, "length": INTEGER}),
    "step-by-step": (
        encode_step_by_step,
        dict.fromkeys(("input_ids", "labels", "rationale_ids", "rationale_labels"), IDS) | {"length": INTEGER},
    ),
    "ranking": (
        encode_ranking,
        {"prompt": IDS, "candidates": pa.list_(IDS), "ranks": IDS, "ratings": pa.list_(NUMBER), "characters": IDS}
        | {"source": TEXT, "annotator": TEXT, "group": TEXT, "weight": NUMBER, "length": INTEGER},
    ),
    "prompt": (encode_prompt, {"id": TEXT, "prompt": IDS, "messages": TEXT}),
}
"""For each kind of row: the function that encodes a record, and the types of the columns."""


@dataclass(frozen=True)
class Tables:
    """The tokenised training and held-out records of a stage, memory-mapped."""

    train: hf_datasets.Dataset
    eval: hf_datasets.Dataset


def tokenize(
    folder: Path,
    chat: ChatTokenizer,
    max_length: int,
    config: DataConfig,
    kind: str,
    accept: Sequence[str] = (),
    name: str = "data",
    others: Sequence[ChatTokenizer] = (),
    options: Mapping[str, Any] | None = None,
) -> Tables:
    """Tokenise the records of a stage into `folder`/cache, as a stream, once for all ranks. Every rank calls it.

    The columns are those of `ENCODERS[kind]`. Rejected rows and counts of skipped ones go to `folder`/rejected.jsonl.
    With the kind `prompt`, each distinct prompt is kept once.

    Args:
        folder: The run folder.
        max_length: Most tokens of a record, or of a prompt with the kind `prompt`.
        kind: demonstration, step-by-step, ranking or prompt.
        accept: The kinds of dataset to read. The default is `kind` only.
        name: The config key in messages, and the prefix of the files.
        others: With the kind `prompt`: more tokenizers whose templates must accept a prompt.
        options: With the kind `step-by-step`: further arguments of `encode_step_by_step`.

    Raises:
        UserError: There is nothing to train on, or a held-out prompt is also in the training data.
    """
    train = open_datasets(config.train, accept or [kind], f"{name}.train")
    held_out = open_datasets(config.eval, accept or [kind], f"{name}.eval")
    files = {part: folder / "cache" / f"{name}-{part}.arrow" for part in ("train", "eval")}
    if is_main():
        files["train"].parent.mkdir(exist_ok=True)
        evals = eval_records(held_out or train, bool(held_out), config.max_eval_records)
        more = {"others": others} if kind == "prompt" else dict(options or {})
        encode = partial(ENCODERS[kind][0], chat=chat, max_length=max_length, **more)
        records = "demonstrations" if kind == "step-by-step" else f"{kind}s"
        seen = _write_table(folder, files["train"], train_records(train), kind, encode, records)
        unseen = _write_table(folder, files["eval"], evals, kind, encode, f"held-out {records}")
        for dataset in (*train, *held_out):
            append_jsonl(folder / "rejected.jsonl", [vars(reject) for reject in dataset.rejects])
        if seen & unseen:
            raise UserError(
                f"{name}: {len(seen & unseen):,} prompts are in both the training and the held-out data",
                "Metrics on them would not show how the model does on new prompts.",
                "Split by prompt: rlhf data split DATASET --by prompt --out ...",
            )
    distributed.barrier()
    tables = Tables(*(hf_datasets.Dataset.from_file(str(file)) for file in files.values()))
    if not len(tables.train):
        raise UserError(
            f"{name}.train: {', '.join(config.train)} has no {kind} to train on",
            f"{folder}/rejected.jsonl lists the rejected and skipped rows.",
            "Check the splits with `rlhf data stats`, and check model.max_length.",
        )
    return tables


def prompt_lengths(table: Any) -> tuple[int, float]:
    """Lengths in tokens of the longest and of the mean prompt in a table."""
    lengths = pc.list_value_length(table.data.column("prompt"))
    return int(pc.max(lengths).as_py()), float(pc.mean(lengths).as_py())


def _write_table(
    folder: Path, path: Path, records: Iterable[Any], kind: str, encode: Callable[..., dict[str, Any] | None], what: str
) -> set[str]:
    """Encode records into an Arrow stream file; return the ids of their prompts."""
    schema, counts = pa.schema(ENCODERS[kind][1]), EncodingCounts()
    prompts: set[str] = set()
    rows: list[dict[str, Any]] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for record in track(records, f"tokenising {what}"):
            row = None if kind == "prompt" and record.prompt_id in prompts else encode(record, counts=counts)
            if row is None:
                continue
            prompts.add(record.prompt_id)
            counts.kept += 1
            rows.append(row)
            if len(rows) == 1000:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
    counts.report(what)
    summary = {"kept": counts.kept, "truncated_prompts": counts.truncated_prompts, "skipped": dict(counts.skipped)}
    write_json(path.with_suffix(".json"), summary)  # for `rlhf doctor`
    skipped = [{"reason": reason, "count": count} for reason, count in counts.skipped.items()]
    append_jsonl(folder / "rejected.jsonl", [*skipped, *counts.refused])
    return prompts
