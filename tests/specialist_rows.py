"""Labelled rows that tiny models learn in seconds, and configs that train on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny

from rlhf.config.load import check_config
from rlhf.specialist.config import SpecialistConfig

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")


def rows(task: str, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows that differ in a number; the answer is easy to see."""
    draw = random.Random(seed)
    return [MAKERS[task](draw, seed * 1000 + number) for number in range(count)]


def _text(draw: random.Random, number: int) -> dict[str, Any]:
    good = draw.random() < 0.5
    text = f"The {draw.choice(tiny.ANIMALS)} number {number} is {draw.choice(GOOD if good else BAD)}"
    return {"text": text, "label": "pos" if good else "neg"}


def _pair(draw: random.Random, number: int) -> dict[str, Any]:
    row = _text(draw, number)
    return {"premise": row["text"], "hypothesis": "It is liked.", "label": row["label"]}


def _tags(draw: random.Random, number: int) -> dict[str, Any]:
    words = f"the {draw.choice(tiny.COLOURS)} {draw.choice(tiny.ANIMALS)} sees Mr Smith{number} .".split()
    return {"tokens": words, "tags": ["O", "O", "B-ANIMAL", "O", "B-PER", "I-PER", "O"]}


def _span(draw: random.Random, number: int) -> dict[str, Any]:
    place = draw.choice(tiny.PLACES)
    context = f"The {draw.choice(tiny.ANIMALS)} {number} goes to the {place}."
    return {"question": "Where does it go?", "context": context, "answer": place}


MAKERS = {"text": _text, "pair": _pair, "tags": _tags, "span": _span}


def write(path: Path, found: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    return str(path)


def config(folder: Path, task: Any, train: list[dict[str, Any]], held_out: Any = None, **values: Any) -> Any:
    """A config over rows that are written to `folder`; 12 held-out rows of another seed by default."""
    name = task if isinstance(task, str) else task["name"]
    data: dict[str, Any] = {"train": write(folder / "train.jsonl", train)}
    if held_out is not False:
        data["eval"] = write(folder / "eval.jsonl", rows(name, 12, seed=1) if held_out is None else held_out)
    base = {"run": str(folder / "run"), "model": {"path": tiny.bert()}, "task": task, "data": data}
    base |= {"batch": {"batch_size": 8, "max_steps": 40}, "optimizer": {"lr": 3e-3}, "eval": {"every": 20}}
    return check_config(SpecialistConfig, base | values, "test")
