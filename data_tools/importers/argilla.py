"""The importer of Argilla's exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.published.table import FileHead, file_format
from data_tools.reading.annotation_exports import (
    Names,
    as_raw,
    compared,
    names,
    prompt_of,
    stem_and_ending,
)
from data_tools.reading.argilla_records import Response, fields_of, is_column, records_of, responses_of
from data_tools.reading.fields import is_list_of, is_number
from data_tools.reading.judgements import TIE, ChoiceValues, choice_meanings, means_tie, named_answer
from data_tools.reading.rows import converted, rows
from data_tools.reading.unread import NestedFields, role_of
from rlhf.data.jsonl import OnReject, Reject, from_dict
from rlhf.data.schema import BadRecord, Record, brief, dense_ranks


def _detect(head: FileHead) -> str | None:
    rows = [row for row in head.rows if isinstance(row, dict)]
    if not rows or len(rows) < len(head.rows):
        return None
    if all(any(name.endswith(".responses.users") for name in row) for row in rows):
        return "its records have parallel lists such as `QUESTION.responses` and `QUESTION.responses.users`"
    if head.all_have("fields", "responses"):
        return "its records have `fields` and `responses`"
    if all(any(is_column(value) for value in row.values()) for row in rows):
        return "its records have questions with a `user_id`, a `value` and a `status` each"
    return None


@file_format("argilla", detect=_detect)
def argilla(
    path: Path,
    reject: OnReject,
    *,
    question: Names | None = None,
    prompt: str | None = None,
    answers: str | list[str] | dict[str, str] | None = None,
    choice_values: ChoiceValues | None = None,
    without_status: bool = False,
) -> Iterator[Record]:
    """Argilla: records of 2.x (to_list, to_dict, to_json, the Hub) and 1.x with ranking, rating or label questions.

    Ranks: a ranking response lists the names of its options, best first: ranks 1, 2, ...; where the items are
    {value, rank}, 1 is the best rank and equal ranks are ties (without any rank, the order counts). Of ratings the
    higher is the better: each answer's rating becomes its score, and the ranks follow. An answer that a person did not
    rate is no part of that person's ranking. An option of a ranking question that means a tie (``tie``, ``both are
    equal``, or by `choice_values`) and is ranked first says that the answers tie; ranked last it says that they do not,
    and so it does between two answers. The label of a question "which is better" names the answer that gets rank
    1, the others share 2: by the field's name, its letter or number ("Response 2"), or the answer's own text; ``tie``,
    ``equal``, ``both bad`` and the like are a tie. A rating question counts as such (1 = the first answer) only where
    `question` names it and `answers` its answers. `choice_values` says what other values mean:
    ``good=response_1,unsure=tie``. A value that means neither an answer nor a tie is rejected.

    Read are flat records (``QUESTION.responses`` with parallel lists of users and status), nested ones (`fields` and
    `responses` by question, or by person as the server and 1.x have them), 1.x columns of {user_id, value, status}, and
    the one object that to_dict gives, which is held in memory; its rejects show the one record that they are about.

    Each response is a record. Only submitted ones count: draft and discarded ones are rejected, and so are those
    without a status, which the nested export (to_json) leaves out: export with `to_list(flatten=True)` or to the Hub,
    or take them as they are by `without_status=true`. A record without a response is one reject.

    A turn of a chat field with a field that could matter and is not read, such as images, is rejected.

    Options: `question` names the ranking question, or the rating questions, one an answer; `prompt` and `answers` the
    fields. `answers` may be a mapping OPTION=FIELD,... where the options are not called like the fields; without it, an
    option or rating question belongs to the field of its name, or to the one that ends in the same number. The
    candidates are in the order of `answers`, which is taken for the order shown, else in the record's order.
    """
    mapping = answers if isinstance(answers, dict) else _mapping(names(answers))
    meanings = choice_meanings(choice_values, list(mapping.values()))
    reader = _Reader(names(question), prompt, mapping, meanings, without_status, NestedFields(reject))
    for item, records in converted(path, reject, rows(path, reject), records_of):
        for record in records:
            for made in reader.read(record):
                if isinstance(made, BadRecord):
                    reject(Reject.of(path, item.line, made, item.raw if len(records) == 1 else as_raw(record)))
                else:
                    yield made


def _mapping(parts: list[str]) -> dict[str, str]:
    pairs = (part.partition("=") for part in parts)
    return {option.strip(): (name if equals else option).strip() for option, equals, name in pairs}


@dataclass(frozen=True)
class _Reader:
    """Turns records into rankings by the options of the import."""

    questions: list[str]
    prompt: str | None
    answers: Mapping[str, str]
    meanings: Mapping[str, str]
    without_status: bool
    nested: NestedFields
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the record that is read."""

    def read(self, record: Mapping[str, Any]) -> Iterator[Record | BadRecord]:
        """A record or a fault for each response, or one fault for the record."""
        try:
            yield from replace(self, fields=fields_of(record))._of_record(record)
        except BadRecord as fault:
            yield fault

    def _of_record(self, record: Mapping[str, Any]) -> Iterator[Record | BadRecord]:
        responses = list(responses_of(record))
        if not responses:
            raise BadRecord("the record has no response", remedy="Nothing is wrong: nobody has annotated it yet.")
        yield from (_not_submitted(response.status) for response in responses if not response.question)  # all is empty
        responses = [response for response in responses if response.question]
        if not responses:
            return
        asked = self.questions or self._find_questions(responses)
        by_person: dict[str, list[Response]] = {}
        for response in responses:
            if response.question in asked:
                by_person.setdefault(response.user, []).append(response)
        if not by_person:
            raise BadRecord("the record has no response to the question", f"to {brief(asked)}")
        for given in by_person.values():
            for part in [given] if len(asked) > 1 else [[response] for response in given]:
                try:
                    yield self._ranking(part)
                except BadRecord as fault:
                    yield fault

    def _find_questions(self, responses: list[Response]) -> list[str]:
        rankings = {r.question for r in responses if _is_ranking(r.value) and self._all_found(r.value)}
        if len(rankings) == 1:
            return list(rankings)
        if rankings:
            seen = brief(sorted(rankings))
            raise BadRecord("several ranking questions", seen, "Name one: --option question=NAME")
        ratings = {r.question for r in responses if is_number(r.value) and self._field(r.question)}
        if len({self._field(question) for question in ratings}) == len(ratings) > 1:
            return sorted(ratings)
        chosen = {r.question for r in responses if self._chooses(r)}
        if len(chosen) == 1:
            return list(chosen)
        remedy = "Name the question (or the rating questions) and the answers: --option question=NAME"
        seen = f"questions {brief(sorted({r.question for r in responses}))}"
        raise BadRecord("no question ranks or rates the record's answers", seen, remedy)

    def _ranking(self, given: list[Response]) -> Record:
        for response in given:
            if response.status != "submitted" and not (self.without_status and response.status is None):
                raise _not_submitted(response.status)
        scores: dict[str, float] = {}
        if len(given) == 1 and _is_ranking(given[0].value):
            by_option = self._without_tie(_order(given[0].value))
        elif len(given) == 1 and not self._field(given[0].question):
            by_option = self._choice(given[0].value)
        else:
            by_option = {response.question: -_rating(response.value) for response in given}
            if len(by_option) < len(given):
                raise BadRecord("one person answers a question twice", brief(list(by_option)))
            scores = {self._known(question): -value for question, value in by_option.items()}
        by_field = {self._known(option): value for option, value in by_option.items()}
        if len(by_field) < len(by_option):
            raise BadRecord("two options of the question are one answer", brief(list(by_option)))
        order = [name for name in (self.answers.values() or self.fields) if name in by_field]
        if self.answers and not scores and len(order) < len(self.answers):
            raise BadRecord("the ranking leaves answers out", brief(sorted(set(self.answers.values()) - set(order))))
        candidates = [{"text": self.fields[name], "score": scores.get(name)} for name in order]
        others = {name: value for name, value in self.fields.items() if name not in by_field}
        row = {"messages": self._asked(others), "candidates": candidates}
        row |= {"ranks": dense_ranks(by_field[name] for name in order), "annotator": given[0].user}
        row |= {"time": given[0].time, "shown": bool(self.answers), "source": "argilla"}
        return from_dict(row, "ranking")

    def _asked(self, fields: Mapping[str, Any]) -> Any:
        """The prompt.

        Raises:
            BadRecord: As `prompt_of`, or a turn of its chat has a field that could matter and is not read.
        """
        asked = prompt_of(fields, self.prompt)
        for name, turns in fields.items():
            if isinstance(asked, list) and isinstance(turns, list) and turns and turns[-1] is asked[-1]:
                self.nested.converted(_said, {name: turns})
        return asked

    # ---- questions "which is better" ----

    def _compared(self) -> dict[str, Any]:
        """The answers between which a question chooses: those of the options, else the one group of fields."""
        texts = [name for name, value in self.fields.items() if isinstance(value, str)]
        among = self.answers.values() or compared(texts)
        return {name: self.fields[name] for name in among if name in self.fields}

    def _named(self, value: Any, answers: Mapping[str, Any]) -> str | None:
        if isinstance(value, str) and value in self.answers:
            return self.answers[value]
        return named_answer(value, answers, self.meanings)

    def _chooses(self, response: Response) -> bool:
        """Whether a response chooses between the answers, where no option names the question."""
        named = self._named(response.value, self._compared()) if isinstance(response.value, str) else None
        return named is not None and (named != TIE or role_of(response.question) == "judgement")

    def _choice(self, value: Any) -> dict[str, float]:
        """Rank of each answer, by the value of a question that names the best or says that there is none."""
        answers = self._compared()
        if len(answers) < 2:
            seen = f"{brief(value)}; fields {', '.join(map(brief, list(self.fields)[:12]))}"
            raise BadRecord("which answers does the question compare?", seen, "Name them: --option answers=FIELD,FIELD")
        best = None if is_number(value) and not self.answers else self._named(value, answers)
        if best is None or best not in (*answers, TIE):
            remedy = "Say what it means: --option choice_values=VALUE=FIELD,VALUE=tie"
            raise BadRecord("the response names none of the answers and no tie", brief(value), remedy)
        return {name: 1 if best in (name, TIE) else 2 for name in answers}

    def _without_tie(self, order: dict[str, float]) -> dict[str, float]:
        """The ranks of the answers alone, where an option of the ranking question means a tie."""
        ties = [rank for option, rank in order.items() if self._means_tie(option)]
        if not ties:
            return order
        (tie, *more), rest = ties, {name: rank for name, rank in order.items() if not self._means_tie(name)}
        if not rest:
            return dict.fromkeys(self._compared(), 1.0)
        if not more and all(tie < rank for rank in rest.values()):
            return dict.fromkeys(rest, 1.0)
        if not more and (all(tie > rank for rank in rest.values()) or (len(rest) == 2 and tie not in rest.values())):
            return rest
        if len({tie, *more, *rest.values()}) == 1:
            return rest
        remedy = "It means something first or last, and between two answers; leave the row out."
        raise BadRecord("the option that means a tie is ranked among the answers", brief(order), remedy)

    def _means_tie(self, option: Any) -> bool:
        """Whether an option is no answer and means a tie."""
        if not isinstance(option, str) or self._field(option):
            return False
        return self.meanings.get(option.strip().lower()) == TIE or means_tie(option)

    # ---- options and fields ----

    def _all_found(self, value: Any) -> bool:
        return all(self._field(option) or self._means_tie(option) for option in _options(value))

    def _known(self, option: Any) -> str:
        name = self._field(option)
        if name is None:
            remedy = "Say which option is which field: --option answers=OPTION=FIELD,OPTION=FIELD"
            seen = f"{brief(option)}; fields {', '.join(map(brief, list(self.fields)[:12]))}"
            raise BadRecord("an option is none of the record's answers", seen, remedy)
        return name

    def _field(self, option: Any) -> str | None:
        """The field of an option or rating question: by the mapping, by its name, or by the number it ends in."""
        if not isinstance(option, str):
            return None
        if option in self.answers:
            return self.answers[option] if self.answers[option] in self.fields else None
        among = [name for name in (self.answers.values() or self.fields) if name in self.fields]
        if option in among:
            return option
        ending = stem_and_ending(option)[1]
        same = [name for name in among if ending.isdigit() and stem_and_ending(name)[1] == ending]
        return same[0] if len(same) == 1 else None


