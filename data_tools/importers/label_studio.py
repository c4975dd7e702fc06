"""The importer of Label Studio's exports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from data_tools.published.table import any_of, convert_rows, file_format, rows_have
from data_tools.reading.annotation_exports import (
    Names,
    compared,
    ids_of,
    names,
    person,
    prompt_of,
    stem_and_ending,
)
from data_tools.reading.fields import is_list_of
from data_tools.reading.judgements import (
    ITEM_INDEX,
    TIE,
    ChoiceValues,
    choice_meanings,
    item_stars,
    named_answer,
    score,
)
from rlhf.core.errors import UserError
from rlhf.data.jsonl import OnReject, from_dict
from rlhf.data.schema import BadRecord, Record, brief, dense_ranks

LEFT_IN_LIST = "_"
"""The key under which a Ranker with buckets keeps the items that nobody put into a bucket."""

_TASKS = "its rows are tasks with `data` and `annotations`"
_MINIMAL = "its rows have an `annotation_id`, an `annotator` and a `lead_time`, as JSON_MIN has them"


@file_format(
    "label-studio",
    detect=any_of(
        rows_have("data", "annotations", why=_TASKS),
        rows_have("data", "completions", why=_TASKS),
        rows_have("annotation_id", "annotator", "lead_time", why=_MINIMAL),
    ),
)
def label_studio(
    path: Path,
    reject: OnReject,
    *,
    prompt: str | None = None,
    items: str | None = None,
    answers: Names | None = None,
    control: Names | None = None,
    choice_values: ChoiceValues | None = None,
    buckets: Names | None = None,
    within_bucket: Literal["tied", "ranked"] = "tied",
    author: str | None = None,
) -> Iterator[Record]:
    """Label Studio: exports as JSON or JSON_MIN of projects with a Ranker, Pairwise, Choices or Ratings.

    Ranks: a Ranker without buckets lists the ids of the items, best first: ranks 1, 2, ...; Pairwise holds the side
    that was chosen: it gets rank 1, the other 2. Choices of an answer ("Answer 2", "B is better", its own text) or a
    tie ("Both are equal") say it too; other choices, such as reasons, are not read. `choice_values` says what others
    mean: ``Undecided=tie,Upper=answer1``. Ratings, a control an answer (`rating1` or its object `text1` belongs to the
    answer that ends in 1), rank by stars: the higher is the better, equal ones tie, and an answer without stars is no
    part of the ranking. They are the candidates' scores, also with a Pairwise. A side and a tie, two sides, or a side
    with the fewer stars contradict each other: rejected. The candidates are in the order in which the
    annotator first saw them (ids that are whole numbers by size, as the browser sorts them, before all others).

    Ranker with buckets: `buckets` names them, best first; the export does not keep their order. Items of one bucket
    are tied, or ranked in their order under `within_bucket=ranked`. An item that was left in the list was not judged
    and is not part of the ranking, unless `_`, the name of the list, is among the buckets.

    Ratings of the items of a list (a control an item, that ends in the item's id or in its place from 1, or one with
    `perItem`) are the scores of the candidates; without a Ranker they rank them as above. An item with fewer stars than
    one ranked after it is a contradiction: rejected.

    Every annotation of a task is a record. Rejected: a task without any, a cancelled (skipped) annotation, one without
    a ranking, a ranking of ids that the task does not have, or that leaves ids out. JSON_MIN does not hold cancelled
    annotations, and not the tasks of which all were cancelled: export JSON to have them counted. Drafts and predictions
    are not read. `lead_time` becomes the seconds, `created_at` the time, the email or id of `completed_by` the
    annotator.

    Options: the fields of the task's data that hold the `prompt` (text, or messages with role and content), the
    `items` of a Ranker, and the two `answers` of a Pairwise, left then right. Without them the prompt is the field
    called messages, prompt, instruction, question or the like, the items are the one list of objects with ids, and the
    answers the one pair of fields such as answer1 and answer2. `control` names the control that counts where there are
    several, `author` the field of an item that names its model. An item's text is its `text`, `body` or `html`: the
    first that it has; its `title` where it has none of them.
    """
    sides, meanings = names(answers), choice_meanings(choice_values, names(answers))
    if len(sides) == 1:
        raise UserError(f"answers: one field, {sides[0]}", remedy="Name all of them, left to right.")
    ranked_within = within_bucket == "ranked"
    reader = _Reader(prompt, items, sides, names(control), meanings, names(buckets), ranked_within, author)
    return convert_rows(path, reject, reader.read)


@dataclass(frozen=True)
class _Reader:
    """Turns tasks into rankings by the options of the import."""

    prompt: str | None
    items: str | None
    sides: list[str]
    counted: list[str]
    """Controls that count; empty: all."""
    meanings: dict[str, str]
    buckets: list[str]
    ranked_within: bool
    author: str | None
    data: dict[str, Any] = field(default_factory=dict)
    """Of the task that is read."""
    controls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    """Name and value of each control in the annotation that is read."""

    def read(self, row: Any) -> Iterator[Record | BadRecord]:
        if isinstance(row, dict) and isinstance(row.get("data"), dict):
            annotations = row.get("annotations", row.get("completions"))
            if annotations and not isinstance(annotations, list):
                raise BadRecord("annotations: not a list", brief(annotations))
            if not annotations:
                raise _unannotated()
            for annotation in annotations:
                try:
                    yield self._of_annotation(row["data"], annotation)
                except BadRecord as fault:
                    yield fault
        elif isinstance(row, dict) and "annotation_id" in row:
            if row["annotation_id"] is None:
                raise _unannotated()
            found = [(name, result) for name, value in row.items() for result in self._minimal(name, value)]
            yield self._ranking(row, row, row.get("annotator"), found)
        elif isinstance(row, dict) and row and not row.keys() & {"data", "annotations", "completions", "result"}:
            raise _unannotated()  # a task as it was brought into Label Studio: its data alone
        else:
            raise BadRecord("not a task of a Label Studio export", remedy="Export the project as JSON or JSON_MIN.")

    def _minimal(self, name: str, value: Any) -> list[Any]:
        """What a column of JSON_MIN holds; a choice or rating is a bare text or number there, so `control` names it."""
        if name in self.counted and isinstance(value, (str, int, float)):
            return [{"choices": [value]} if isinstance(value, str) else {"rating": value}]
        return _as_list(value)

    def _of_annotation(self, data: dict[str, Any], annotation: Any) -> Record:
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result") or [], list):
            raise BadRecord("an annotation is not an object with a result", brief(annotation))
        if annotation.get("was_cancelled") or annotation.get("skipped"):
            raise BadRecord("the annotation was cancelled", remedy="Nothing is wrong: the annotator skipped the task.")
        by = annotation.get("completed_by")
        by = (by.get("email") or by.get("id")) if isinstance(by, dict) else by
        values = []
        for part in annotation.get("result") or []:
            if isinstance(part, dict):
                value, more = part.get("value"), {key: part.get(key) for key in (_OBJECT, ITEM_INDEX)}
                values.append((part.get("from_name"), dict(value.items()) | more if isinstance(value, dict) else value))
        return self._ranking(data, annotation, by, values)

    def _ranking(self, data: dict[str, Any], facts: dict[str, Any], by: Any, results: list[tuple[Any, Any]]) -> Record:
        """The ranking among the results of one annotation: pairs of a control's name and what it holds."""
        there = [(name, value) for name, value in results if isinstance(value, dict)]
        there = [(name, value) for name, value in there if not self.counted or name in self.counted]
        found = [(name, value) for name, value in there if value.keys() & _RANKING_KEYS]
        if len(found) > 1:
            seen = f"controls {', '.join(brief(name) for name, _ in found)}"
            raise BadRecord("the annotation holds several rankings", seen, "Name one: --option control=NAME")
        one = replace(self, data=data, controls=there)
        if found and "ranker" in found[0][1]:
            made = one._ranked(*found[0])
        else:
            made = one._judged(found[0][1] if found else None) or one._rated()
        if made is None:
            seen = f"controls {', '.join(brief(name) for name, _ in there or results)}" if results else "no result"
            remedy = "It needs a Ranker, Pairwise, Choices (--option choice_values=VALUE=ANSWER,VALUE=tie) or Ratings."
            raise BadRecord("the annotation holds no ranking", seen, remedy)
        answers, ranks, stars = made
        row = {"messages": prompt_of(data, self.prompt), "ranks": dense_ranks(ranks.values())}
        row["candidates"] = [{**answers[name], "score": stars.get(name)} for name in ranks]
        row |= {"time": facts.get("created_at") or facts.get("updated_at"), "seconds": facts.get("lead_time")}
        return from_dict({**row, "annotator": person(by), "shown": True, "source": "label-studio"}, "ranking")

    # ---- Pairwise, Choices and Ratings ----

    def _judged(self, pairwise: dict[str, Any] | None) -> _Judged | None:
        """By what was chosen and by stars; None where nothing was said."""
        texts = [name for name, text in self.data.items() if isinstance(text, str)]
        answers = {name: self.data[name] for name in self.sides or compared(texts) if name in self.data}
        ticked = [choice for _, value in self.controls for choice in _as_list(value.get("choices"))]
        said = {meant for choice in ticked if (meant := named_answer(choice, answers, self.meanings)) is not None}
        if pairwise is not None:
            if len(answers) != 2:
                seen = f"there are {', '.join(map(brief, list(self.data)[:12]))}"
                raise BadRecord("the two answers are not found", seen, "Name them: --option answers=LEFT,RIGHT")
            if pairwise["selected"] in ("left", "right"):
                said.add(list(answers)[pairwise["selected"] == "right"])
            elif not said:
                raise BadRecord(
                    "no side was chosen", brief(pairwise["selected"]), "Nothing was preferred; leave it out."
                )
        if len(said) > 1:
            raise BadRecord("the annotation contradicts itself", f"chosen are {brief(sorted(said))}")
        stars = self._stars(answers)
        shown = {name: {"text": text} for name, text in answers.items()}
        if not said:
            return _by_stars(shown, stars)
        (best,) = said
        if best not in (*answers, TIE):
            remedy = "Correct --option choice_values, or name the answers: --option answers=FIELD,FIELD"
            raise BadRecord("what was chosen is none of the task's answers", brief(best), remedy)
        if len(answers) < 2:
            raise BadRecord("the two answers are not found", brief(best), "Name them: --option answers=LEFT,RIGHT")
        # Equal stars do not deny a side: stars are coarse. More stars for the side that lost do.
        if any(stars[name] > stars.get(best, stars[name]) for name in stars):
            raise BadRecord("the annotation contradicts itself", f"{brief(best)} was chosen with fewer stars")
        return shown, {name: 1 if best in (name, TIE) else 2 for name in answers}, stars

    def _stars(self, answers: dict[str, Any]) -> dict[str, float]:
        """Answer -> its rating; ratings that belong to no answer, such as of the whole task, are not read."""
        stars: dict[str, float] = {}
        for name, value in self.controls:
            number = score(value.get("rating"), "rating")
            ends = [stem_and_ending(text)[1] for text in (name, value.get(_OBJECT)) if isinstance(text, str)]
            owners = [answer for end in ends if end for answer in answers if stem_and_ending(answer)[1] == end]
            if number is None or not owners:
                continue
            if owners[0] in stars:
                remedy = "Name the controls that count: --option control=NAME,NAME"
                raise BadRecord("an answer has several ratings", brief(owners[0]), remedy)
            stars[owners[0]] = number
        return stars

    # ---- Ranker ----

    def _ranked(self, control: Any, value: dict[str, Any]) -> _Judged:
        items = self._items()
        rank: dict[str, int] = {}
        for index, group in enumerate(self._groups(control, value["ranker"], items)):
            for item in group:
                if item not in items:
                    remedy = "The task's data was changed after the annotation, or the ranking is of another field."
                    raise BadRecord("the ranking names an unknown candidate", brief(item), remedy)
                if item in rank:
                    raise BadRecord("the ranking names a candidate twice", brief(item))
                rank[item] = index + 1
        stars = item_stars(list(items), self.controls)
        for before, after in permutations([item for item in stars if item in rank], 2):
            if rank[before] < rank[after] and stars[before] < stars[after]:
                raise BadRecord(
                    "the annotation contradicts itself", f"{brief(before)} is ranked higher, with fewer stars"
                )
        return items, {item: rank[item] for item in items if item in rank}, stars

    def _rated(self) -> _Judged | None:
        """By the stars of a list's items; None where there are none."""
        if not any("rating" in value for _, value in self.controls) or not any(map(_is_item_list, self.data.values())):
            return None
        items = self._items()
        return _by_stars(items, item_stars(list(items), self.controls))

    def _groups(self, control: Any, value: Any, items: dict[str, Any]) -> list[list[str]]:
        """Ids, best first; those of one group are tied."""
        if isinstance(value, dict) and list(value) == [control]:
            value = value[control]
        if isinstance(value, list):
            order = ids_of(value, "ranker")
            if missing := sorted(items.keys() - set(order)):
                raise BadRecord("the ranking leaves candidates out", f"without {brief(missing)}")
            return [[item] for item in order]
        if not isinstance(value, dict):
            raise BadRecord("ranker: not a list of ids or an object of buckets", brief(value))
        filled = {name: ids_of(ids, name) for name, ids in value.items() if ids}
        if unknown := [name for name in filled if name not in (*self.buckets, LEFT_IN_LIST)]:
            remedy = "Name all buckets, best first: --option buckets=BEST,MIDDLE,WORST"
            raise BadRecord("a bucket has no place in the order", brief(unknown), remedy)
        groups = [filled[name] for name in self.buckets if name in filled]
        if not groups:
            raise BadRecord("no candidate was put into a bucket", remedy="Nothing was preferred; leave it out.")
        return [[item] for group in groups for item in group] if self.ranked_within else groups

    def _items(self) -> dict[str, dict[str, Any]]:
        """The candidates by id, in the order shown."""
        lists = {name: value for name, value in self.data.items() if _is_item_list(value)}
        name = self.items or ("items" if "items" in lists else next(iter(lists)) if len(lists) == 1 else None)
        if name not in lists:
            seen = f"lists of objects with ids: {', '.join(map(brief, lists)) or 'none'}"
            raise BadRecord("the candidates are not found", seen, "Name their field: --option items=FIELD")
        items = dict(zip(ids_of([item["id"] for item in lists[name]], name), lists[name]))
        if len(items) < len(lists[name]):
            raise BadRecord("two candidates have one id", name)
        return {id: self._candidate(items[id]) for id in _as_shown(items)}

    def _candidate(self, item: dict[str, Any]) -> dict[str, Any]:
        # An empty body is an empty answer: its title is only a label, such as "Answer 1".
        texts = [item[name] for name in ("text", "body", "html") if item.get(name) is not None] or [item.get("title")]
        author = person(item.get(self.author)) if self.author else ""
        return {"text": next(filter(None, texts), texts[0]), "author": author}


