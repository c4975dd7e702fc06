"""Exact and near duplicates of records, prompts and answers, within and across splits and evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_tools.statistics.columns import Columns, as_shards
from data_tools.statistics.intervals import Estimate, clustered_fraction
from data_tools.statistics.near import DEFAULT_THRESHOLD, near_groups, near_matches, similarity
from data_tools.statistics.sample import MOST_RECORDS, Texts, prompt_texts
from rlhf.data.schema import SPLITS
from rlhf.data.store import open_dataset

TRAIN = SPLITS.index("train")

# ---- exact ----------------------------------------------------------------------------------------------------------


def _again(names: np.ndarray) -> np.ndarray:
    """(n,) bool: an earlier one has the same name."""
    return pd.Series(names).duplicated().to_numpy()


def _in_several_splits(names: np.ndarray, split: np.ndarray) -> np.ndarray | None:
    """(n,) bool: the name is in another split too; None with fewer than two splits."""
    known = pd.Series(split).where(split >= 0)
    if known.nunique() < 2:
        return None
    return (known.groupby(names).transform("nunique") > 1).to_numpy() & (split >= 0)


def repeats(ids: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """The fraction of records whose id an earlier record has, and the indices of these records."""
    again = _again(ids)
    return Estimate(again.sum() / len(ids), n=len(ids)), np.flatnonzero(again)


def prompts_across_splits(columns: Columns) -> tuple[Estimate, np.ndarray] | None:
    """The number of prompts in more than one split, and a record of each; None with fewer than two splits."""
    several = _in_several_splits(columns.prompt, columns.split)
    if several is None:
        return None
    rows = np.flatnonzero(several)
    rows = rows[~_again(columns.prompt[rows])]
    return Estimate(float(len(rows)), n=len(np.unique(columns.prompt[columns.split >= 0]))), rows


def repeated_answers(columns: Columns) -> tuple[Estimate, np.ndarray] | None:
    """The fraction of answers whose text also answers another prompt, and the indices of the most frequent ones."""
    if not len(columns.answer):
        return None
    given = pd.DataFrame({"answer": columns.answer, "prompt": np.repeat(columns.prompt, columns.sizes)})
    given["prompts"] = given.groupby("answer")["prompt"].transform("nunique")
    several = given[given["prompts"] > 1]
    first = several.drop_duplicates("answer").sort_values(["prompts", "answer"], ascending=[False, True])
    return Estimate(len(several) / len(given), n=len(given)), first.index[:5].to_numpy()


# ---- near -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearPrompts:
    """Near-duplicates among the sampled prompts."""

    within: Estimate
    """Fraction of the prompts with an earlier near-duplicate in the same split."""
    across: Estimate | None
    """Number of prompts with a near-duplicate in another split; None with fewer than two splits."""
    examples: list[tuple[int, int]]
    """Two records with near prompts each, in different splits if there are any."""


def near_prompts(texts: Texts) -> NearPrompts:
    """Find the near-duplicates among the sampled prompts, by `data_tools.statistics.near.near_groups`."""
    rows = texts.prompts
    groups = near_groups((str(row), texts.prompt[row]) for row in rows.tolist())
    group = np.array([int(groups[str(row)]) for row in rows.tolist()], np.int64)
    split = texts.columns.split[rows].astype(np.int64)
    again = _again(group * 8 + split)
    several = _in_several_splits(group, split)
    spread = np.zeros(len(rows), bool) if several is None else several
    within = clustered_fraction(again.astype(float), np.ones(len(rows)))
    across = None if several is None else Estimate(float(spread.sum()), n=len(rows))
    assert within is not None
    return NearPrompts(within, across, _examples(rows, group, split, spread, again))


def _examples(rows: np.ndarray, group: np.ndarray, split: np.ndarray, spread: np.ndarray, again: np.ndarray) -> list:
    """Up to five pairs of records of one group, in different splits if there are any."""
    found: dict[int, tuple[int, int]] = {}
    for index in np.flatnonzero(spread if spread.any() else again):
        others = np.flatnonzero((group == group[index]) & ((split != split[index]) | ~spread.any()))
        others = others[others != index]
        if len(others) and group[index] not in found:
            found[group[index]] = (int(rows[index]), int(rows[others[0]]))
        if len(found) == 5:
            break
    return list(found.values())


def near_answers(texts: Texts) -> Estimate | None:
    """The fraction of sampled answers that are near to, or equal to, an answer to another sampled prompt."""
    keys = list(_answer_keys(texts))
    if not keys:
        return None
    groups = near_groups((str(at), text) for at, _, text in keys)
    given = pd.DataFrame({"group": [groups[str(at)] for at, _, _ in keys], "prompt": [prompt for _, prompt, _ in keys]})
    prompts = given.groupby("group")["prompt"].transform("nunique").to_numpy()
    return clustered_fraction((prompts > 1).astype(float), np.ones(len(prompts)))


def _answer_keys(texts: Texts) -> Iterator[tuple[int, int, str]]:
    """(index, prompt, text) of up to `MOST_RECORDS` sampled answers, each text of a prompt once."""
    columns, seen = texts.columns, set[tuple[int, int]]()
    for row in texts.records.tolist():
        for at, text in enumerate(texts.answers[row], int(columns.start[row])):
            key = (int(columns.prompt[row]), int(columns.answer[at]))
            if key not in seen:
                seen.add(key)
                yield at, key[0], text
                if len(seen) >= MOST_RECORDS:
                    return


def near_identical_pairs(texts: Texts) -> Estimate | None:
    """The fraction of sampled rankings whose first two answers are near-duplicates, among those that have two."""
    columns = texts.columns
    hits = [
        similarity(*texts.answers[row][:2]) >= DEFAULT_THRESHOLD
        for row in texts.records.tolist()
        if len(texts.answers[row]) > 1 and columns.answer[columns.start[row]] != columns.answer[columns.start[row] + 1]
    ]
    return clustered_fraction(np.array(hits, float), np.ones(len(hits))) if hits else None


# ---- evaluation sets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts of a dataset that models are evaluated on."""

    path: Path
    prompts: np.ndarray
    """Distinct ids, ascending, uint64."""
    texts: dict[str, str]
    """Id -> text; only of the first prompts if there are many."""

    @classmethod
    def read(cls, path: Path) -> EvaluationSet:
        """Read the prompts of a dataset of any kind."""
        with as_shards(open_dataset(path)) as shards:
            return cls(path, *prompt_texts(shards))


