"""Importers of preference pairs: a better and a worse answer to one prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.importers.rows import IMPORTERS, JSON, convert_rows
from rlhf.schema import BadRecord, Candidate, Message, Ranking, Record
from rlhf.store import OnReject


@IMPORTERS.row("hh-rlhf", suffixes=JSON)
def hh_rlhf(path: Path, reject: OnReject) -> Iterator[Record]:
    """Anthropic HH-RLHF: rows {chosen, rejected} of whole transcripts that share all but the last answer.

    Ranks: chosen 1, rejected 2; the format knows no ties. The prompt is the turns before the last answer. A model
    wrote both answers, a crowdworker chose; the format names neither.

    Turns are marked by a blank line and ``Human:`` or ``Assistant:``. Two marks of one speaker in a row are one turn,
    joined by a blank line: in the published data the model wrote the second mark inside its own answer, and the
    annotator saw and judged the whole. White space around a turn is dropped.

    Rejected: an empty or missing answer, two identical answers, transcripts that differ before the last answer (what
    was preferred is then not an answer to one prompt), and text that does not begin and end with a turn.
    """
    return convert_rows(path, reject, _hh_ranking)


_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}


def _hh_ranking(row: Any) -> Ranking:
    if not isinstance(row, dict) or not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
        remedy = 'Each line needs {"chosen": text, "rejected": text}; is this the right format name?'
        raise BadRecord("not a row of chosen and rejected text", remedy=remedy)
    prompt, chosen = _hh_transcript(row["chosen"], "chosen")
    other_prompt, rejected = _hh_transcript(row["rejected"], "rejected")
    if prompt != other_prompt:
        remedy = "Import such rows as two demonstrations, or cut both transcripts at the last common turn."
        raise BadRecord("the transcripts differ before the last answer", remedy=remedy)
    if chosen == rejected:
        raise BadRecord("the two answers are identical", remedy="Nothing was preferred; leave the row out.")
    candidates = (Candidate(chosen, author_kind="model"), Candidate(rejected, author_kind="model"))
    return Ranking(prompt, source="hh-rlhf", candidates=candidates, ranks=(1, 2))


def _hh_transcript(text: str, field: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer."""
    head, *parts = _HH_TURN.split(text)
    if head or not parts:
        remedy = "Begin the transcript with a blank line and 'Human:'."
        raise BadRecord("a transcript does not begin with 'Human:' or 'Assistant:'", field, remedy)
    turns: list[tuple[str, str]] = []
    for speaker, content in zip(parts[::2], parts[1::2]):
        content = content.strip()
        if turns and turns[-1][0] == speaker:
            content = "\n\n".join(part for part in (turns.pop()[1], content) if part)
        turns.append((speaker, content))
    *prompt, (last, answer) = turns
    if last != "Assistant":
        raise BadRecord("a transcript does not end with 'Assistant:'", field, "Cut it after its last answer.")
    if not answer:
        raise BadRecord("an answer is empty", field, "Leave the row out, or write the answer.")
    return tuple(Message(_HH_ROLES[speaker], content) for speaker, content in prompt), answer
