"""`rlhf data rank --merge`: the votes of result files that annotators sent back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data_tools.io.rejects import Rejects, by_count, print_reasons
from data_tools.ranking_page.book import VoteBook
from data_tools.ranking_page.server import open_book, open_items
from data_tools.ranking_page.votes import Vote, annotator_name, parse_vote
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.core.limits import read_json_object
from rlhf.data.jsonl import Reject
from rlhf.data.schema import BadRecord

FORMAT, VERSION = "rlhf-ranking-result", 1
MOST_BYTES = 1 << 28
"""Most bytes of a result file."""


def merge(
    candidates: str | Path, files: Sequence[Path], out: Path | None = None, replace: bool = False
) -> dict[str, Any]:
    """Add the votes of result files. A file may come again: what is known already is not added.

    Of two votes of an annotator on one prompt, the later one counts, and `replaced` and `older` count them. Rows that
    cannot be used are written to `rejected-NAME.jsonl` next to the rankings, with their file and place (the first vote
    is 1).

    Args:
        candidates: The dataset of proposals that the offline page was made from.
        files: Results as the page saves them.
        out: See `rank_in_browser`.
        replace: Take a file also where its annotator has ranked the same prompts and none of the votes is known.

    Returns:
        `VoteBook.summary`, and: read, added, replaced (a vote of an earlier time was there), known, older (one of a
        later time was there), rejected, reasons.

    Raises:
        UserError: A file is not a result, or of other candidates, or its annotator may be another person than one with
            votes. Nothing is added then.
    """
    dataset, items = open_items(candidates)
    results = [(file, _read(file, dataset.fingerprint)) for file in files]
    with open_book(dataset, items, out) as book:
        rejected = book.out.with_name(f"rejected-{book.out.name}")
        rejected.unlink(missing_ok=True)
        counts = {"read": 0, "added": 0, "replaced": 0, "known": 0, "older": 0}
        with Rejects(rejected) as rejects:
            found = [(file, list(_votes(file, result, book, rejects))) for file, result in results]
            latest = dict(book.latest)
            for file, votes in found:
                _check_person(file, votes, latest, replace)
                latest |= {(vote.annotator, vote.item): vote for vote in votes}
            counts["read"] = sum(len(result["votes"]) for _, result in results)
            latest, added = dict(book.latest), list[Vote]()
            for vote in (vote for _, votes in found for vote in votes):
                counts[_add(vote, latest, added)] += 1
            book.add_all(added)
            reasons = {"rejected": rejects.count, "reasons": by_count(rejects.reasons)}
            print_reasons(rejects.reasons, rejects.first)
        line = f"read {counts['read']:,} = added {counts['added']:,} + in place of earlier votes {counts['replaced']:,}"
        line += f" + known already {counts['known']:,} + older {counts['older']:,} + rejected {rejects.count:,}"
        console.say(line + (f"; rejected votes: {rejected}" if rejects.count else ""))
        return book.summary() | counts | reasons


def _read(file: Path, fingerprint: str) -> dict[str, Any]:
    remedy = "Take the file that the page saved, unchanged."
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES:,} bytes")
        found = read_json_object(file)
    except OSError as error:
        raise UserError(f"--merge {file}: cannot be read: {error.strerror}", remedy="Check the path.") from None
    except ValueError as error:
        raise UserError(f"--merge {file}: cannot be read: {error}", remedy=remedy) from None
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION) or not isinstance(found.get("votes"), list):
        raise UserError(f"--merge {file}: is no result of a ranking page of this version", remedy=remedy)
    if found.get("fingerprint") != fingerprint:
        why = "Its page was made from another dataset, or the dataset has changed since."
        raise UserError(f"--merge {file}: belongs to other candidates", why, "Name the dataset of its page.")
    try:
        annotator_name(found.get("annotator"))
    except BadRecord as fault:
        remedy = "Correct `annotator` at the beginning of the file; the votes below it stay as they are."
        raise UserError(f"--merge {file}: {fault}", "Its votes would be kept under that name.", remedy) from None
    return found


def _votes(file: Path, result: dict[str, Any], book: VoteBook, rejects: Rejects) -> Iterator[Vote]:
    for number, row in enumerate(result["votes"], 1):
        try:
            if not isinstance(row, dict):
                raise BadRecord("not an object", type(row).__name__)
            yield parse_vote({**row, "annotator": result["annotator"]}, book.items)
        except BadRecord as fault:
            rejects(Reject(str(file), number, fault.reason, json.dumps(row), fault.detail, fault.remedy))


def _check_person(file: Path, votes: Sequence[Vote], latest: Mapping[tuple[str, str], Vote], replace: bool) -> None:
    """Refuse votes that may be those of another person of the same name, or of the same person under another name.

    Somebody who went on with a result, or corrected it, has votes in it that are known. One vote alone says nothing.
    """
    names = {name for name, _ in latest}
    for name in {vote.annotator for vote in votes} - names:
        if same := [other for other in names if other.casefold() == name.casefold()]:
            raise UserError(
                f'--merge {file}: is by "{name}", and there are votes by "{same[0]}"',
                "Names that differ in capitals alone are mostly one person's, who would count as two.",
                f'Write "{same[0]}" as `annotator` at the beginning of the file, or another name for another person.',
            )
    before = [(vote, latest[key]) for vote in votes if (key := (vote.annotator, vote.item)) in latest]
    if len(before) > 1 and not replace and not any(vote == other for vote, other in before):
        name = before[0][0].annotator
        raise UserError(
            f'--merge {file}: "{name}" has other votes on {len(before):,} of its prompts, and not one that is the same',
            "So it may be another person's; of two votes of one annotator on a prompt, only the later one counts.",
            "For another person, change `annotator` at the beginning of the file. "
            f'If "{name}" ranked these prompts twice, give --replace.',
        )


def _add(vote: Vote, latest: dict[tuple[str, str], Vote], added: list[Vote]) -> str:
    """Add a vote if it is the latest one; which of the counts it belongs to."""
    key = vote.annotator, vote.item
    before = latest.get(key)
    if before == vote:
        return "known"
    if before is not None and datetime.fromisoformat(before.time) > datetime.fromisoformat(vote.time):
        return "older"
    latest[key] = vote
    added.append(vote)
    return "added" if before is None else "replaced"
