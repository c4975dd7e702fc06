"""Potato, an annotation tool whose exports name the items but do not hold their texts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.published.table import any_of, row_format, rows_have
from data_tools.reading.annotation_exports import person
from data_tools.reading.fields import elements, need, ranking
from data_tools.reading.rows import rows
from data_tools.reading.turns import prompt_turns, turns_of
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord, Record, brief, dense_ranks

STATE = "instance_id_to_label_to_value"
LABELS = ("labels", "label_annotations")
JUDGEMENTS = ("selection", "scale_value", "rank_order", "best")
"""What the answer to a question of type pairwise, pairwise on a scale, ranking and bws is called."""


_POTATO_LEFT_OUT = ("displayed_text", "phase_to_page_to_label_to_value", "training_instance_id_to_label_to_value")


@row_format(
    "potato",
    detect=any_of(rows_have("user_id", STATE), *(rows_have("instance_id", "user_id", name) for name in LABELS)),
    left_out=_POTATO_LEFT_OUT,
)
def potato(
    row: Any,
    *,
    items: str | None = None,
    item_id: str = "id",
    prompt: str | None = None,
    answers: str = "responses",
    question: str | None = None,
) -> Iterator[Record | BadRecord]:
    """Potato: annotations.jsonl of `potato.export`, or a user_state.json, with judgements by question and item.

    Ranks: of a pairwise question, `selection` A or B is the better and tie a tie, and on its scale a negative
    `scale_value` prefers A, a positive one B, and 0 is a tie. `rank_order` "B,D=A,C" lists the best first, with ``=``
    between ties. `best` and `worst` are ranks 1 and 3, and 2 for the others. A is the first of the answers, B the
    second, which is the order shown. `user_id` is the annotator.

    Potato's files hold no texts: name the project's data file with `items`. Rows into which its fields were merged
    need none. `displayed_text`, which is HTML, and answers of surveys and training phases are left out.

    Args:
        items: The data file of the project, JSON lines or an array, held in memory.
        item_id: The field of the data file that `instance_id` refers to, as `id_key` in the project's config.
        prompt: The item's field with the prompt; without it, the one of messages, conversation, prompt, instruction,
            question, ... that is there, after `system` and `history`.
        answers: The item's field with the list of answers, as `items_key` in the project's config; an item with `left`
            and `right` needs none.
        question: The question whose judgements count, where an item has several.

    Rejected, each judgement for itself: an item that is not in the data file, an item without a judgement, several
    questions and no option, a label that names no answer, fewer than two distinct answers.
    """
    for instance, labels in _judged(row):
        try:
            item = _items(items, item_id).get(str(instance)) if items else row
            if item is None:
                raise BadRecord("instance_id: not in the data file", brief(instance), "Check --option item_id=FIELD.")
            texts = _answers(item, answers, items)
            ranks = _ranks(_judgement(labels, question), texts)
            asked = turns_of(need(item, prompt)[prompt], prompt, "user") if prompt else prompt_turns(item)
            if not asked:
                raise BadRecord("no prompt is found", brief(list(item)), "Name its field: --option prompt=FIELD")
            yield ranking("potato", asked, texts, ranks, annotator=person(row.get("user_id")), shown=True)
        except BadRecord as fault:
            yield fault


def _judged(row: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Each instance of the row, with its labels by question."""
    need(row)
    if isinstance(row.get(STATE), dict) and row[STATE]:
        return [(instance, _by_question(labels)) for instance, labels in row[STATE].items()]
    name = next((name for name in LABELS if row.get(name)), None)
    if name is None:
        raise BadRecord("no judgement", remedy="Nothing is wrong if nobody has judged the item yet.")
    return [(need(row, "instance_id")["instance_id"], _by_question(row[name]))]


