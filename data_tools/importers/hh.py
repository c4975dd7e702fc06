"""The importer of Anthropic's HH-RLHF transcripts."""

from __future__ import annotations

import re
from typing import Any, Literal

from data_tools.published.table import row_format, rows_have
from data_tools.reading.turns import is_transcript
from rlhf.data.columns import Row, ranking_row
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking

_QUESTION, _ANSWER = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}
_MOST_EXCHANGES = 50
"""A usual row has no more."""
_SPEAKERS = ("user", "assistant") * _MOST_EXCHANGES


detect = rows_have(
    "chosen",
    "rejected",
    where=lambda row: "prompt" not in row and is_transcript(row["chosen"]) and is_transcript(row["rejected"]),
    why="its rows have `chosen` and `rejected` transcripts that begin with 'Human:' or 'Assistant:'",
)


def _usual(row: Any) -> Row | None:
    """The ranking of a row as nearly all are, or None: this is most of an import's time.

    Such a row is two texts and nothing else. They begin with a question, the speakers take turns, no turn is empty, and
    the second text repeats the first up to the last answer. It then needs no check, also not for a transcript inside
    one text.
    """
    if type(row) is not dict or len(row) != 2:
        return None
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if type(chosen) is not str or type(rejected) is not str:
        return None
    *exchanges, best = chosen.split(_ANSWER)
    start = len(chosen) - len(best)
    if not 0 < len(exchanges) <= _MOST_EXCHANGES or not rejected.startswith(chosen[:start]):
        return None
    other = rejected[start:]
    if (":" in best and _QUESTION in best) or (":" in other and (_QUESTION in other or _ANSWER in other)):
        return None  # a single character is found much faster, and most answers have no colon
    turns: list[str] = []
    for exchange in exchanges:  # an answer (before the first question: nothing) and the next question
        said = exchange.split(_QUESTION)
        if len(said) != 2:
            return None
        turns += said
    turns = [turn.strip() for turn in turns]
    best, other = best.strip(), other.strip()
    if turns.pop(0) or not (all(turns) and best and other and best != other):
        return None
    try:
        prompt = list(zip(_SPEAKERS, turns))
        return ranking_row(prompt, (best, other), _candidates(best, other), (1, 2), "hh-rlhf")
    except TypeError:  # a lone surrogate
        return None


@row_format("hh-rlhf", detect=detect, usual=_usual)
def hh_rlhf(row: Any) -> Ranking:
    """Anthropic HH-RLHF: rows {chosen, rejected} of whole transcripts that share all but the last answer.

    Ranks: chosen 1, rejected 2; the format has no ties. The format does not say in which order the
    answers were shown. The prompt is the turns before the last answer. A model wrote both answers, a crowdworker
    chose; the format names neither.

    Turns are marked by a blank line and ``Human:`` or ``Assistant:``. Two marks of one speaker in a row are one turn,
    joined by a blank line: in the published data the model wrote the second mark inside its own answer, and the
    annotator saw and judged the whole. White space around a turn is dropped.

    Rejected: an empty or missing answer, two identical answers, transcripts that differ before the last answer (what
    was preferred is then not an answer to one prompt), and text that does not begin and end with a turn.
    """
    if not isinstance(row, dict) or not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
        remedy = 'Each line needs {"chosen": text, "rejected": text}; is this the right format name?'
        raise BadRecord("not a row of chosen and rejected text", remedy=remedy)
    prompt, best = _transcript(row["chosen"], "chosen")
    other_prompt, other = _transcript(row["rejected"], "rejected")
    if other_prompt != prompt:
        remedy = "Import such rows as two demonstrations, or cut both transcripts at the last common turn."
        raise BadRecord("the transcripts differ before the last answer", remedy=remedy)
    if best == other:
        raise BadRecord("the two answers are identical", remedy="Nothing was preferred; leave the row out.")
    candidates = tuple(Candidate(*candidate) for candidate in _candidates(best, other))
    return Ranking(prompt, source="hh-rlhf", candidates=candidates, ranks=(1, 2))


def _candidates(chosen: str, rejected: str) -> tuple[tuple[str, str, Literal["model"], None], ...]:
    """The fields of both candidates."""
    return (chosen, "", "model", None), (rejected, "", "model", None)


def _transcript(text: str, field: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer."""
    head, *parts = _TURN.split("\n\n" + text.lstrip())
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
    return tuple(Message(_ROLES[speaker], content) for speaker, content in prompt), answer
