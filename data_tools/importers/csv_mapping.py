"""The importer of rows of any container through a mapping of columns: CSV, TSV, JSON, Parquet, Arrow, Excel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

from data_tools.published.arena import is_competition_table
from data_tools.published.table import FileHead, file_format
from data_tools.reading.annotation_exports import Names, names
from data_tools.reading.cells import EXCEL, TABLES, Cells, cell_columns, cell_rows
from data_tools.reading.csv_rows import CSV
from data_tools.reading.fields import whole_prompt, without_nulls
from data_tools.reading.judgements import ranks_with_scores
from data_tools.reading.judgements import score as given_score
from data_tools.reading.route import Columns, route
from data_tools.reading.rows import converted
from data_tools.reading.table_judges import BOXES, TableJudge, judge_of
from data_tools.reading.turns import exchange, from_json_text, is_chat, is_conversation
from data_tools.reading.unread import SYSTEM_FIELDS, NestedFields, role_of, says_something
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.data.jsonl import OnReject, from_dict
from rlhf.data.schema import BadRecord, Message, Record, brief, dense_ranks


def _detect(head: FileHead) -> str | None:
    if str(head.path).endswith(EXCEL):
        return "it is a workbook"
    if not str(head.path).endswith(CSV) or head.text.lstrip().startswith(("[", "{")) or is_competition_table(head.text):
        return None
    return f"it is a table that begins with {head.text.strip()[:60]!r}"


@file_format("csv", suffixes=TABLES, detect=_detect)
def csv_table(
    path: Path,
    reject: OnReject,
    *,
    prompt: str | None = None,
    prompt_template: str | None = None,
    system: str | None = None,
    history: str | None = None,
    answers: Names | None = None,
    answer: str | None = None,
    ranks: Names | None = None,
    rank_order: Literal["lowest-best", "highest-best"] = "lowest-best",
    choice: str | None = None,
    choice_values: str | dict[str | int, str] | None = None,
    worst: str | None = None,
    scores: Names | None = None,
    ranking: str | None = None,
    best_first: bool = False,
    shown: bool = False,
    authors: Names | None = None,
    annotator: str | None = None,
    time: str | None = None,
    time_format: str | None = None,
    seconds: str | None = None,
    source: str | None = None,
    group: str | None = None,
    status: str | None = None,
    accepted: Names = "approved,submitted,accepted",
    json_cells: bool = True,
    delimiter: str | None = None,
    encoding: str = "utf-8",
    sheet: str | None = None,
) -> Iterator[Record]:
    """Any table with a row an annotation (MTurk, Surge, Scale), its columns named by options: CSV, JSON, Excel.

    Read are CSV and TSV, JSON lines and arrays, Parquet, Arrow (a folder of `save_to_disk`), and .xlsx (a `sheet` of
    it; needs openpyxl). Where rows are nested, a dotted path is a column: ``info.title``, ``answers.0.text``. A null
    and a field that a row lacks are empty.

    Ranks: one of four options says where they are.
    - `ranks`: a column for each of `answers`, in their order, with its number; `rank_order` says whether the lowest
      number is the best (1 = best) or the highest (ratings, which stay as the candidates' scores). Equal numbers are
      ties. Boxes (true and false, yes and no, x and empty) rank ticked answers 1, the others 2; no tick is no answer.
    - `choice`: a column that says which answer is the best; the others share rank 2. It holds the name of the answer's
      column, its letter (A = the first), its own text or a tie (``tie``, ``both are equal``, ``both bad``), unless
      `choice_values` says what its values mean: ``left=answer_1,right=answer_2,same=tie``. Numbers need such a
      mapping, since some tools count from 0. `worst` may name a second column, of the worst answer: rank 3.
    - `ranking`: a column that lists the answers, best first, by letter, number from 1, or column: ``B,A,C`` or
      ``2>1=3``, where = is a tie.
    - `best_first=true`: `answers` are named best first, such as chosen,rejected.
    `scores`, a column for each answer (higher = better), stay with the candidates: two answers of equal score are a
    tie, and a row whose loser has the higher score is rejected.
    With none of them, `answers` become proposals, which wait for a ranking; `answer`, one column, gives
    demonstrations by `annotator`; with neither `answers` nor `answer` a row is a prompt. Where no option names any of
    them, the columns answer_1, answer_2, ... and rank_1, rank_2, ... count, or `answer`, or `chosen` and `rejected`;
    a table with other columns that could be answers, judgements, a system turn or media is then refused, and the
    message types out the options for it. Such columns that a given mapping leaves out are named in a warning.

    The prompt is the column `prompt`, or is made by `prompt_template` from several: each {COLUMN} in it is replaced by
    the row's text, and by nothing else. `system` is the column of a system turn, `history`
    that of earlier turns, a list of [user, assistant]. Prompts and answers may be turns: text
    in which ``Human:`` and ``Assistant:`` mark them, lists of {role, content}, or JSON text of such lists
    (`json_cells=false` keeps JSON as text); a turn with a field that could matter and is not read, such as images, is
    rejected. A list of texts is what the user asked in turn, and then each answer lists
    the replies. Answers that are whole conversations must share all but their last turn, which is the answer; the rest
    is the prompt. An empty answer that nothing ranks is left out: a row may have fewer answers.
    `shown` says that the answers are in the order in which annotators saw them, `authors` names a column for each
    answer with its model. `seconds` are what the annotation took; `time` is ISO 8601, a date as mail and MTurk write
    it (Mon Feb 03 10:11:12 PST 2020; of zones by name only UTC and those of the USA are known), or as `time_format`
    says in the signs of strptime. Rows whose `status` is not among `accepted` are rejected, as is a time that cannot be
    read: leave `time` out where it does not matter.

    A missing column stops the import before anything is written. Label Studio's CSV flattens its controls to columns
    of JSON: export JSON from there and import `label-studio`. Values of several columns may be lists in YAML.
    """
    container: dict[str, Any] = {"delimiter": delimiter, "encoding": encoding, "sheet": sheet}
    there = cell_columns(path, **container)
    named, ranked, scored = names(answers), names(ranks), names(scores)
    guessed = not (named or answer or ranked or choice or ranking)
    if guessed:
        named, ranked = _numbered(there, "answer"), _numbered(there, "rank")
        if not named and "answer" in there:
            answer = "answer"
        elif not named and {"chosen", "rejected"} <= there.keys():
            named, best_first = ["chosen", "rejected"], True
            scored = scored or [name for name in ("score_chosen", "score_rejected") if name in there]
        system = system or next((name for name in SYSTEM_FIELDS if name in there), None)
    before = {"system": system, "history": history}
    facts = {"annotator": annotator, "time": time, "seconds": seconds, "source": source, "group": group}
    highest = rank_order == "highest-best"
    table = _Table(
        prompt=_template(prompt, prompt_template, named, there),
        before={name: column for name, column in before.items() if column},
        answers=named,
        answer=answer,
        judge=judge_of(named, ranked, highest, choice, choice_values, worst, ranking, best_first),
        authors=names(authors),
        facts={name: column for name, column in facts.items() if column},
        time_format=time_format,
        shown=shown,
        scores=scored or (ranked if highest else []),
        status=status,
        accepted={value.lower() for value in names(accepted)},
        json_cells=json_cells,
        nested=NestedFields(reject),
    )
    _check_unread(path, there, table.columns, guessed and prompt is None and prompt_template is None)
    found = converted(path, reject, cell_rows(path, reject, table.columns, **container), table.record)
    return (record for _, record in found)


def _check_unread(path: Path, there: Columns, read: list[str], guessed: bool) -> None:
    """Refuse or warn of columns that could matter and are not read.

    Raises:
        UserError: There are such columns, or none is the prompt, and the user named none (`guessed`).
    """
    tops = {name.split(".")[0] for name in read} | set(read)
    unread = [name for name in there if name not in tops and (role := role_of(name)) and _filled(there[name], role)]
    if guessed and there and not tops <= there.keys():
        missing = next(name for name in read if name not in there)
        remedy = f"Name the columns: {route(path, there)}"
        raise UserError(f"{path}: no column is called {missing!r}, and no option names another", remedy=remedy)
    if not unread:
        return
    listed = ", ".join(f"{name!r} ({role_of(name)})" for name in unread[:12])
    if guessed:
        why = "By their names they could hold what matters."
        raise UserError(f"{path}: columns that would not be read: {listed}", why, f"Name them: {route(path, there)}")
    console.warn(f"{path}: columns that are not read: {listed}")


def _filled(values: list[Any], role: str) -> bool:
    return not values or any(says_something(value, role) for value in values)


PROMPT = "prompt"
"""What messages call the prompt, which may be made of several columns."""


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Turns rows into records by the options of the import."""

    prompt: list[str]
    """Text and columns by turns, text first; empty where the answers hold the prompt."""
    before: dict[str, str]
    """`system` and `history` -> their columns."""
    answers: list[str]
    answer: str | None
    judge: TableJudge | None
    authors: list[str]
    scores: list[str]
    facts: dict[str, str]
    """Field of a record -> its column."""
    time_format: str | None
    shown: bool
    status: str | None
    accepted: set[str]
    json_cells: bool
    nested: NestedFields

    def __post_init__(self) -> None:
        if self.answers and self.answer:
            raise UserError(
                "answer and answers: a row is a demonstration or a ranking", remedy="Leave one of them out."
            )
        for option, columns in (("authors", self.authors), ("scores", self.scores)):
            if columns and len(columns) != len(self.answers):
                raise UserError(f"{option}: {len(columns)} columns for {len(self.answers)} answers")
        if self.time_format and "time" not in self.facts:
            raise UserError("time_format: of which column?", remedy="Name it: --option time=COLUMN")

    @property
    def columns(self) -> list[str]:
        """Every column that is read, each once."""
        judged = self.judge.columns if self.judge else []
        single = [name for name in (*self.before.values(), self.answer, self.status) if name]
        return list(
            dict.fromkeys(
                [*self.prompt[1::2], *self.answers, *judged, *self.authors, *self.scores, *self.facts.values(), *single]
            )
        )

    def record(self, row: Cells) -> Record:
        """The record of a row."""
        if self.status and row[self.status].strip().lower() not in self.accepted:
            remedy = f"Only {', '.join(sorted(self.accepted))} count; --option accepted=VALUE,VALUE names others."
            raise BadRecord("status: not accepted", brief(row[self.status]), remedy)
        fields: dict[str, Any] = {name: row[column].strip() or None for name, column in self.facts.items()}
        if fields.get("time"):
            fields["time"] = _when(fields["time"], self.time_format)
        if fields.get("seconds"):
            fields["seconds"] = given_score(fields["seconds"], "seconds")
        names = [self.answer] if self.answer else self.answers
        cells = {name: self._cell(row, name) for name in names} | {PROMPT: self._prompt(row)}

        def read(cells: dict[str, Any]) -> tuple[list[Message], dict[str, str]]:
            return exchange(cells[PROMPT], {name: cells[name] for name in names}, self.json_cells)

        asked, said = self.nested.converted(read, {name: self._turns(cell) for name, cell in cells.items()})
        if not asked:
            raise BadRecord("the prompt is empty", brief(self._prompt(row)))
        before = {name: self._cell(row, column) for name, column in self.before.items()}
        before["history"] = from_json_text(before.get("history"))
        fields["messages"] = whole_prompt(before, asked)
        if self.answer:
            answer = said.get(self.answer, "")
            return from_dict({**fields, "answer": answer, "author": fields.get("annotator")}, "demonstration")
        return self._judged(row, fields, said) if self.answers else from_dict(fields, "prompt")

    def _judged(self, row: Cells, fields: dict[str, Any], said: dict[str, str]) -> Record:
        """The ranking of a row's answers, or their proposal where nothing judges them.

        Args:
            fields: The other fields of the record.
            said: Column -> text of each answer that says something.
        """
        there = list(said)
        author = dict(zip(self.answers, self.authors))
        scores = {
            name: None if row[column].strip().lower() in BOXES else given_score(row[column], column)
            for name, column in zip(self.answers, self.scores)
        }
        candidates = [
            {"text": said[name], "author": row[author[name]].strip() if author else "", "score": scores.get(name)}
            for name in there
        ]
        fields |= {"candidates": candidates, "shown": self.shown}
        if self.judge is None:
            return from_dict(fields, "proposal")
        numbers = self.judge.ranks(row, there)
        if empty := [name for name in numbers if name not in there]:
            raise BadRecord("an answer that is ranked is empty", brief(empty))
        if missing := [name for name in there if name not in numbers]:
            raise BadRecord("an answer has no rank", brief(missing))
        ranks = ranks_with_scores(dense_ranks(numbers[name] for name in there), [scores.get(n) for n in there], there)
        return from_dict({**fields, "ranks": ranks}, "ranking")

    def _prompt(self, row: Cells) -> Any:
        if len(self.prompt) == 2 and not self.prompt[0]:
            return self._cell(row, self.prompt[1])
        return "".join(row[part] if index % 2 else part for index, part in enumerate(self.prompt))

    def _turns(self, cell: Any) -> Any:
        """The turns of a chat that a cell holds as JSON text; any other cell as it is."""
        read = from_json_text(cell) if self.json_cells else cell
        return read if is_chat(read) else cell

    def _cell(self, row: Cells, column: str) -> Any:
        """What a column holds: text, or a list or object."""
        value = row.value(column)
        return without_nulls(value) if isinstance(value, (list, dict)) else row[column]


def _template(prompt: str | None, template: str | None, answers: list[str], there: Columns) -> list[str]:
    """Text and columns by turns. Braces with a name between them are all that a template knows."""
    if template is None:
        whole = prompt is None and "prompt" not in there and any(is_conversation(there.get(name)) for name in answers)
        return [] if whole else ["", prompt or "prompt"]
    if prompt is not None:
        raise UserError("prompt and prompt_template: only one of them can be the prompt")
    parts = re.split(r"\{([^{}]+)\}", template)
    if len(parts) == 1:
        raise UserError(f"prompt_template: names no column: {template!r}", remedy="Write, for instance, {question}")
    return parts


def _numbered(columns: Iterable[str], stem: str) -> list[str]:
    """The columns STEM_1, STEM_2, ... in the order of their numbers."""
    found = {int(match[1]): name for name in columns if (match := re.fullmatch(rf"{stem}_([0-9]{{1,4}})", name))}
    return [found[number] for number in sorted(found)]


def _when(text: str, form: str | None) -> str:
    """A time as ISO 8601."""
    try:
        if form is not None:
            return datetime.strptime(text, form).isoformat()
        try:
            return datetime.fromisoformat(text).isoformat()
        except ValueError:
            return parsedate_to_datetime(text).isoformat()
    except (ValueError, TypeError, IndexError, OverflowError, re.error) as error:
        remedy = "Say how it is written: --option time_format='%d/%m/%Y %H:%M', or leave `time` out."
        raise BadRecord("time: not understood", f"{brief(text)}: {brief(str(error))}", remedy) from None
