"""Texts for the metrics that are slow: of all records of a small dataset, of a seeded sample of a large one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_tools.statistics.columns import Columns, column, hex_numbers, row_groups
from data_tools.statistics.intervals import SEED
from rlhf.data.schema import SPLITS
from rlhf.data.store import Dataset

MOST_RECORDS = 20_000
MOST_PROMPTS = 20_000
CUT = 8_000
"""Maximum characters of a text; a longer one is cut to half from its beginning and half from its end."""


@dataclass(frozen=True)
class Texts:
    """The texts of some records."""

    columns: Columns
    """All records."""
    records: np.ndarray
    """Indices of the sampled records, ascending, drawn uniformly."""
    prompts: np.ndarray
    """Indices of records with the sampled prompts, one per prompt, ascending; see `sampled_prompts`."""
    prompt: dict[int, str]
    """Record -> its turns, joined by blank lines."""
    answers: dict[int, list[str]]
    """Record -> its answers."""
    all_records: bool
    """All records are in the sample."""
    all_prompts: bool


def sampled(total: int, most: int, seed: int = SEED) -> np.ndarray:
    """Up to `most` of the numbers below `total`, drawn without replacement, ascending."""
    if total <= most:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False))


def sampled_prompts(columns: Columns) -> tuple[np.ndarray, bool]:
    """One record for each of up to `MOST_PROMPTS` distinct prompts, ascending, and whether these are all prompts.

    Evaluation prompts are few, but leaks can only be found with them: up to half of the sample is outside `train`.
    """
    _, first = np.unique(columns.prompt, return_index=True)
    if len(first) <= MOST_PROMPTS:
        return np.sort(first), True
    generator = np.random.default_rng(SEED)
    first = generator.permutation(first)
    held_out = columns.split[first] > SPLITS.index("train")
    chosen = first[held_out][: MOST_PROMPTS // 2]
    rest = np.concatenate([first[~held_out], first[held_out][len(chosen) :]])
    return np.sort(np.concatenate([chosen, rest[: MOST_PROMPTS - len(chosen)]])), False


def texts_of(shards: Dataset, columns: Columns, near: bool, also: Iterable[int] = ()) -> Texts:
    """Read the texts of the samples and of the records in `also`, in one pass.

    Args:
        near: Also sample prompts, for the near-duplicate search.
    """
    records = sampled(len(columns), MOST_RECORDS)
    prompts, whole = sampled_prompts(columns) if near else (np.zeros(0, np.int64), False)
    wanted = np.unique(np.concatenate([records, prompts, np.fromiter(also, np.int64)]))
    prompt: dict[int, str] = {}
    answers: dict[int, list[str]] = {}
    begin = 0
    for group in row_groups(shards):
        end = begin + len(group)
        here = wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, end)]
        if len(here):
            table = group.read(["messages", "candidates", "answer"])
            rows = table.take(pa.array(here - begin)).combine_chunks()
            for number, row in zip(here.tolist(), rows.to_pylist()):
                prompt[number] = _prompt(row)
                answers[number] = _answers(row)
        begin = end
    return Texts(columns, records, prompts, prompt, answers, len(records) == len(columns), whole)


def prompt_texts(shards: Dataset) -> tuple[np.ndarray, dict[str, str]]:
    """All prompt ids of a dataset as uint64, and id -> text of the first `MOST_PROMPTS` distinct prompts."""
    ids, texts = [np.zeros(0, np.uint64)], {}
    for group in row_groups(shards):
        table = group.read(["prompt_id", "messages"] if len(texts) < MOST_PROMPTS else ["prompt_id"])
        ids.append(hex_numbers(column(table, "prompt_id")))
        if len(texts) < MOST_PROMPTS:
            for row in table.to_pylist():
                if len(texts) < MOST_PROMPTS and row["prompt_id"] not in texts:
                    texts[row["prompt_id"]] = _prompt(row)
    return np.unique(np.concatenate(ids)), texts


def _prompt(row: dict) -> str:
    return _cut("\n\n".join(message["content"] for message in row["messages"]))


def _answers(row: dict) -> list[str]:
    if row.get("candidates") is not None:
        return [_cut(candidate["text"]) for candidate in row["candidates"]]
    return [_cut(row["answer"])] if row.get("answer") is not None else []


def _cut(text: str) -> str:
    return text if len(text) <= CUT else text[: CUT // 2] + "\n" + text[-CUT // 2 :]
