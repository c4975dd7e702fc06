"""Filter: the records of a dataset for which an expression holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from data_tools.io.derive import Derivation, show_counts
from data_tools.io.expressions import Expression, Failed
from rlhf.core.errors import UserError
from rlhf.data.schema import KINDS, Demonstration, Prompt, Proposal, Ranking, Record
from rlhf.data.store import Dataset, open_dataset

CountTokens = Callable[[Sequence[str]], list[int]]


def _candidates(record: Proposal) -> list[dict[str, Any]]:
    ranks = record.ranks if isinstance(record, Ranking) else (None,) * len(record.candidates)
    return [
        {
            "text": c.text, "author": c.author, "author_kind": c.author_kind, "score": c.score,
            "rank": rank, "chars": len(c.text),
        }
        for c, rank in zip(record.candidates, ranks)
    ]  # fmt: skip


def _plain(*names: str) -> dict[str, Callable[[Any], Any]]:
    return {name: attrgetter(name) for name in names}


def _answer_chars(record: Record) -> int:
    return max(map(len, record.answers))


FIELDS: dict[type[Prompt], dict[str, Callable[[Any], Any]]] = {
    Prompt: {
        **_plain("id", "prompt_id", "source", "group", "split"),
        "prompt": lambda record: record.messages[-1].content,
        "messages": lambda record: record.chat,
        "turns": lambda record: len(record.messages),
        "prompt_chars": lambda record: sum(len(message.content) for message in record.messages),
    },
    Demonstration: {"answer_chars": _answer_chars, **_plain("answer", "author")},
    Proposal: {
        "answer_chars": _answer_chars,
        "candidates": _candidates,
        "k": lambda record: len(record.candidates),
    },
    Ranking: {
        **_plain("annotator", "time", "seconds", "shown", "weight"),
        "ranks": lambda record: list(record.ranks),
        "ties": lambda record: math.comb(len(record.candidates), 2) - record.informative_pairs,
        "merged": lambda record: list(record.merged),
    },
}
"""Class of records -> what it adds to what an expression may name, and how that is computed."""
TOKENS = ("prompt_tokens", "answer_tokens", "tokens")


def fields(kind: str) -> dict[str, Callable[[Any], Any]]:
    """What an expression may name for records of that kind -> how it is computed.

    `prompt` is the text of the last user turn, `messages` the whole chat, `turns` its length; `prompt_chars` counts
    all turns, `answer_chars` the longest answer; `candidates` have text, author, author_kind, score, rank (None in a
    proposal) and chars; `ties` is the number of pairs with equal ranks. The others are the schema's.
    """
    return {name: value for made, own in FIELDS.items() if issubclass(KINDS[kind], made) for name, value in own.items()}


def token_counter(path: str | Path) -> CountTokens:
    """Counts the tokens of texts by the tokenizer of a model folder (or of a model in the hub's cache).

    The texts are counted as they are, without a chat template and without special tokens.

    Raises:
        UserError: There is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--tokenizer {path}: no tokenizer there: {reason}", remedy="Name a model's folder.") from None
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _token_fields(record: Record, count: CountTokens) -> dict[str, int]:
    turns = [message.content for message in record.messages]
    counts = count([*turns, *record.answers])
    prompt, longest = sum(counts[: len(turns)]), max(counts[len(turns) :], default=0)
    return {"prompt_tokens": prompt, "answer_tokens": longest, "tokens": prompt + longest}


class _Condition:
    """Decides whether a record is kept."""

    def __init__(
        self, kind: str, where: str | None, count: CountTokens | None, least: int | None, most: int | None
    ) -> None:
        self._fields = fields(kind)
        known = [*self._fields, *TOKENS] if count else list(self._fields)
        if where is not None and count is None and (asked := Expression(where, "--where").names & set(TOKENS)):
            raise UserError(f"--where: `{min(asked)}` needs --tokenizer", "Tokens are counted by a model's tokenizer.")
        self._where = None if where is None else Expression(where, "--where", known)
        self._names = self._where.names & self._fields.keys() if self._where else set()
        self._limits = (0 if least is None else least, float("inf") if most is None else most)
        limited = least is not None or most is not None
        self._count = count if limited or (self._where and self._where.names & set(TOKENS)) else None

    def __call__(self, record: Record) -> bool:
        values = {name: self._fields[name](record) for name in self._names}
        if self._count:
            values |= _token_fields(record, self._count)
            if not self._limits[0] <= values["tokens"] <= self._limits[1]:
                return False
        return self._where is None or bool(self._where(values))


def filter_dataset(
    path: str | Path,
    out: str | Path,
    *,
    where: str | None = None,
    tokenizer: str | Path | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the records for which the expression holds and whose length is within the limits.

    Args:
        where: A Jinja expression over `fields`, such as ``k > 2 and annotator != "kim"``.
        tokenizer: A model's folder; gives expressions `prompt_tokens` (all turns), `answer_tokens` (the longest
            answer) and `tokens` (their sum), all without a chat template.
        min_tokens: The fewest `tokens` of a record that is kept.
        max_tokens: The most.
        overwrite: Replace a dataset of that name.

    Returns:
        out, kind, read, written, filtered (records left out), rejected and reasons (bad rows of a JSONL dataset);
        `read` is the sum of the other three.

    Raises:
        UserError: Nothing to filter by, an invalid expression or unknown field, an expression that fails on a
            record (nothing is written then), no record left, or a dataset that cannot be read or written.
    """
    limits = {"--min-tokens": min_tokens, "--max-tokens": max_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    if where is None and not given:
        raise UserError("filter: nothing to filter by", remedy="Give --where, or --tokenizer with --max-tokens.")
    if given and tokenizer is None:
        raise UserError(f"{next(iter(given))}: needs --tokenizer", "Tokens are counted by a model's tokenizer.")
    parent = open_dataset(path)
    condition = _Condition(
        parent.kind, where, token_counter(tokenizer) if tokenizer is not None else None, min_tokens, max_tokens
    )
    with Derivation(out, parent.kind, [parent], judgements=True, overwrite=overwrite) as made:
        filtered = _write(parent, made, condition, where)
        if not made.count:
            raise UserError(f"{path}: no record is left out of {filtered:,}", remedy="Loosen the condition.")
        made.origin["filtered"] = filtered
    return made.summary(filtered=filtered)


def _write(parent: Dataset, made: Derivation, condition: _Condition, where: str | None) -> int:
    """Write the records that are kept; how many are not."""
    filtered = failed = 0
    first = ""
    for record in parent.records(on_reject=made.rejects):
        try:
            keep = condition(record)
        except Failed as error:
            failed += 1
            first = first or f"First: record {record.id}: {error}"
            continue
        if keep:
            made.write(record)
        filtered += not keep
    if failed:
        raise UserError(
            f"--where {where!r}: fails on {failed:,} records; nothing was written",
            first,
            "Handle them in the expression, such as `seconds is none or seconds > 3`.",
        )
    return filtered


def show(summary: Mapping[str, Any]) -> None:
    """Print what `filter_dataset` returns."""
    show_counts(summary, "left out", "filtered")
