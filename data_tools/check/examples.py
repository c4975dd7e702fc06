"""A few records as examples of each fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.statistics.facts import Facts
from data_tools.statistics.words import best_answer
from rlhf.data.schema import SPLITS

LONGEST = 600
MOST = 3


@dataclass(frozen=True)
class FaultExample:
    """Texts that show a fault."""

    metric: str
    texts: list[tuple[str, str]]
    """(label, text)."""


def examples_of(facts: Facts) -> list[FaultExample]:
    """Up to `MOST` examples of each metric that has any."""
    kinds = {"ranking": (_prompts, _answers, _contradictions), "demonstration": (_prompts, _answers)}
    kinds["proposal"] = kinds["demonstration"]
    return [one for make in kinds.get(facts.dataset.kind, (_prompts,)) for one in make(facts)]


def _prompts(facts: Facts) -> Iterator[FaultExample]:
    prompt = facts.texts.prompt
    faults = {
        "duplicate-records": facts.repeats,
        "prompts-across-splits": facts.split_leaks,
        "contaminated-prompts": facts.contaminated,
    }
    for name, found in faults.items():
        for row in found[1][:MOST].tolist() if found else ():
            yield FaultExample(name, [("prompt", _short(prompt[row]))])
    if facts.near:
        near = facts.near_prompts
        name = "across" if near.across is not None and near.across.value else "within"
        for rows in near.examples[:MOST]:
            texts = [(f"prompt ({_split(facts, row)})", _short(prompt[row])) for row in rows]
            yield FaultExample(f"near-duplicates-{name}-splits", texts)
    for row, other in facts.near_contaminated[1][:MOST] if facts.near and facts.evaluation else ():
        texts = [("prompt", _short(prompt[row])), ("prompt of an evaluation set", _short(other))]
        yield FaultExample("near-contaminated-prompts", texts)


def _answers(facts: Facts) -> Iterator[FaultExample]:
    for at in facts.repeated_answers[1][:MOST].tolist() if facts.repeated_answers else ():
        row = facts.row_of(at)
        times = int((facts.columns.answer == facts.columns.answer[at]).sum())
        answer = facts.texts.answers[row][at - int(facts.columns.start[row])]
        yield FaultExample("repeated-answers", [(f"answer, {times:,} times", _short(answer))])
    for row, ways in facts.languages.examples[:MOST]:
        best = facts.texts.answers[row][best_answer(facts.columns, row)]
        texts = [(f"prompt ({ways})", _short(facts.texts.prompt[row])), ("answer", _short(best))]
        yield FaultExample("answers-in-another-language", texts)


def _contradictions(facts: Facts) -> Iterator[FaultExample]:
    columns, pairs = facts.columns, facts.pairs
    for up, down in facts.contradicting[:MOST]:
        row = int(pairs.row[up])
        texts = [("prompt", _short(facts.texts.prompt[row]))]
        for pair in (up, down):
            better = int(pairs.one[pair] if pairs.order[pair] > 0 else pairs.other[pair])
            record = int(pairs.row[pair])
            who = columns.annotators[columns.annotator[record]] or "an unnamed annotator"
            answer = facts.texts.answers[record][better - int(columns.start[record])]
            texts.append((f"preferred by {who}", _short(answer)))
        yield FaultExample("contradictions", texts)


def _split(facts: Facts, row: int) -> str:
    number = int(facts.columns.split[row])
    return SPLITS[number] if number >= 0 else "no split"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST // 2] + " [...] " + text[-LONGEST // 2 :]
