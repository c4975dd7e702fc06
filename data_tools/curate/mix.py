"""Mix: a sample of several datasets in given fractions, without repeating a record."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_tools.curate.stats import Leaks
from data_tools.io.derive import Derivation, show_counts
from rlhf.core import console
from rlhf.core.errors import UserError, nearest
from rlhf.data.jsonl import OnReject
from rlhf.data.schema import Record
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new


@dataclass(frozen=True)
class MixPart:
    """One input of a mixture. `weight` is its fraction of the result; None: a fraction of the rest by size."""

    path: Path
    weight: Fraction | None = None


def parse_parts(words: Sequence[str]) -> list[MixPart]:
    """``PATH`` or ``PATH=WEIGHT`` words. A word that is an existing path is read as a path.

    Raises:
        UserError: A dataset that is named twice, or a weight that is not above 0.
    """
    parts: list[MixPart] = []
    for word in words:
        path, equals, tail = word.rpartition("=")
        weight = None if not equals or Path(word).exists() else _number(tail, f"{word}: the weight")
        part = MixPart(Path(word if weight is None else path), weight)
        if part.path in [other.path for other in parts]:
            raise UserError(f"{part.path}: is named twice", remedy="Name each dataset once, with its whole weight.")
        if weight is not None and weight <= 0:
            raise UserError(f"{word}: the weight is not above 0", remedy="Leave the dataset out.")
        parts.append(part)
    return parts


def _number(text: str, what: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{what} is not a number: {text!r}", remedy="Write, for instance, data/a=0.5") from None


def parse_caps(words: Sequence[str], parts: Sequence[MixPart]) -> dict[Path, int]:
    """``PATH=COUNT`` words.

    Raises:
        UserError: Another form, or a path that is not among the parts.
    """
    caps = {}
    for word in words:
        path, _, count = word.rpartition("=")
        if not path or not count.isdigit() or not int(count):
            raise UserError(f"--cap {word}: is not PATH=COUNT", remedy="Write, for instance, --cap data/a=10000")
        if Path(path) not in [part.path for part in parts]:
            hint = nearest(path, [str(part.path) for part in parts])
            raise UserError(f"--cap {word}: {path} is not in the mixture", remedy=hint)
        caps[Path(path)] = int(count)
    return caps


def shares(weights: Sequence[Fraction | None], available: Sequence[int]) -> list[Fraction]:
    """The fraction of each input in the result; they sum to 1.

    Without weights the fractions are proportional to the sizes. With all weights they are proportional to these. With
    some, these are fractions of the whole, and the inputs without one divide the rest in proportion to their sizes.

    Raises:
        UserError: Weights that leave nothing for the inputs without one.
    """
    given = sum((weight for weight in weights if weight is not None), Fraction(0))
    open_sizes = [size if weight is None else 0 for weight, size in zip(weights, available)]
    if not any(open_sizes):
        return [weight / given for weight in weights if weight is not None]
    if given >= 1:
        raise UserError(
            f"the weights sum to {float(given):g} and leave nothing for the dataset without one",
            remedy="Give every dataset a weight, or weights that sum to less than 1.",
        )
    rest = (1 - given) / sum(open_sizes)
    return [size * rest if weight is None else weight for weight, size in zip(weights, open_sizes)]


def counts(wanted: Sequence[Fraction], available: Sequence[int], size: int | None) -> list[int]:
    """How many records to take of each input: the fractions of `size`, rounded by largest remainders.

    Args:
        size: Records of the result; None for the most that the fractions allow.

    Raises:
        UserError: An input has too few records for the size. None is ever repeated.
    """
    most = min(int(have / share) for have, share in zip(available, wanted))
    total = most if size is None else size
    exact = [share * total for share in wanted]
    taken = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (taken[index] - exact[index], index))
    for index in by_remainder[: total - sum(taken)]:
        taken[index] += 1
    if any(count > have for count, have in zip(taken, available)):
        raise UserError(
            f"--size {total}: a dataset has too few records for its fraction of it",
            "No record is repeated; to train on records more often, use more epochs.",
            f"The largest size with these weights and caps is {most:,}.",
        )
    return taken


def mix_datasets(
    words: Sequence[str],
    out: str | Path,
    *,
    caps: Sequence[str] = (),
    size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a mixture of datasets of one kind. The records are sampled without repetition, by the seed.

    The inputs are read in their order and interleaved at random, so memory grows with the number of records, not
    with texts. A record without a `source` gets its dataset's name as one.

    Args:
        words: The inputs as `parse_parts` takes them.
        caps: The most records of an input, as `parse_caps` takes them; they are applied before the fractions.
        size: Records of the result; by default the most that the fractions allow.
        seed: Seed of the sample.
        overwrite: Replace a dataset of that name.

    Returns:
        out, kind, seed, read, written, left (not sampled), rejected, reasons, `parts` (path, share, available, taken
        of each), and `leaks` (prompts that are in more than one split of the result).

    Raises:
        UserError: Invalid words or size, datasets of different kinds or one without records, or one
            that cannot be read or written.
    """
    parts = parse_parts(words)
    limits = parse_caps(caps, parts)
    if size is not None and size < 1:
        raise UserError(f"--size {size}: is not above 0")
    parents = [open_dataset(part.path) for part in parts]
    kinds = {parent.kind: parent.path for parent in parents}
    if len(kinds) > 1:
        listed = ", ".join(f"{path} holds {kind}s" for kind, path in kinds.items())
        raise UserError(f"mix: {listed}", "A dataset holds one kind of record.", "Mix each kind to its own --out.")
    check_new(out, overwrite)
    held = [_count(parent) for parent in parents]
    available = [min(count, limits.get(part.path, count)) for count, part in zip(held, parts)]
    wanted = shares([part.weight for part in parts], available)
    taken = counts(wanted, available, size)
    taken_parts = [
        {"path": str(part.path), "share": float(share), "available": have, "taken": count}
        for part, share, have, count in zip(parts, wanted, available, taken)
    ]
    leaks = Leaks()
    with Derivation(out, parents[0].kind, parents, {"parts": taken_parts}, overwrite=overwrite) as made:
        for record in _interleaved(parents, held, taken, seed, made.rejects):
            leaks.add(record)
            made.write(record)
        made.origin["left"] = left = sum(held) - made.count
    return made.summary(left=left) | {"seed": seed, "parts": taken_parts, "leaks": len(leaks.prompts)}


