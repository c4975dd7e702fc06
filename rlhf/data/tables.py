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

ENCODERS: dict[str, tuple[Callable[..., dict[str, Any] | None], dict[str, str]]] = {
    "demonstration": (encode_demonstration, {"input_ids": "ids", "labels": "ids", "length": "int"}),
    "step-by-step": (
        encode_step_by_step,
        dict.fromkeys(("input_ids", "labels", "rationale_ids", "rationale_labels"), "ids") | {"length": "int"},
    ),
    "ranking": (
        encode_ranking,
        {"prompt": "ids", "candidates": "id lists", "ranks": "ids", "ratings": "numbers", "characters": "ids"}
        | {"source": "text", "annotator": "text", "group": "text", "weight": "number", "length": "int"},
    ),
    "prompt": (encode_prompt, {"id": "text", "prompt": "ids", "messages": "text"}),
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
        write = partial(_write_table, folder, kind=kind, encode=encode)
        records = "demonstrations" if kind == "step-by-step" else f"{kind}s"
        seen = write(files["train"], train_records(train), what=records)
        unseen = write(files["eval"], evals, what=f"held-out {records}")
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
    folder: Path, path: Path, records: Iterable[Any], *, kind: str, encode: Callable[..., dict[str, Any] | None],
    what: str,
) -> set[str]:  # fmt: skip
    """Encode records into an Arrow stream file; return the ids of their prompts."""
    schema, counts = _arrow_schema(ENCODERS[kind][1]), EncodingCounts()
    prompts: set[str] = set()
    rows: list[dict[str, Any]] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for record in track(records, f"tokenising {what}"):
            prompt = record.prompt_id
            row = None if kind == "prompt" and prompt in prompts else encode(record, counts=counts)
            if row is None:
                continue
            prompts.add(prompt)
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


def _arrow_schema(columns: dict[str, str]) -> pa.Schema:
    ids = pa.list_(pa.int32())
    types = {"ids": ids, "id lists": pa.list_(ids), "numbers": pa.list_(pa.float64())}
    types |= {"text": pa.string(), "int": pa.int32(), "number": pa.float64()}
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])