_Judged = tuple[dict[str, dict[str, Any]], dict[str, float], dict[str, float]]
"""Name of each answer -> text and author; of those that were judged, in the order shown -> rank; of some -> stars."""


def _by_stars(answers: dict[str, dict[str, Any]], stars: dict[str, float]) -> _Judged | None:
    """The answers that have stars, the most first; None where none has."""
    return (answers, {name: -stars[name] for name in answers if name in stars}, stars) if stars else None


_RANKING_KEYS = {"ranker", "selected"}
_OBJECT = "to_name"
"""Key under which a control's value carries the object tag that it is about."""


def _unannotated() -> BadRecord:
    remedy = "Nobody has annotated it yet; from a project with annotations export JSON or JSON_MIN."
    return BadRecord("the task has no annotation", remedy=remedy)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_item_list(value: Any) -> bool:
    return bool(value) and is_list_of(dict, value) and all("id" in item for item in value)


def _as_shown(items: dict[str, Any]) -> list[str]:
    """Ids in the order of a JavaScript object's keys, in which the editor lists them: whole numbers by size, then the
    others as they came."""
    numbers = {
        item for item in items if len(item) <= 10 and item.isascii() and item.isdigit() and str(int(item)) == item
    }
    return sorted(numbers, key=int) + [item for item in items if item not in numbers]
