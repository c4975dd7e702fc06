"""Open the datasets that a stage reads, and select the records that a command works on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.core.errors import UserError, blame
from rlhf.data.schema import BadRecord, Demonstration, Message, Prompt
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.tool_turns import DEFINITIONS


def open_datasets(paths: Sequence[str], kinds: Sequence[str], key: str, verify: bool = False) -> list[Dataset]:
    """Open the datasets of a config key.

    Args:
        verify: Compare every shard with its SHA-256 now, not when it is read.

    Raises:
        UserError: A dataset is damaged, cannot be opened, or is not of one of `kinds`. The message starts with `key`.
    """
    found = []
    for path in paths:
        with blame(key):
            dataset = open_dataset(path, verify=verify)
        if dataset.kind not in kinds:
            raise UserError(f"{key}: {path} contains {dataset.kind}s, but {' or '.join(kinds)}s are needed")
        found.append(dataset)
    return found


def train_records(data: Sequence[Dataset]) -> Iterator[Any]:
    """The training records: those without a split or in the split `train`."""
    return (r for d in data for r in d.records() if r.split in (None, "train"))


def eval_records(data: Sequence[Dataset], named: bool, limit: int | None = None) -> Iterator[Any]:
    """The held-out records: all but the `train` split of evaluation datasets (`named`), else the split `eval`."""
    records = (record for dataset in data for record in dataset.records())
    return islice((r for r in records if (r.split != "train" if named else r.split == "eval")), limit)


def chosen_records(dataset: Dataset, split: str | None, limit: int | None = None) -> Iterator[Any]:
    """The first `limit` records of a split. The default split is `eval`, or everything if the dataset has no splits.

    Raises:
        UserError: The dataset has no records of that split.
    """
    splits = dataset.splits()
    if split is None:
        split = None if set(splits) == {None} else "eval"
    if split is not None and split not in splits:
        held = ", ".join(f"{name or 'none'} ({count:,})" for name, count in splits.items())
        raise UserError(
            f"{dataset.path}: no records in the split {split!r}",
            f"It contains: {held}.",
            "Choose another --split, or make splits with `rlhf data split`.",
        )
    yield from islice(dataset.records(split), limit)


def chosen_prompts(dataset: Dataset, split: str | None, limit: int | None = None) -> list[Prompt]:
    """The first `limit` distinct prompts of a split; see `chosen_records`."""
    return distinct(chosen_records(dataset, split), limit)


def distinct(records: Iterable[Any], limit: int | None = None) -> list[Any]:
    """The first `limit` records of distinct prompts."""
    found: dict[str, Any] = {}
    for record in records:
        found.setdefault(record.prompt_id, record)
        if len(found) == limit:
            break
    return list(found.values())


def train_demonstrations(path: str | Path) -> Iterator[Demonstration]:
    """The demonstrations of a dataset that are for training, or have no split: what examples are chosen from.

    Raises:
        UserError: The dataset contains other records.
    """
    return train_records([open_dataset(path, "demonstration")])


def as_prompt(value: str | Sequence[Mapping[str, str]] | Prompt) -> Prompt:
    """A prompt from a user message, from {role, content} mappings that end with a user turn, or as it is.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(value, Prompt):
        return value
    try:
        if isinstance(value, str):
            return Prompt((Message("user", value),))
        return Prompt(tuple(Message(turn["role"], turn["content"]) for turn in value))  # type: ignore[arg-type]
    except (BadRecord, KeyError, TypeError) as fault:
        raise UserError(
            f"not a prompt: {str(value)[:80]!r} ({fault})",
            remedy='Give a text, or a list of {"role": ..., "content": ...} that ends with a user turn.',
        ) from None


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt with a system message, unless it already has one."""
    at = int(prompt.messages[0].role == DEFINITIONS)
    if system is None or prompt.messages[at].role == "system":
        return prompt
    return Prompt((*prompt.messages[:at], Message("system", system), *prompt.messages[at:]))
