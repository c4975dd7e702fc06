"""Split a dataset by prompt or by group, by a rule that holds across datasets, files and stages.

The rule: ``u = int(first 16 hex digits of sha256(f"{seed}:{key}"), 16) / 2**64`` is a number in [0, 1). The splits
divide that interval in the order train, eval, test, each as wide as its fraction, and `u` is in one of them. The key is
the prompt's id (the hash of its messages) or its group. The file, the order and the other records have no influence:
with one seed and the same fractions a prompt is in the same split everywhere, and a prompt that the reward model was
evaluated on is in no training set of any stage.

Groups follow the same rule instead of a quota, since a quota would move a group when another dataset lacks some.
With few groups a split may come out empty; that is an error, and `hold_out` names the groups of eval exactly.

With `near`, keys whose prompts are near duplicates share a split: the smallest of these keys decides for all. Which
prompts are near depends on the records, so datasets that are used together are split jointly (`together`).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.io.derive import Derivation
from data_tools.io.rejects import warn_rejected
from data_tools.statistics.near import Sets, near_groups, prompt_text
from rlhf.core import console
from rlhf.core.errors import UserError, nearest
from rlhf.data.schema import SPLITS, Record
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new

DEFAULT_FRACTIONS = {"train": 0.8, "eval": 0.1, "test": 0.1}
BY = ("prompt", "group")


def assign(key: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of a key, by the rule above.

    Args:
        key: A prompt's id, or a group.
        fractions: Split -> fraction; the fractions sum to 1.
    """
    draw = int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:16], 16)
    used = [split for split in SPLITS if fractions.get(split)]
    edge = 0.0
    for split in used[:-1]:
        edge += fractions[split]
        if draw < int(edge * 2**64):
            return split
    return used[-1]  # not compared with 1, which the sum may miss by rounding


def parse_fractions(text: str) -> dict[str, float]:
    """``train=0.8,eval=0.1,test=0.1`` as a mapping.

    Raises:
        UserError: Another form, an unknown split, a fraction outside 0 to 1, or a sum that is not 1.
    """
    remedy = "Write, for instance, --fractions train=0.8,eval=0.1,test=0.1"
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, equals, fraction = (piece.strip() for piece in part.partition("="))
        if not equals or name in fractions:
            what = "names a split twice" if equals else "is not split=fraction"
            raise UserError(f"--fractions {text}: {part!r} {what}", remedy=remedy)
        try:
            fractions[name] = float(fraction)
        except ValueError:
            raise UserError(f"--fractions {text}: {fraction!r} is not a number", remedy=remedy) from None
    return _checked(fractions)


def _checked(fractions: Mapping[str, float]) -> dict[str, float]:
    for name, fraction in fractions.items():
        if name not in SPLITS:
            raise UserError(f"--fractions: no split is called {name!r}", remedy=nearest(name, SPLITS))
        if not 0 <= fraction <= 1:
            raise UserError(f"--fractions: {name}={fraction} is not from 0 to 1")
    total = math.fsum(fractions.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"--fractions: the fractions sum to {total:.6g}, not to 1", remedy="Change one of them.")
    return {split: fractions[split] for split in SPLITS if fractions.get(split)}