def _count(dataset: Dataset) -> int:
    count = dataset.manifest.get("count")
    if count is None:
        count = sum(1 for _ in dataset.records(on_reject=lambda _: None))  # counted when the records are written
    if not count:
        raise UserError(f"{dataset.path}: holds no record", remedy="Leave it out.")
    return count


def _interleaved(
    parents: Sequence[Dataset], held: Sequence[int], taken: Sequence[int], seed: int, reject: OnReject
) -> Iterator[Record]:
    """The sampled records of all datasets, each dataset's in its own order."""
    streams = []
    for parent, have, count in zip(parents, held, taken):
        chosen = set(random.Random(f"{seed}:{parent.fingerprint}").sample(range(have), count))
        streams.append(_chosen(parent, chosen, reject))
    turns = array("I", (index for index, count in enumerate(taken) for _ in range(count)))
    random.Random(f"{seed}:order").shuffle(turns)
    for turn in turns:
        yield next(streams[turn])
    for stream in streams:
        next(stream, None)  # so that the bad rows at a file's end are counted


def _chosen(parent: Dataset, chosen: set[int], reject: OnReject) -> Iterator[Record]:
    name = parent.path.name.split(".")[0] if parent.path.is_file() else parent.path.name
    for index, record in enumerate(parent.records(on_reject=reject)):
        if index in chosen:
            yield record if record.source else replace(record, source=name)


def show(summary: Mapping[str, Any]) -> None:
    """Print what `mix_datasets` returns."""
    rows = [[part["path"], f"{part['share']:.1%}", part["available"], part["taken"]] for part in summary["parts"]]
    console.table(f"{summary['out']}: {summary['kind']}s", ["dataset", "share", "available", "taken"], rows)
    show_counts(summary, "left", "left")
    if summary["leaks"]:
        again = "split the mixture again with `rlhf data split`"
        console.warn(f"{summary['leaks']:,} prompts are in more than one split; {again}")