def _by_question(labels: Any) -> dict[str, Any]:
    """Question -> its labels, from that form or from a list of [{schema, name}, value]."""
    if isinstance(labels, dict):
        return labels
    found: dict[str, Any] = {}
    for entry in labels if isinstance(labels, list) else ():
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], dict):
            found.setdefault(str(entry[0].get("schema", "")), {})[str(entry[0].get("name", ""))] = entry[1]
    return found


@lru_cache(2)
def _items(path: str, item_id: str) -> dict[str, dict[str, Any]]:
    """Id -> item of the project's data file."""

    def refuse(reject: Any) -> None:
        raise UserError(f"--option items: {reject}", remedy="Mend the row in the data file.")

    found = {str(need(item.value, item_id)[item_id]): item.value for item in rows(Path(path), refuse)}
    if not found:
        raise UserError(f"--option items={path}: holds no item")
    return found


def _answers(item: dict[str, Any], field: str, items: str | None) -> list[str]:
    if field not in item and {"left", "right"} <= item.keys():
        return [item["left"], item["right"]]
    if field not in item:
        remedy = "Name the field with --option answers=FIELD"
        remedy += "." if items else ", and the project's data file with --option items=FILE."
        raise BadRecord(f"no field {field!r} with the answers", f"there are {brief(list(item))}", remedy)
    return elements(item, field)


def _judgement(labels: dict[str, Any], question: str | None) -> dict[str, Any]:
    """The labels of the question that counts."""
    if question is not None:
        if not isinstance(labels.get(question), dict):
            raise BadRecord(f"no judgement of the question {question!r}", f"there are {brief(list(labels))}")
        return labels[question]
    found = [name for name, value in labels.items() if isinstance(value, dict) and value.keys() & set(JUDGEMENTS)]
    if len(found) > 1:
        raise BadRecord("several questions", brief(found), f"Name one: --option question={found[0]}")
    if not found:
        remedy = "Read are the types pairwise, ranking and bws; import others by the csv mapping."
        raise BadRecord("no judgement", f"labels {brief(labels)}", remedy)
    return labels[found[0]]


def _ranks(judgement: dict[str, Any], texts: list[str]) -> tuple[int, ...]:
    """The ranks of the answers."""
    said = {name: str(judgement[name]).strip() for name in (*JUDGEMENTS, "worst") if judgement.get(name) is not None}
    numbers = [0.0] * len(texts)
    if "selection" in said:
        if said["selection"].lower() != "tie":
            numbers[_index(said["selection"], texts)] = -1.0
    elif "scale_value" in said:
        try:
            numbers[0] = float(said["scale_value"])
        except ValueError:
            raise BadRecord("scale_value: not a number", brief(said["scale_value"])) from None
        if not (len(texts) == 2 and abs(numbers[0]) < float("inf")):
            raise BadRecord("scale_value: not a finite number for two answers", brief(said["scale_value"]))
    elif "rank_order" in said:
        places = [[_index(name, texts) for name in tied.split("=")] for tied in said["rank_order"].split(",")]
        if sorted(index for tied in places for index in tied) != list(range(len(texts))):
            raise BadRecord("rank_order: not every answer once", brief(said["rank_order"]))
        for place, tied in enumerate(places):
            for index in tied:
                numbers[index] = float(place)
    elif said.keys() >= {"best", "worst"}:
        best, worst = _index(said["best"], texts), _index(said["worst"], texts)
        if best == worst:
            raise BadRecord("best and worst: the same answer", said["best"])
        numbers[best], numbers[worst] = -1.0, 1.0
    else:
        raise BadRecord("no judgement", brief(judgement))
    return dense_ranks(numbers)


def _index(label: str, texts: list[str]) -> int:
    """The answer that a label means: its letter, or its text."""
    label = label.strip()
    if len(label) == 1 and 0 <= (index := ord(label.upper()) - ord("A")) < len(texts):
        return index
    if texts.count(label) == 1:
        return texts.index(label)
    raise BadRecord("a label that names no answer", brief(label), "Labels are A, B, ... in the order of the answers.")
