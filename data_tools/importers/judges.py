"""Importers of judged answers: AlpacaEval and PandaLM (two answers, by whom the format names), thumbs (KTO)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.importers.demonstrations import THUMBS, has_thumb
from data_tools.published.table import FileHead, any_of, convert_rows, file_format, row_format, rows_have
from data_tools.reading.fields import (
    alpaca_prompt,
    answer,
    elements,
    need,
    number,
    one_of,
    ranking,
    ranks_of_two,
    text,
    text_if_any,
    whole_prompt,
    without_nulls,
)
from data_tools.reading.rows import converted, rows
from data_tools.reading.turns import prompt_turns, turns_of
from data_tools.reading.unread import NestedFields
from rlhf.data.jsonl import Item, OnReject, Reject
from rlhf.data.schema import BadRecord, Demonstration, Message, Ranking, Record, brief

# ---- AlpacaEval ------------------------------------------------------------------------------------------------------


@row_format(
    "alpaca-eval",
    "instruction",
    "output_1",
    "output_2",
    detect=rows_have("instruction", "output_1", "output_2", "preference"),
    left_out=("raw_completion",),
)
def alpaca_eval(row: Any) -> Ranking:
    """AlpacaEval and AlpacaFarm annotations: rows {instruction, output_1, output_2, preference, generator_1, ...}.

    Ranks: `preference` 1 = output_1 is the better, 2 = output_2; 1.5, and 0 in older files, = a tie (alpaca_eval
    metrics/helpers.py). Weighted annotators write 1 + the probability that output_2 is the better: below 1.5 output_1
    wins, above it output_2, with the distance from 1.5 as the weight (1.97 counts 0.94). The annotator saw the outputs
    in a random order that is not kept.

    The prompt is `instruction` and, after a blank line, `input`. `generator_1` and `generator_2` are the authors,
    `annotator` (or `annotator_index`) the annotator. `raw_completion`, the annotator's words, is left out.

    Rejected: no preference (null, or -1: the annotator's answer was not understood), another number, equal or empty
    outputs.
    """
    preference = row.get("preference")
    if preference is None or preference == -1:
        raise BadRecord("preference: none", remedy="The annotator gave none; annotate the row again or leave it out.")
    value = (
        1.5 if preference in (0, 1.5) and not isinstance(preference, bool) else number(preference, "preference", 1, 2)
    )
    annotator = row.get("annotator") if row.get("annotator") is not None else row.get("annotator_index")
    return ranking(
        "alpaca-eval",
        alpaca_prompt(row),
        [text(row, name) for name in ("output_1", "output_2")],
        ranks_of_two(value - 1.5),
        authors=[text_if_any(row, name) for name in ("generator_1", "generator_2")],
        kind="model",
        annotator=str(annotator) if isinstance(annotator, int) else annotator or "",
        weight=1.0 if value == 1.5 else abs(2 * value - 3),
    )


# ---- PandaLM ---------------------------------------------------------------------------------------------------------


@row_format(
    "pandalm",
    "response1",
    "response2",
    detect=any_of(*(rows_have("response1", "response2", judged) for judged in ("annotator1", "annotators"))),
    left_out=("label",),
)
def pandalm(row: Any) -> Iterator[Record | BadRecord]:
    """PandaLM-like pairs judged by several people: {instruction, input, response1, response2, annotator1, ...}.

    Ranks: a judgement of 1 = response1 is the better, 2 = response2, 0 = a tie. Every judgement is a record, by the
    annotator "annotator1", "annotator2", ...; a list `annotators` of judgements, with `prompt` in place of
    `instruction`, is read too. The format does not say the order shown. `cmp_key` or `models` ("opt-7b_llama-7b")
    names the models that wrote the answers. `label`, the majority of the judgements, is left out.

    Rejected, each judgement for itself: another number. A null is no judgement; a pair without any is one reject.
    """
    judged = _judgements(row)
    if not judged:
        raise BadRecord("no judgement", remedy="The pair is unannotated, or is it another format?")
    for annotator, value in judged.items():
        try:
            yield _pandalm_ranking(row, annotator, value)
        except BadRecord as fault:
            yield fault


def _pandalm_ranking(row: dict[str, Any], annotator: str, value: Any) -> Ranking:
    models = text_if_any(row, "models" if "models" in row else "cmp_key").split("_")
    return ranking(
        "pandalm",
        text(row, "prompt") if "prompt" in row else alpaca_prompt(row),
        [text(row, name) for name in ("response1", "response2")],
        ((1, 1), (1, 2), (2, 1))[one_of(value, "annotator", (0, 1, 2))],
        authors=models if len(models) == 2 else None,
        kind="model",
        annotator=annotator,
    )


def _judgements(row: dict[str, Any]) -> dict[str, Any]:
    """Annotator -> judgement, in the annotators' order."""
    if "annotators" in row:
        return {f"annotator{i}": value for i, value in enumerate(elements(row, "annotators"), 1) if value is not None}
    found = (re.fullmatch(r"annotator([0-9]{1,4})", name) for name in row)
    return {match.string: row[match.string] for match in sorted(filter(None, found), key=lambda m: int(m[1]))}


# ---- thumbs ----------------------------------------------------------------------------------------------------------

THUMB_ANSWERS = ("completion", "output", "response", "answer")


def _detect_kto(head: FileHead) -> str | None:
    answers = {*THUMB_ANSWERS, "messages", "conversations"}
    found = bool(head.rows) and all(
        isinstance(row, dict) and has_thumb(row) and len(answers & row.keys()) == 1 for row in head.rows
    )
    return "its rows are one answer each, with a `label` (or `kto_tag`) of true or false" if found else None


@file_format("kto", detect=_detect_kto)
def kto(
    path: Path, reject: OnReject, *, become: Literal["rankings", "demonstrations"] = "rankings"
) -> Iterator[Record]:
    """Thumbs up or down (KTO): rows of one answer with a `label` (or `kto_tag`) of true or false.

    Ranks: of all answers to one prompt, those with a thumbs up 1, those with a thumbs down 2: ties within each. The
    answers to a prompt may be anywhere in the file, so the file is held in memory. The format names neither annotators
    nor authors nor the order shown.

    Read are TRL's {prompt, completion, label}, {messages, label} and {conversations, kto_tag}, where the last turn is
    the answer, and {instruction, input, output, kto_tag} (LLaMA-Factory). The prompt may be in `question`, `query` or
    `instruction` too, after `system` and `history`; the answer in `completion`, `output`, `response` or `answer`.

    Args:
        become: rankings: one for each prompt with thumbs in both directions. demonstrations: each answer with a thumbs
            up is one; those with a thumbs down are rejects.

    Rejected: a prompt whose thumbs all point in one direction, which states no order (each of its rows is a reject),
    the same answer with both thumbs, a label that is not true or false.
    """
    if become == "demonstrations":
        return convert_rows(path, reject, _thumbs_up)
    return _thumb_rankings(path, reject)


def _thumbs_up(row: Any) -> Demonstration:
    prompt, said, up = _thumb(row)
    if not up:
        raise BadRecord("a thumbs down is no demonstration", remedy="Nothing is wrong: only good answers are learned.")
    return Demonstration(prompt, source="kto", answer=said)


def _thumb_rankings(path: Path, reject: OnReject) -> Iterator[Record]:
    fields = NestedFields(reject)
    judged: dict[tuple[Message, ...], list[tuple[Item, tuple[str, bool]]]] = {}
    thumbs = converted(path, reject, rows(path, reject), lambda row: fields.converted(_thumb, without_nulls(row)))
    for item, (prompt, said, up) in thumbs:
        judged.setdefault(prompt, []).append((item, (said, up)))
    for prompt, found in judged.items():
        try:
            answers = list(dict.fromkeys(answer for _, answer in found))
            if len({up for _, up in answers}) == 1:
                remedy = "They state no order; --option become=demonstrations keeps the answers with a thumbs up."
                raise BadRecord("all thumbs for this prompt point in one direction", f"{len(found)}", remedy)
            yield ranking("kto", prompt, [said for said, _ in answers], [1 if up else 2 for _, up in answers])
        except BadRecord as fault:
            for item, _ in found:
                reject(Reject.of(path, item.line, fault, item.raw))


def _thumb(row: Any) -> tuple[tuple[Message, ...], str, bool]:
    """The prompt, the answer, and whether it has a thumbs up."""
    need(row)
    label = next((row[name] for name in THUMBS if name in row), None)
    if not isinstance(label, bool):
        raise BadRecord("label: not true or false", brief(label))
    for name in ("messages", "conversations"):
        if name in row:
            said = turns_of(row[name], name, "user")
            turns = whole_prompt(row, said)
            return tuple(turns[:-1]), answer(turns[-1:], name), label
    name = next((name for name in THUMB_ANSWERS if row.get(name) is not None), "completion")
    need(row, name)
    return tuple(prompt_turns(row)), answer(turns_of(row[name], name, "assistant"), name), label
