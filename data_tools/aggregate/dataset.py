"""Merge the rankings of several annotators into one ranking per prompt, with a confidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_tools.aggregate.methods import AGGREGATORS, Aggregation
from data_tools.aggregate.votes import UNNAMED, Ballots, Votes, collect, distinct
from data_tools.io.derive import Derivation
from data_tools.io.rejects import warn_rejected
from data_tools.statistics.judgements import agreement_with_majority
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.core.table import Pick
from rlhf.data.schema import SPLITS, Candidate, Ranking
from rlhf.data.store import open_dataset
from rlhf.data.writer import check_new

QUALITY_FILE = "annotators.json"
"""File in the new dataset's folder with the method's estimates for each annotator."""
SHOWN = 30


def aggregate_dataset(
    path: str | Path,
    out: str | Path,
    method: str,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a dataset with one ranking per prompt, aggregated from all rankings of that prompt.

    Rankings of a prompt that share an answer are merged into one ranking of all their answers; a prompt whose rankings
    share none keeps one ranking for each set of answers. The new ranking's annotator is `aggregate:METHOD`, its weight
    is the confidence (see `data_tools.aggregate.methods`) and `merged` has the ids of its rankings; time and seconds
    are None. Answers are in the order of their first appearance, each with its first author and the mean of its
    ratings. Source and group are those of the first ranking. If the rankings of a prompt are in different splits, the
    first of test, eval and train is taken. The weights of the rankings are not used.

    The data is read twice. Memory grows with votes and prompts; texts are kept only of overlapping rankings, until all
    their answers have been seen.

    Args:
        method: A row of `AGGREGATORS`.
        options: Its options, as `--option` gives them.
        overwrite: Replace a dataset of that name.

    Returns:
        out, method, options, read, written, rejected, reasons, prompts; `rankings`: usable ones; `merged`: those that
        were merged with others; `alone`: those that were not; `conflicting_splits`: prompts in several splits;
        `confidence`: the mean; `annotators`: a list of {annotator, rankings, votes, agreement, quality}, the worst
        first. `votes` counts pairs; `agreement` is the fraction of the annotator's untied pairs that most others order
        in the same way; `quality` is the method's estimate. Both are None if unknown.

    Raises:
        UserError: The method or an option is unknown, there are no rankings, or the method needs annotators' names and
            none is given.
    """
    try:
        pick = AGGREGATORS.pick({**(options or {}), "name": method})
    except ValueError as error:
        raise UserError(
            f"--method {method}: {error}", remedy="`rlhf data aggregate --help` lists the methods."
        ) from None
    parent = open_dataset(path, "ranking")
    check_new(out, overwrite)
    records = parent.records(on_reject=lambda _: None)  # the second pass keeps them
    count = parent.manifest.get("count")
    ballots = collect(console.track(records, "reading rankings", count, "rankings"))
    result = pick(ballots.votes)
    annotators = annotator_metrics(ballots, result)
    facts = {"method": pick.name, "options": pick.options}
    with Derivation(out, "ranking", [parent], facts, overwrite=overwrite) as made:
        for ranking in _merged(parent.records(on_reject=made.rejects), ballots, result, pick):
            made.write(ranking)
        write_json(made.partial / QUALITY_FILE, {"method": pick.name, "annotators": annotators})
    per_pool = np.bincount(ballots.pool)
    return made.summary() | {
        **facts, "read": len(ballots.ids) + made.rejects.count, "prompts": int(ballots.prompt.max()) + 1,
        "rankings": len(ballots.ids), "merged": int(per_pool[per_pool > 1].sum()), "alone": int((per_pool == 1).sum()),
        "conflicting_splits": int((pd.Series(ballots.split).groupby(ballots.prompt).nunique() > 1).sum()),
        "confidence": float(result.confidence.mean()), "annotators": annotators,
    }  # fmt: skip


