"""The import by a mapping, typed out for the columns of a file that nothing else reads."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.reading.annotation_exports import PROMPT_FIELDS, by_stem, stem_and_ending
from data_tools.reading.cells import as_text
from data_tools.reading.unread import SYSTEM_FIELDS, WINNERS, role_of, words_of

BEST_AND_WORST = (
    ("chosen", "rejected"), ("preferred", "nonpreferred"), ("preferred", "dispreferred"),
    ("pos", "neg"), ("positive", "negative"), ("good", "bad"), ("j", "k"),
)  # fmt: skip
"""Words that distinguish the name of the better answer from the name of the worse one."""
TEXTS = ("text", "answer", "response", "content", "completion")

Columns = Mapping[str, list[Any]]
"""Columns of a file -> values of the first rows."""


def route(path: Path, columns: Columns) -> str:
    """The command that imports the file by the mapping of columns; words in capitals are for the reader to fill in."""
    words = [word for pair in mapping_words(columns) for word in ("--option", pair)]
    return shlex.join(["rlhf", "data", "import", "csv", str(path), *words, "--out", "DATASET"])


def mapping_words(columns: Columns) -> list[str]:
    """The options of the mapping, NAME=VALUE, as far as the names of the columns say them."""
    roles = {name: role_of(name) for name in columns}
    pair = best_and_worst(columns)
    answers = pair or _group(columns, "answer") or _group(columns, "prompt") or _listed(columns)
    words = []
    if prompt := _prompt(columns, answers):
        words += [f"prompt={prompt}"]
    words += [f"system={name}" for name in columns if name.lower() in SYSTEM_FIELDS][:1]
    words += [f"history={name}" for name in columns if name.lower() == "history" and name != prompt]
    if not answers:
        single = [name for name, role in roles.items() if role == "answer"]
        return [*words, f"answer={single[0]}"] if len(single) == 1 else [*words, "answers=ANSWER_COLUMN,ANSWER_COLUMN"]
    words += [f"answers={','.join(answers)}"]
    if pair:
        return [*words, "best_first=true"]
    return words + _judgement(columns, answers)


def best_and_worst(columns: Columns) -> list[str]:
    """The columns of a better and a worse answer, such as chosen and rejected; an empty list where there are none."""
    by_words = {tuple(words_of(name)): name for name in columns if role_of(name) != "judgement"}
    for best, worst in BEST_AND_WORST:
        for words, name in by_words.items():
            other = by_words.get(tuple(worst if word == best else word for word in words))
            if best in words and other is not None:
                return [name, other]
    return []


def _group(columns: Columns, role: str) -> list[str]:
    """The columns of that role whose names differ only in what they end in: answer_1 and answer_2."""
    groups = by_stem(name for name in columns if role_of(name) == role)
    return next((names for of in groups.values() if len(names := [of[end] for end in of if end]) > 1), [])


def _listed(columns: Columns) -> list[str]:
    """Dotted paths of the texts of a column that lists objects."""
    for name, values in columns.items():
        first = values[0] if values else None
        if role_of(name) != "answer" or not isinstance(first, list) or not first or not isinstance(first[0], dict):
            continue
        if text := next((key for key in TEXTS if key in first[0]), None):
            return [f"{name}.{index}.{text}" for index in range(len(first))]
    return []


def _prompt(columns: Columns, answers: list[str]) -> str | None:
    by_name = {name.lower(): name for name in columns if name not in answers}
    known = [by_name[name] for name in PROMPT_FIELDS if name in by_name]
    other = [name for name in columns if role_of(name) == "prompt" and name not in answers]
    if not known and not other and any(role_of(name) == "prompt" for name in answers):
        return None  # whole conversations hold it
    return (known or other or ["PROMPT_COLUMN"])[0]


def _judgement(columns: Columns, answers: list[str]) -> list[str]:
    ranks = _ranks(columns, answers)
    if ranks:
        lowest = any("rank" in word for name in ranks for word in words_of(name))
        return [f"ranks={','.join(ranks)}", f"rank_order={'lowest-best' if lowest else 'highest-best'}"]
    judged = [name for name in columns if role_of(name) == "judgement"]
    if not judged:
        return ["choice=COLUMN_THAT_SAYS_WHO_WON"]
    judged.sort(key=lambda name: not WINNERS & set(words_of(name)))
    values = sorted({as_text(value) for value in columns[judged[0]]})[:8] or ["VALUE"]
    by_ending = {stem_and_ending(name)[1]: name for name in answers}
    meant: dict[str, str | None] = {}
    for value in values:
        ending = stem_and_ending(f"x {value}")[1]  # so that a value that is an ending, such as 1, has one too
        if ending in by_ending:
            meant |= {value.removesuffix(ending) + other: name for other, name in by_ending.items()}
        else:
            meant[value] = "tie" if "tie" in value.lower() else None
    listed = ",".join(f"{value}={name or 'WHICH_ANSWER'}" for value, name in meant.items())
    return [f"choice={judged[0]}", f"choice_values={listed}"]


def _ranks(columns: Columns, answers: list[str]) -> list[str]:
    """The columns of a number for each answer: their names end as the answers' do, or they are in the same list."""
    name, _, last = answers[0].rpartition(".")
    if last in TEXTS and columns.get(name.split(".")[0]):
        first = columns[name.split(".")[0]][0][0]
        key = next((key for key in first if role_of(key) == "judgement"), None)
        return [f"{answer.rpartition('.')[0]}.{key}" for answer in answers] if key else []
    endings = [stem_and_ending(answer)[1] for answer in answers]
    judged = by_stem(column for column in columns if role_of(column) == "judgement")
    return next(([of[e] for e in endings] for of in judged.values() if set(endings) <= of.keys()), [])
