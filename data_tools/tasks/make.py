"""Instructions from tasks: labelled rows become demonstrations through templates, as in FLAN (Wei et al. 2021; Longpre
et al. 2023) and T0 (Sanh et al. 2021): several templates a task, answer choices, exemplars, chains of thought.
"""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.importers.run import ImportSummary, find_files, write_import
from data_tools.io.expressions import Failed
from data_tools.io.rejects import Rejects
from data_tools.reading.csv_rows import CSV, csv_or_rows
from data_tools.reading.rows import JSON, converted
from data_tools.tasks.families import Family, TaskTemplate, load_family, read_family
from data_tools.tasks.rows import MOST_LETTERS, Mapper, TemplateRow, parse_choices
from rlhf.core import console
from rlhf.core.errors import UserError, nearest
from rlhf.data.jsonl import Item, OnReject, Reject
from rlhf.data.schema import BadRecord, Demonstration, Message
from rlhf.data.writer import DatasetWriter, check_new

COT = ("auto", "never", "both")
POOL = 500
"""Rows of a task from which exemplars are taken, a seeded sample."""
TEMPLATES_FILE = "templates.yaml"


# ---- one example through one template ------------------------------------------------------------------------------


def available(example: TemplateRow, family: Family) -> frozenset[str]:
    """The fields and values that templates may use for this example."""
    found = {*example.fields, family.answer, "answer"}
    if example.choices:
        found |= {"choices", "options"} | ({"lettered", "letter"} if len(example.choices) <= MOST_LETTERS else set())
    return frozenset(found | ({"rationale"} if example.rationale else set()))


def fitting(example: TemplateRow, family: Family) -> tuple[TaskTemplate, ...]:
    """The templates that use nothing that the example lacks, and leave out neither a field nor choices that it has."""
    have = available(example, family)
    return tuple(
        template
        for template in family.templates
        if template.names <= have and example.fields.keys() <= template.names and _words_choices(template, example)
    )


def _words_choices(template: TaskTemplate, example: TemplateRow) -> bool:
    if template.wording:
        return bool(example.choices) and set(example.choices) <= template.wording.keys()
    return not example.choices or not template.names.isdisjoint(("choices", "options", "lettered"))


def render(example: TemplateRow, template: TaskTemplate, family: Family, cot: bool) -> tuple[str, str]:
    """The prompt and the target, without white space around them.

    Raises:
        Failed: A template cannot be rendered.
    """
    words = [template.wording.get(choice, choice) for choice in example.choices]
    values: dict[str, Any] = dict(example.fields)
    answer = template.wording.get(example.answer, example.answer)
    known = {"rationale": example.rationale.strip(), "answer": answer, family.answer: answer}
    if words:
        letters = [chr(ord("A") + index) for index in range(min(len(words), MOST_LETTERS))]
        values |= {"choices": words, "options": "\n".join(f"- {word}" for word in words)}
        values["lettered"] = "\n".join(f"({letter}) {word}" for letter, word in zip(letters, words))
        position = example.choices.index(example.answer)
        known["letter"] = letters[position] if position < len(letters) else ""
    prompt = template.prompt(values).strip()
    target = template.target(values | known).strip()
    if cot:
        known["answer"] = target
        target = family.cot_target(values | known).strip()
        prompt = family.cot_prompt(values | {"prompt": prompt}).strip()
    return prompt, target


# ---- exemplars -----------------------------------------------------------------------------------------------------


class Pools:
    """Samples of the examples, from which exemplars are taken: of the same task, and fitting the same templates.

    Where any row has a split, exemplars are of train alone, so that nothing of eval or test is shown in training.
    """

    def __init__(self, examples: Iterator[TemplateRow], family: Family, seed: int) -> None:
        self._family = family
        self.split = False
        """Whether any row has one."""
        self._sampled: dict[tuple[Any, ...], list[TemplateRow]] = defaultdict(list)
        seen: dict[tuple[Any, ...], int] = defaultdict(int)
        rng = random.Random(f"{seed}:pools")
        for example in examples:
            self.split = self.split or example.split is not None
            if example.split in (None, "train"):
                place = self._place(example, example.split)
                seen[place] += 1
                sample = self._sampled[place]
                if len(sample) < POOL:
                    sample.append(example)
                elif (index := rng.randrange(seen[place])) < POOL:  # reservoir sampling: each is as likely to stay
                    sample[index] = example
        for place, sample in self._sampled.items():
            self._sampled[place] = list({example.key: example for example in sample}.values())

    def _place(self, example: TemplateRow, split: str | None) -> tuple[Any, ...]:
        names = tuple(template.name for template in fitting(example, self._family))
        return example.task, split, names, bool(example.rationale)

    def take(self, example: TemplateRow, count: int, rng: random.Random) -> list[TemplateRow]:
        """Exemplars for an example: never itself, nor a row that says the same, nor one row twice.

        Raises:
            BadRecord: There are too few.
        """
        sample = self._sampled.get(self._place(example, "train" if self.split else None), [])
        drawn = rng.sample(sample, min(len(sample), count + 1))
        others = [other for other in drawn if other.key != example.key][:count]
        if len(others) < count:
            detail = f"{len(others)} of its task fit, {count} are needed"
            raise BadRecord("too few other rows for its exemplars", detail, "Give more rows, or fewer --shots.")
        return others


# ---- rows -> dataset -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How rows are turned into demonstrations."""

    templates: tuple[str, ...] = ()
    """Names of the templates to use; none: all of the family."""
    all_templates: bool = False
    """One demonstration from each template that fits, rather than from one by the seed."""
    shots: int = 0
    """Exemplars before the question."""
    cot: str = "auto"
    """Reason before the answer: `auto` where a row has a rationale, `never`, or `both` with and without."""
    seed: int = 0