def _merged(records: Iterator[Ranking], ballots: Ballots, result: Aggregation, pick: Pick) -> Iterator[Ranking]:
    """One ranking per pool, as soon as all its answers have been seen; `records` are those of `ballots`."""
    pools = ballots.pool
    splits = pd.Series(ballots.split).groupby(ballots.prompt).transform("max").to_numpy()  # test > eval > train > none
    size = np.bincount(ballots.votes.pool)
    ids = np.split(ballots.ids[np.argsort(pools, kind="stable")], np.cumsum(np.bincount(pools))[:-1])
    waiting: dict[int, tuple[Ranking, dict[int, Candidate]]] = {}
    done = np.zeros(len(size), bool)
    for index, (record, pool) in enumerate(zip(records, pools.tolist())):
        if done[pool]:
            continue
        first, answers = waiting.setdefault(pool, (record, {}))
        items = ballots.item[ballots.start[index] : ballots.start[index + 1]].tolist()
        for item, (candidate, _) in zip(items, distinct(record).values()):
            rating = float(ballots.rating[item])
            answers.setdefault(item, candidate._replace(score=None if np.isnan(rating) else rating))
        if len(answers) < size[pool]:
            continue
        done[pool] = True
        del waiting[pool]
        code = splits[index]
        yield Ranking(
            first.messages,
            source=first.source,
            group=first.group,
            split=SPLITS[code - 1] if code else None,
            candidates=tuple(answers.values()),
            ranks=tuple(result.ranks[list(answers)].tolist()),
            annotator=f"aggregate:{pick.name}",
            weight=float(result.confidence[pool]),
            merged=tuple(dict.fromkeys(f"{one:016x}" for one in ids[pool].tolist())),
        )


# ---- annotators ------------------------------------------------------------------------------------------------------


def annotator_metrics(ballots: Ballots, result: Aggregation) -> list[dict[str, Any]]:
    """The `annotators` of `aggregate_dataset`."""
    votes = ballots.votes
    count = len(votes.annotators)
    rankings = np.bincount(ballots.annotator, minlength=count).tolist()
    pairs = np.bincount(votes.annotator, minlength=count).tolist()
    agreement = agreement_with_others(votes)
    quality = np.full(count, np.nan) if result.quality is None else result.quality
    rows = [
        {"annotator": name, "rankings": rankings[a], "votes": pairs[a], "agreement": _known(agreement[a]),
         "quality": _known(quality[a])}
        for a, name in enumerate(votes.annotators)
    ]  # fmt: skip

    def worst_first(row: dict[str, Any]) -> tuple[float, str]:
        value = row["agreement"] if row["quality"] is None else row["quality"]
        return (2.0 if value is None else value, row["annotator"])

    return sorted(rows, key=worst_first)


def agreement_with_others(votes: Votes) -> np.ndarray:
    """[A]: the fraction of an annotator's untied votes that agree with the majority of all other votes on the pair.

    Pairs on which the others are even do not count. NaN without any pair.
    """
    _, pair = np.unique(np.stack((votes.first, votes.second)), axis=1, return_inverse=True)
    right, tried = agreement_with_majority(pair, votes.outcome, votes.annotator, len(votes.annotators))
    with np.errstate(invalid="ignore"):
        return right / tried


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def show(summary: Mapping[str, Any]) -> None:
    """Print what `aggregate_dataset` returns."""
    console.say(
        f"{summary['out']}: {summary['rankings']:,} rankings of {summary['prompts']:,} prompts were aggregated into "
        f"{summary['written']:,} by {summary['method']}, mean confidence {summary['confidence']:.2f}"
    )
    console.say(f"{summary['merged']:,} rankings were merged with others, {summary['alone']:,} were not")
    if (extra := summary["written"] - summary["prompts"]) > 0:
        console.say(f"{extra:,} more rankings than prompts: rankings that share no answer cannot be merged")
    shown = summary["annotators"][:SHOWN]
    more = len(summary["annotators"]) - len(shown)
    title = "annotators, the worst first" + (f" ({more:,} more in {QUALITY_FILE})" if more else "")
    rows = [[row["annotator"] or "(not named)", *list(row.values())[1:]] for row in shown]
    console.table(title, ["annotator", "rankings", "votes on pairs", "agrees with others", "quality"], rows)
    if all(row["quality"] is None for row in shown):
        methods = " or ".join(row.name for row in AGGREGATORS if row.traits["quality"])
        console.say(f"quality: {summary['method']} treats all annotators as equal; {methods} estimate their quality")
    else:
        console.say("quality: estimated probability that the annotator orders a pair right; 0.5 is chance")
    if summary["conflicting_splits"]:
        console.warn(
            f"{summary['conflicting_splits']:,} prompts were in several splits: the first of test, eval, train is kept"
        )
    warn_rejected(summary)
    if any(row["annotator"] == UNNAMED for row in summary["annotators"]) and len(summary["annotators"]) > 1:
        console.warn("some rankings name no annotator; a method that estimates quality treats them as one annotator")