def contaminated(columns: Columns, sets: list[EvaluationSet]) -> tuple[Estimate, np.ndarray]:
    """The number of prompts of train, or of no split, that are also in an evaluation set, and a record of each."""
    rows = np.flatnonzero(columns.split <= TRAIN)
    _, first = np.unique(columns.prompt[rows], return_index=True)
    rows = rows[first]
    known = np.unique(np.concatenate([one.prompts for one in sets]))
    hit = np.isin(columns.prompt[rows], known)
    return Estimate(float(hit.sum()), n=len(rows)), rows[hit]


def near_contaminated(texts: Texts, sets: list[EvaluationSet]) -> tuple[Estimate, list[tuple[int, str]]]:
    """The number of sampled prompts of train, or of no split, that are near to, not equal to, an evaluation prompt.

    Returns:
        The number, and for up to five of them a record and the text that it is near to.
    """
    others = {key: text for one in sets for key, text in one.texts.items()}
    rows = texts.prompts[texts.columns.split[texts.prompts] <= TRAIN]
    keys = {f"{texts.columns.prompt[row]:016x}": int(row) for row in rows.tolist()}
    fresh = ((key, texts.prompt[row]) for key, row in keys.items() if key not in others)
    found = near_matches(fresh, others.items())
    examples = [(keys[key], others[other]) for key, other in list(found.items())[:5]]
    return Estimate(float(len(found)), n=len(rows)), examples