def _said(row: Mapping[str, Any]) -> list[Any]:
    """What the record of a chat field reads of its turns."""
    turns = (turn for turns in row.values() for turn in turns if isinstance(turn, dict))
    return [(turn.get("role"), turn.get("content"), turn.get("tool_calls")) for turn in turns]


# ---- the values of a response ----------------------------------------------------------------------------------------


def _not_submitted(status: Any) -> BadRecord:
    if status is None:
        remedy = "Export with to_list(flatten=True) or to the Hub, or take it as it is: --option without_status=true"
        return BadRecord("the response has no status", remedy=remedy)
    known = status if status in ("draft", "discarded") else "not submitted"
    return BadRecord(f"the response is {known}", brief(status), "Nothing is wrong: only submitted ones count.")


def _rating(value: Any) -> float:
    if not is_number(value):
        raise BadRecord("the response is neither a ranking nor a rating", brief(value))
    return value


def _is_ranking(value: Any) -> bool:
    options = _options(value)
    return bool(options) and is_list_of(str, options)


def _options(value: Any) -> list[Any]:
    """The options that a ranking response names, in its order; none where it is no such response."""
    if isinstance(value, dict):
        return value["value"] if isinstance(value.get("value"), list) else []
    if not isinstance(value, list):
        return []
    return [item.get("value") if isinstance(item, dict) else item for item in value]


def _order(value: Any) -> dict[str, float]:
    """Rank of each option, smaller = better."""
    options = _options(value)
    if isinstance(value, dict):
        ranks = value.get("rank")
    else:
        ranks = [item.get("rank") if isinstance(item, dict) else None for item in value]
    if ranks is None or (isinstance(ranks, list) and all(rank is None for rank in ranks)):
        ranks = list(range(len(options)))
    if not isinstance(ranks, list) or len(ranks) != len(options) or not all(map(is_number, ranks)):
        raise BadRecord("some options have no rank", brief(value))
    if len(set(options)) < len(options):
        raise BadRecord("the ranking names an option twice", brief(options))
    return dict(zip(options, ranks))
