"""The reference's log-probs of all answers: computed once before training, kept in the run folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import pyarrow as pa
import torch

from rlhf import distributed
from rlhf.core.console import is_main, say
from rlhf.core.files import partial_path, sync
from rlhf.dpo.batches import PreferenceBatch, preference_batch
from rlhf.models.forward import head_chunks
from rlhf.reward.collator import RankingCollator
from rlhf.reward.scoring import shared_scores
from rlhf.training.engine import Engine

KEY = b"rlhf.reference"
"""Name of the fingerprint in the file's metadata."""


def score_answers(
    engine: Engine, collator: RankingCollator, table: Any, at_once: int, vocab_size: int, reference: bool = False
) -> list[list[float]]:
    """Log-probs of the answers of each ranking in a table. Every rank calls it.

    Rankings of similar length are computed together, without gradients, distributed over the ranks.

    Args:
        engine: Over a `PreferencePolicy` in evaluation mode.
        at_once: Rankings in a forward pass of one process.
        reference: Under the reference, before any weight is trained.
    """
    lengths, first = table["length"][:], [0, *itertools.accumulate(map(len, table["ranks"][:]))]
    order = sorted(range(len(table)), key=lambda row: -lengths[row])

    def score(rows: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        batch = preference_batch([table[row] for row in rows or order[:1]], collator)
        logprobs = engine.forward(batch, chunks_of(engine, batch, vocab_size), reference=reference)
        return [n for row in rows for n in range(first[row], first[row + 1])], logprobs

    batches = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    values = shared_scores(batches, score, "reference log-probs" if reference else "")
    return [values[start:end] for start, end in itertools.pairwise(first)]


def chunks_of(engine: Engine, batch: PreferenceBatch, vocab_size: int) -> int:
    """The chunks in which the head processes a batch; every rank calls it."""
    return head_chunks(engine.largest(torch.tensor(sum(batch.tokens), device=distributed.device())), vocab_size)


def with_reference(file: Path, table: Any, facts: dict[str, Any], compute: Callable[[Any], list[list[float]]]) -> Any:
    """The table with a column `reference`: each answer's log-prob under the reference in nats. Every rank calls it.

    The log-probs are cached in `file`, so a resumed run uses the same ones. If the model, tokens or precision differ,
    they are recomputed.

    Args:
        file: An Arrow file, read if it is there.
        table: Rows of rankings.
        facts: What the numbers depend on, besides the tokens of the rows.
        compute: Table -> the log-probs, such as `score_answers`. Every rank calls it.
    """
    key = _fingerprint(table, facts) if is_main() else b""
    if not distributed.from_main(is_main() and _key_of(file) == key):
        rows = compute(table)
        if is_main():
            _write(file, rows, key)
    else:
        say(f"Reference: log-probs of {len(table):,} rankings read from {file}")
    distributed.barrier()
    return hf_datasets.concatenate_datasets([table, hf_datasets.Dataset.from_file(str(file))], axis=1)


def _fingerprint(table: Any, facts: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for row in table.select_columns(["prompt", "candidates"]):
        digest.update(json.dumps([row["prompt"], row["candidates"]]).encode())
    return digest.hexdigest().encode()


def _key_of(file: Path) -> bytes | None:
    """The fingerprint in a file; None if there is none, or the file is damaged."""
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            reader.read_all().validate(full=True)
            return (reader.schema.metadata or {}).get(KEY)
    except (OSError, pa.ArrowInvalid):
        return None


def _write(file: Path, rows: list[list[float]], key: bytes) -> None:
    partial = partial_path(file)
    schema = pa.schema([("reference", pa.list_(pa.float64()))], metadata={KEY: key})
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_pydict({"reference": rows}, schema))
    sync(partial)
    os.replace(partial, file)