def split_dataset(
    path: str | Path,
    out: str | Path,
    *,
    by: str = "prompt",
    fractions: Mapping[str, float] | None = None,
    hold_out: Sequence[str] = (),
    seed: int = 0,
    near: float | None = None,
    together: Sequence[str | Path] = (),
    allow_empty: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a copy of the dataset with every record in a split; splits that the records have already are replaced.

    Two passes over the data; memory grows with the number of distinct prompts or groups, not of records. The new
    manifest's origin names the parent (path and fingerprint) and the command.

    Args:
        by: prompt or group.
        fractions: Split -> fraction, summing to 1. By default 0.8 train, 0.1 eval, 0.1 test; with `hold_out`, the rest
            is all train.
        hold_out: Groups that are exactly the eval split's, whatever `fractions` says. Needs by="group".
        seed: Another seed gives another split; datasets that are used together need the same.
        near: Prompts of this Jaccard similarity or more (see `data_tools.statistics.near`) stay in one split, with
            their groups.
        together: Datasets that are used with this one; needs `near`. They are split jointly, so that no near
            duplicates are in different splits.
        allow_empty: Accept that a split gets no record (another dataset split by the same seed may fill it).
        overwrite: Replace a dataset of that name.

    Returns:
        out, kind, by, seed, read, written, rejected, reasons (bad rows of a JSONL dataset), for each split `splits`
        (records) and `keys` (prompts or groups), and `joined` (keys that follow another that they are near to).

    Raises:
        UserError: Wrong arguments, a record without a group, a prompt in groups of different splits, a group near to
            one that is held out, a split that would be empty, or a dataset that cannot be read or written.
    """
    if by not in BY:
        raise UserError(f"--by: cannot split by {by!r}", remedy=nearest(by, BY))
    if hold_out and by != "group":
        raise UserError("--hold-out names groups and works with --by group only", remedy="Add --by group.")
    if together and near is None:
        why = "Prompts that are equal are in one split in every dataset; only near ones are not."
        raise UserError("--with: works with --near only", why, "Leave it out, or add --near 0.8.")
    checked = _checked(fractions or ({"train": 1.0} if hold_out else DEFAULT_FRACTIONS))
    parent, others = open_dataset(path), [open_dataset(other) for other in together]
    check_new(out, overwrite)
    deciding = {} if near is None else _deciding([parent, *others], by, near)
    plan = _plan(parent, by, checked, hold_out, seed, deciding)
    if not allow_empty:
        _refuse_empty(path, plan, {*checked, *(["eval"] if hold_out else [])}, by)
    with Derivation(out, parent.kind, [parent, *others], judgements=True, overwrite=overwrite) as made:
        for record in parent.records(on_reject=made.rejects):
            made.write(record.with_split(plan[_key(record, by)]))
    keys = Counter(plan.values())
    records = open_dataset(out).splits()
    return made.summary() | {
        "by": by, "seed": seed,
        "splits": {split: records.get(split, 0) for split in SPLITS},
        "keys": {split: keys.get(split, 0) for split in SPLITS},
        "joined": sum(deciding.get(key, key) != key for key in plan),
    }  # fmt: skip


def _refuse_empty(path: str | Path, plan: Mapping[str, str], wanted: set[str], by: str) -> None:
    empty = [split for split in SPLITS if split in wanted and split not in plan.values()]
    if empty:
        raise UserError(
            f"{path}: {' and '.join(empty)} would be empty: {len(plan)} {by}s are assigned by their hashes",
            "Each is assigned on its own, so that the rule holds across datasets.",
            "Name groups of eval by --hold-out, choose another --seed, fewer splits, or --allow-empty.",
        )


def _key(record: Record, by: str) -> str:
    return record.prompt_id if by == "prompt" else record.group or ""


def _deciding(datasets: Sequence[Dataset], by: str, near: float) -> dict[str, str]:
    """Key -> the key that decides for it: the smallest of those that near or equal prompts connect."""
    pairs: dict[tuple[str, str], None] = {}

    def texts() -> Iterator[tuple[str, str]]:
        for dataset in datasets:
            for record in dataset.records(on_reject=lambda _: None):  # counted when the records are written
                if key := _key(record, by):
                    pairs[key, record.prompt_id] = None
                yield record.prompt_id, prompt_text(record)

    prompts = near_groups(texts(), near)
    sets, first = Sets(), dict[str, str]()
    for key, prompt in pairs:
        sets.join(key, first.setdefault(prompts[prompt], key))
    return {key: sets.find(key) for key, _ in pairs}


def _plan(
    parent: Dataset,
    by: str,
    checked: dict[str, float],
    hold_out: Sequence[str],
    seed: int,
    deciding: Mapping[str, str],
) -> dict[str, str]:
    """Key -> split for every key of the dataset."""
    held_out = set(hold_out)
    near_held = {deciding.get(group, group): group for group in hold_out}
    plan: dict[str, str] = {}
    group_of: dict[str, str] = {}  # by prompt id
    for record in parent.records(on_reject=lambda _: None):  # counted when the records are written
        if by == "group" and not record.group:
            raise UserError(
                f"{parent.path}: record {record.id} has no group",
                remedy="Give every record a `group`, or use --by prompt.",
            )
        key = _key(record, by)
        decides = deciding.get(key, key)
        if decides in near_held and key not in held_out:
            raise UserError(
                f"{parent.path}: group {key!r} has a prompt near to one of group {near_held[decides]!r}, or to one "
                "that is near to it",
                "That one is held out, and this one would be trained on.",
                f"Add --hold-out {key}, leave out near duplicates with `rlhf data dedup`, or raise --near.",
            )
        plan[key] = plan.get(key) or ("eval" if key in held_out else assign(decides, checked, seed))
        if by == "group":
            first = group_of.setdefault(record.prompt_id, key)
            if plan[first] != plan[key]:
                raise UserError(
                    f"{parent.path}: prompt {record.prompt_id} is in group {first!r} ({plan[first]}) and in group "
                    f"{key!r} ({plan[key]})",
                    "A prompt in two splits leaks what is evaluated into training.",
                    "Give the prompt one group, or put both groups in the same --hold-out.",
                )
    for group in hold_out:
        if group not in plan:
            raise UserError(f"--hold-out {group!r}: no such group in {parent.path}", remedy=nearest(group, plan))
    return plan


def show(summary: Mapping[str, Any]) -> None:
    """Print what `split_dataset` returns."""
    rows = [[split, summary["splits"][split], summary["keys"][split]] for split in SPLITS]
    console.table(f"{summary['out']}: {summary['kind']}s", ["split", "records", f"{summary['by']}s"], rows)
    if summary["joined"]:
        console.say(f"{summary['by']}s assigned with a near duplicate: {summary['joined']:,}")
    warn_rejected(summary)
