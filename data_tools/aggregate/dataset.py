"""Aggregate: the rankings of several annotators into one ranking per prompt, with a confidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.aggregate.methods import AGGREGATORS, Verdict
from data_tools.aggregate.votes import UNNAMED, Ballots, Votes, collect, distinct
from data_tools.io.derive import Derivation
from data_tools.io.rejects import FILE_NAME, by_count
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.core.table import Pick
from rlhf.data.schema import SPLITS, Candidate, Ranking
from rlhf.data.store import open_dataset

QUALITY_FILE = "annotators.json"
"""In the new dataset's folder: what the method found of each annotator."""
SHOWN = 30


def aggregate_dataset(
    path: str | Path, out: str | Path, method: str, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a dataset with one ranking per prompt, aggregated from all rankings of that prompt.

    Rankings of the same answers are merged, whatever order they stand in; so are rankings that overlap, into one over
    all their answers. A prompt whose rankings share no answer keeps one ranking for each such set. The new ranking's
    annotator is `aggregate:METHOD`, `weight` the confidence (see `data_tools.aggregate.methods`), `merged` the ids of
    the rankings in it; time and seconds are none. Answers stand in the order of their first appearance, each with its
    first author and the mean of its ratings. Source and group are those of the first ranking; where rankings of a
    prompt are in different splits, the one held out furthest counts (test, then eval, then train). The weights of the
    rankings that are read play no part.

    Two passes over the data. Memory grows with votes and prompts; texts are held only of overlapping rankings, until
    all their answers have been seen.

    Args:
        method: A row of `AGGREGATORS`.
        options: Its options, as `--option` gives them.

    Returns:
        out, method, options, read, written, rejected, reasons, prompts; `rankings` read well; `merged`: of them, those
        that share a pool with another; `alone`: rankings written that were aggregated from one; `conflicting_splits`:
        prompts; `confidence`: mean, and `annotators`: a list of {annotator, rankings, votes, agreement, quality}, the
        worst first. `votes` are pairs; `agreement` is the share of the annotator's pairs, none tied, in the order that
        most others give; `quality` is the method's estimate. Both are None where nothing tells.

    Raises:
        UserError: An unknown method or option, no rankings, or a method that needs annotators' names, without any.
    """
    try:
        pick = AGGREGATORS.pick({**(options or {}), "name": method})
    except ValueError as error:
        raise UserError(
            f"--method {method}: {error}", remedy="`rlhf data aggregate --help` lists the methods."
        ) from None
    parent = open_dataset(path, "ranking")
    records = parent.records(on_reject=lambda _: None)  # rejects are kept by the pass that writes
    count = parent.manifest.get("count")
    ballots = collect(console.track(records, "reading rankings", count, "rankings"))
    verdict = pick(ballots.votes)
    annotators = annotator_figures(ballots, verdict)
    facts = {"method": pick.name, "options": pick.options}
    with Derivation(out, "ranking", [parent], facts) as made:
        for ranking in _merged(parent.records(on_reject=made.rejects), ballots, verdict, pick):
            made.write(ranking)
        write_json(made.folder / QUALITY_FILE, {"method": pick.name, "annotators": annotators})
    rejected = made.rejects.count
    per_pool = np.bincount(ballots.pool)
    return {
        "out": str(out), **facts, "read": len(ballots.ids) + rejected, "written": made.written, "rejected": rejected,
        "reasons": by_count(made.rejects.reasons), "prompts": int(ballots.prompt.max()) + 1,
        "rankings": len(ballots.ids), "merged": int(per_pool[per_pool > 1].sum()), "alone": int((per_pool == 1).sum()),
        "conflicting_splits": int((_split(ballots, np.maximum) != _split(ballots, np.minimum)).sum()),
        "confidence": float(verdict.confidence.mean()), "annotators": annotators,
    }  # fmt: skip


def _split(ballots: Ballots, choose: Any) -> NDArray[Any]:
    """The greatest or least split code of each prompt: test > eval > train > none."""
    found = np.full(int(ballots.prompt.max()) + 1, 0 if choose is np.maximum else len(SPLITS))
    choose.at(found, ballots.prompt, ballots.split)
    return found


def _merged(records: Iterator[Ranking], ballots: Ballots, verdict: Verdict, pick: Pick) -> Iterator[Ranking]:
    """One ranking per pool, when the last of its answers has been seen; the records are those of `ballots`."""
    pools, splits = ballots.pool, _split(ballots, np.maximum)
    size = np.bincount(ballots.votes.pool)
    members = np.argsort(pools, kind="stable")
    until = np.cumsum(np.bincount(pools))
    waiting: dict[int, tuple[Ranking, dict[int, Candidate]]] = {}
    done = np.zeros(len(size), bool)
    for number, (record, pool) in enumerate(zip(records, pools.tolist())):
        if done[pool]:
            continue
        first, answers = waiting.setdefault(pool, (record, {}))
        items = ballots.item[ballots.start[number] : ballots.start[number + 1]].tolist()
        for item, (candidate, _) in zip(items, distinct(record).values()):
            rating = float(ballots.rating[item])
            score = None if np.isnan(rating) else rating
            answers.setdefault(item, Candidate(candidate.text, candidate.author, candidate.author_kind, score))
        if len(answers) < size[pool]:
            continue
        done[pool] = True
        del waiting[pool]
        ids = ballots.ids[members[until[pool - 1] if pool else 0 : until[pool]]]
        code = splits[ballots.prompt[number]]
        yield Ranking(
            first.messages,
            source=first.source,
            group=first.group,
            split=SPLITS[code - 1] if code else None,
            candidates=tuple(answers.values()),
            ranks=tuple(verdict.ranks[list(answers)].tolist()),
            annotator=f"aggregate:{pick.name}",
            weight=float(verdict.confidence[pool]),
            merged=tuple(dict.fromkeys(f"{one:016x}" for one in ids.tolist())),
        )


# ---- annotators ------------------------------------------------------------------------------------------------------


def annotator_figures(ballots: Ballots, verdict: Verdict) -> list[dict[str, Any]]:
    """What the data and the method say of each annotator: see `aggregate_dataset`. The worst come first."""
    votes = ballots.votes
    count = len(votes.annotators)
    rankings = np.bincount(ballots.annotator, minlength=count).tolist()
    pairs = np.bincount(votes.annotator, minlength=count).tolist()
    agreement = agreement_with_others(votes)
    quality = np.full(count, np.nan) if verdict.quality is None else verdict.quality
    rows = [
        {"annotator": name, "rankings": rankings[a], "votes": pairs[a], "agreement": _known(agreement[a]),
         "quality": _known(quality[a])}
        for a, name in enumerate(votes.annotators)
    ]  # fmt: skip

    def worst_first(row: dict[str, Any]) -> tuple[float, str]:
        figure = row["agreement"] if row["quality"] is None else row["quality"]
        return (2.0 if figure is None else figure, row["annotator"])

    return sorted(rows, key=worst_first)


def agreement_with_others(votes: Votes) -> NDArray[Any]:
    """Of each annotator [A], the share of strict votes in the order that most others give to the pair; NaN without any.

    Others are all votes on the pair but this one. Pairs that the others leave even are not counted.
    """
    _, pair = np.unique(np.stack((votes.first, votes.second)), axis=1, return_inverse=True)
    others = np.bincount(pair, votes.outcome)[pair] - votes.outcome
    told = (votes.outcome != 0) & (others != 0)
    right = np.bincount(votes.annotator, told & (np.sign(others) == votes.outcome), len(votes.annotators))
    with np.errstate(invalid="ignore"):
        return right / np.bincount(votes.annotator, told, len(votes.annotators))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def show(summary: Mapping[str, Any]) -> None:
    """Print what `aggregate_dataset` returns."""
    console.say(
        f"{summary['out']}: {summary['rankings']:,} rankings of {summary['prompts']:,} prompts into "
        f"{summary['written']:,} by {summary['method']}, mean confidence {summary['confidence']:.2f}"
    )
    console.say(
        f"{summary['merged']:,} rankings were merged with others, {summary['alone']:,} had none to be merged with"
    )
    if (extra := summary["written"] - summary["prompts"]) > 0:
        console.say(f"{extra:,} more rankings than prompts: rankings that share no answer cannot be merged")
    shown = summary["annotators"][:SHOWN]
    more = len(summary["annotators"]) - len(shown)
    title = "annotators, the worst first" + (f" ({more:,} more in {QUALITY_FILE})" if more else "")
    rows = [[row["annotator"] or "(not named)", *list(row.values())[1:]] for row in shown]
    console.table(title, ["annotator", "rankings", "votes on pairs", "agrees with others", "quality"], rows)
    if all(row["quality"] is None for row in shown):
        methods = " or ".join(row.name for row in AGGREGATORS if row.traits["quality"])
        console.say(f"quality: {summary['method']} takes all annotators for equal; {methods} tell them apart")
    else:
        console.say("quality: probability that a pair is ordered right, as the method estimates it; 0.5 is guessing")
    if summary["conflicting_splits"]:
        console.warn(
            f"{summary['conflicting_splits']:,} prompts are in several splits; they went to the one held out furthest"
        )
    if summary["rejected"]:
        console.warn(f"{summary['rejected']} bad rows of the parent were set aside: {Path(summary['out']) / FILE_NAME}")
    if any(row["annotator"] == UNNAMED for row in summary["annotators"]) and len(summary["annotators"]) > 1:
        console.warn("some rankings name no annotator; a method that estimates quality takes them for one group")