class TaskWriter:
    """Turns examples into demonstrations."""

    def __init__(self, family: Family, options: Options, pools: Pools | None) -> None:
        self._family, self._options, self._pools = family, options, pools

    def records(self, example: TemplateRow) -> Iterator[Demonstration | BadRecord]:
        """The demonstrations of an example; a BadRecord for each that cannot be made."""
        fit = [t for t in fitting(example, self._family) if t.name in (self._options.templates or (t.name,))]
        if not fit:
            detail = f"it has {', '.join(sorted(available(example, self._family)))}"
            remedy = "Write a template that uses all of them."
            if not example.choices:
                remedy = "Give --choices, which most templates show, or w" + remedy[1:]
            yield BadRecord("no template fits the row's fields", detail, remedy)
            return
        rng = random.Random(f"{self._options.seed}:{example.key}")
        modes = {"auto": [bool(example.rationale)], "never": [False], "both": [False, True]}[self._options.cot]
        for template in fit if self._options.all_templates else [rng.choice(fit)]:
            for cot in modes if example.rationale else [False]:
                try:
                    yield self._record(example, template, cot, rng)
                except BadRecord as fault:
                    yield fault
                except Failed as error:
                    yield BadRecord(
                        "a template cannot be rendered", f"{template.name}: {error}", "Correct the template."
                    )

    def _record(self, example: TemplateRow, template: TaskTemplate, cot: bool, rng: random.Random) -> Demonstration:
        shown = self._pools.take(example, self._options.shots, rng) if self._pools else []
        before = [render(other, template, self._family, cot) for other in shown]
        prompt, target = render(example, template, self._family, cot)
        text = "\n\n".join([*(f"{asked}\n{answered}" for asked, answered in before), prompt])
        source = f"{self._family.name}/{template.name}{'+cot' if cot else ''}"
        chat = (Message("user", text),)
        return Demonstration(chat, source, example.task, example.split, target, example.author)


def make_tasks(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    family: str | None = None,
    templates: str | Path | None = None,
    fields: Sequence[str] = (),
    choices: str | None = None,
    task: str | None = None,
    options: Options | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> ImportSummary:
    """Turn labelled rows into a dataset of demonstrations, streaming; the same rows and options give the same bytes.

    A record's `group` is its task and its `source` the family and template, so that splits and metrics can go by
    both. Rows that cannot be used go to `rejected.jsonl`. The templates are kept in the dataset's folder.

    Args:
        paths: Files (CSV, TSV, JSON, Parquet; compressed or not), folders and glob patterns.
        out: The dataset folder to make.
        family: One of our families, or
        templates: a YAML file of your own.
        fields: ``FIELD=COLUMN`` words, as `Mapper` takes them.
        choices: The choices of every row that has none, such as ``no,yes``, in the order of numeric labels.
        task: The task's name where rows have none; by default the file's.
        strict: Raise at the first row that cannot be used, and write nothing.

    Returns:
        The counts of demonstrations: `read` = `written` + `rejected`.

    Raises:
        NothingUsable: Not one row could be used.
        UserError: Wrong options or templates, no such file, or a bad row under `strict`.
    """
    options = options or Options()
    chosen = _family(family, templates)
    _check(options, chosen)
    given = None if choices is None else parse_choices(choices)
    files = find_files(paths, (*CSV, *JSON))
    check_new(out, overwrite)
    mappers = {file: Mapper(chosen, fields, given, task or file.name.split(".")[0]) for file in files}
    examples = (example for _, _, example in _read(mappers, lambda _: None))
    pools = Pools(examples, chosen, options.seed) if options.shots else None
    if pools and not pools.split:
        console.warn("no row has a split: exemplars are of all rows, also of those that you may hold out later")
    makes = TaskWriter(chosen, options, pools)

    def fill(writer: DatasetWriter, rejects: Rejects) -> None:
        shutil.copyfile(chosen.file, writer.partial / TEMPLATES_FILE)
        for file, item, example in _read(mappers, rejects):
            for record in makes.records(example):
                if isinstance(record, BadRecord):
                    rejects(Reject.of(file, item.line, record, item.raw))
                else:
                    writer.write(record)

    return write_import(DatasetWriter(out, "demonstration", overwrite=overwrite), files, fill, strict)


def _family(name: str | None, file: str | Path | None) -> Family:
    if (name is None) == (file is None):
        raise UserError(
            "tasks: give either --family or --templates",
            remedy="`rlhf data families` lists the families; docs/tasks.md describes a file of your own.",
        )
    return load_family(name) if name is not None else read_family(Path(file or ""))


def _check(options: Options, family: Family) -> None:
    names = [template.name for template in family.templates]
    for name in options.templates:
        if name not in names:
            raise UserError(f"--template: {family.name} has none called {name!r}", remedy=nearest(name, names))
    if options.cot not in COT:
        raise UserError(f"--cot: {options.cot!r} is not a way", remedy=nearest(options.cot, COT))
    if options.shots < 0:
        raise UserError(f"--shots {options.shots}: is below 0")


def _read(mappers: dict[Path, Mapper], reject: OnReject) -> Iterator[tuple[Path, Item, TemplateRow]]:
    """The examples of all files, each with its row; a row that gives none goes to `reject`."""
    for file, mapper in mappers.items():
        for item, example in converted(file, reject, csv_or_rows(file, reject), mapper):
            yield file, item, example
