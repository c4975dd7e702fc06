"""Families of tasks: which fields a row has, and the templates that turn it into an instruction and its answer.

Built-in families are YAML files in `data_tools/tasks/templates/`; `docs/tasks.md` describes the form for your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.io.expressions import Template
from rlhf.core import console
from rlhf.core.errors import UserError, nearest
from rlhf.core.limits import read_yaml

FOLDER = Path(__file__).resolve().parent / "templates"
ALWAYS = {
    "choices": "The answers to choose from; the answer is then one of them, or its number from 0.",
    "rationale": "Why the answer is right, as a person wrote it.",
    "task": "The name of the task; the record's group.",
    "split": "train, eval (or dev, validation) or test.",
    "author": "Who wrote the answer.",
}
"""Fields that rows of every family may have."""
MADE = ("options", "lettered", "letter", "answer")
"""Values that templates may use in addition to the fields; `letter` and `answer` only in a target."""
COT_PROMPT = "Reason step by step, then answer.\n{{ prompt }}"
COT_TARGET = "{{ rationale }}\nThe answer is {{ answer.removesuffix('.') }}."


# ---- the files -----------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TemplateForm(_Strict):
    name: str
    prompt: str
    target: str = "{{ answer }}"
    wording: dict[str, str] = {}


class _CotForm(_Strict):
    prompt: str = COT_PROMPT
    target: str = COT_TARGET


class _FamilyForm(_Strict):
    family: str
    about: str = ""
    fields: dict[str, str] = Field(min_length=1)
    optional: dict[str, str] = {}
    answer: str
    choices: list[str] = []
    cot: _CotForm = _CotForm()
    templates: list[_TemplateForm] = Field(min_length=1)


# ---- what is made of them ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskTemplate:
    """One way to put a task into words."""

    name: str
    prompt: Template
    target: Template
    wording: Mapping[str, str]
    """Choice -> what it is called here; empty where choices keep their names."""

    @property
    def names(self) -> frozenset[str]:
        """The fields and values that it uses."""
        return self.prompt.names | self.target.names


@dataclass(frozen=True)
class Family:
    """Tasks with the same fields. `answer` is the field that holds the right answer; `choices` may be empty."""

    name: str
    about: str
    file: Path
    fields: Mapping[str, str]
    optional: Mapping[str, str]
    answer: str
    choices: tuple[str, ...]
    templates: tuple[TaskTemplate, ...]
    cot_prompt: Template
    cot_target: Template

    @property
    def known(self) -> dict[str, str]:
        """All fields that a row may have -> what they mean."""
        return {**self.fields, **self.optional, **ALWAYS}


def families() -> dict[str, Path]:
    """The names of our families -> their files."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def load_family(name: str) -> Family:
    """One of our families.

    Raises:
        UserError: There is none of that name.
    """
    ours = families()
    if name not in ours:
        raise UserError(f"--family: none is called {name!r}", remedy=nearest(name, ours))
    return read_family(ours[name])


def read_family(file: Path) -> Family:
    """A family from its YAML file.

    Raises:
        UserError: The file cannot be read, is not of the form, or a template in it is none; file and template are
            named.
    """
    try:
        values = read_yaml(file)
        form = _FamilyForm.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: {_fault(error.errors()[0], values)}", remedy=_FORM) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    _check_fields(file, form)
    content = [*form.fields, *form.optional]
    open_names = [name for name in content if name != form.answer] + ["choices", "options", "lettered"]
    templates: dict[str, TaskTemplate] = {}
    for entry in form.templates:
        where = f"{file}: template {entry.name!r}"
        if entry.name in templates:
            raise UserError(f"{where}: there are two of that name")
        prompt = Template(entry.prompt, f"{where}: prompt", open_names)
        target = Template(entry.target, f"{where}: target", [*content, "choices", "rationale", *MADE])
        templates[entry.name] = TaskTemplate(entry.name, prompt, target, entry.wording)
        unused = [name for name in form.fields if name != form.answer and name not in templates[entry.name].names]
        if unused:
            raise UserError(f"{where}: does not use the field {unused[0]!r}", remedy="Use it, or make it optional.")
    cot_prompt = Template(form.cot.prompt, f"{file}: cot: prompt", ["prompt", *open_names])
    cot_target = Template(form.cot.target, f"{file}: cot: target", ["rationale", "answer", "letter", *open_names])
    return Family(
        form.family, form.about, file, form.fields, form.optional, form.answer, tuple(form.choices),
        tuple(templates.values()), cot_prompt, cot_target,
    )  # fmt: skip


_FORM = (
    "docs/tasks.md describes the form. Put yes, no, on, off and numbers in quotes: YAML takes them for something else."
)


def _fault(error: Mapping[str, Any], values: Any) -> str:
    """What pydantic found, with the template's name in place of its number."""
    place = list(error["loc"])
    if len(place) > 1 and place[0] == "templates":
        entry = values["templates"][place[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        place[:2] = [f"template {name!r}" if isinstance(name, str) else f"template {place[1] + 1}"]
    return ": ".join([*map(str, place), error["msg"]])


def _check_fields(file: Path, form: _FamilyForm) -> None:
    for name in (*form.fields, *form.optional):
        taken = {*ALWAYS, *MADE, "prompt", "row"} - {form.answer}
        if not name.isidentifier() or name in taken:
            why = f"These mean something already: {', '.join(sorted(taken))}."
            raise UserError(f"{file}: a field cannot be called {name!r}", why, "Letters, digits and _ make a name.")
    if form.answer not in form.fields:
        raise UserError(
            f"{file}: answer: {form.answer!r} is not one of `fields`", remedy=nearest(form.answer, form.fields)
        )


def as_dict(family: Family) -> dict[str, Any]:
    """The family in JSON form."""
    return {
        "family": family.name, "about": family.about, "file": str(family.file), "fields": dict(family.fields),
        "optional": {**family.optional, **ALWAYS}, "answer": family.answer, "choices": list(family.choices),
        "templates": [
            {"name": t.name, "prompt": t.prompt.source, "target": t.target.source, "wording": dict(t.wording)}
            for t in family.templates
        ],
    }  # fmt: skip


def show(family: Family) -> None:
    """Print the family's fields and templates."""
    rows = [[name, "yes", about] for name, about in family.fields.items()]
    rows += [[name, "no", about] for name, about in {**family.optional, **ALWAYS}.items()]
    console.table(f"{family.name}: {family.about}", ["field", "needed", "what it is"], rows)
    if family.choices:
        console.say(f"choices: {', '.join(family.choices)}")
    for template in family.templates:
        console.say(f"\n-- {template.name}")
        console.say(template.prompt.source.strip())
        console.say(f"=> {template.target.source}")
        if template.wording:
            console.say(f"   {', '.join(f'{choice}: {word}' for choice, word in template.wording.items())}")
