"""Which records of a dataset a command works on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.core.errors import UserError
from rlhf.data.schema import Message, Prompt
from rlhf.data.store import Dataset


def chosen_records(dataset: Dataset, split: str | None, limit: int | None = None) -> Iterator[Any]:
    """The records of a split, at most `limit`. Without a split: `eval`, or all where the dataset has no splits.

    Raises:
        UserError: The dataset holds none of that split.
    """
    splits = dataset.splits()
    if split is None:
        split = None if set(splits) == {None} else "eval"
    if split is not None and split not in splits:
        held = ", ".join(f"{name or 'none'} ({count:,})" for name, count in splits.items())
        raise UserError(
            f"{dataset.path}: no record of the split {split!r}",
            f"It holds: {held}.",
            "Name another --split, or make splits with `rlhf data split`.",
        )
    for index, record in enumerate(dataset.records(split)):
        if limit is not None and index >= limit:
            return
        yield record


def chosen_prompts(dataset: Dataset, split: str | None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a split, each once, at most `limit`; see `chosen_records`."""
    prompts: dict[str, Prompt] = {}
    for record in chosen_records(dataset, split):
        prompts.setdefault(record.prompt_id, record)
        if limit is not None and len(prompts) >= limit:
            break
    return list(prompts.values())


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt with a system message before it, where it has none of its own."""
    if system is None or prompt.messages[0].role == "system":
        return prompt
    return Prompt((Message("system", system), *prompt.messages))
