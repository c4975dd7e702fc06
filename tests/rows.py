"""Rows, records and datasets that the tests of the schema, the store and the data tools share."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlhf.data.jsonl import from_dict
from rlhf.data.schema import KINDS, Candidate, Demonstration, Message, Prompt, Proposal, Ranking
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter

RANKING = {"prompt": "Name a fruit.", "candidates": ["Pear.", "Plum.", "Car."], "ranks": [1, 1, 2]}
DEMONSTRATION = {"prompt": "Name a fruit.", "answer": "Pear."}


def prompts(count, **fields):
    """That many different prompts in JSON form."""
    return [{"prompt": f"Question {i}?", **fields} for i in range(count)]


def prompt_records(count, **fields):
    """The same as records."""
    return [from_dict(row) for row in prompts(count, **fields)]


# ---- on disk ---------------------------------------------------------------------------------------------------------


def jsonl(path, rows):
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write(path, items, kind=None, origin=None):
    """Write records as a dataset folder, and open it."""
    with DatasetWriter(path, kind or items[0].kind, origin, overwrite=True) as writer:
        for item in items:
            writer.write(item)
    return open_dataset(path)


def dataset(path, rows):
    """Write rows in JSON form as a dataset folder; its path."""
    return write(path, [from_dict(row) for row in rows]).path


def tree(folder):
    """Name -> bytes of every file."""
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---- `rlhf data` -----------------------------------------------------------------------------------------------------


def run(*args):
    """The result of `rlhf data` with these words."""
    from data_tools.commands.cli import app

    words = [str(arg) for arg in args]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf", "data", *words])
        return CliRunner().invoke(app, words)


def last_line(result):
    """What --json printed."""
    return json.loads(result.stdout.rstrip("\n").split("\n")[-1])


# ---- any valid record, for the round trips -------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
texts = any_text.filter(lambda text: text and not text.isspace())
times = st.datetimes().map(lambda time: time.isoformat())


@st.composite
def chats(draw: st.DrawFn) -> tuple[Message, ...]:
    turns = draw(st.integers(0, 2)) * 2 + 1
    system = (Message("system", draw(texts)),) if draw(st.booleans()) else ()
    return system + tuple(Message("assistant" if i % 2 else "user", draw(texts)) for i in range(turns))


@st.composite
def candidate_lists(draw: st.DrawFn) -> tuple[tuple[Candidate, ...], tuple[int, ...]]:
    answers = draw(st.lists(texts, min_size=2, max_size=5, unique=True))
    scores = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    kinds = st.sampled_from(["model", "person", "unknown"])
    candidates = tuple(Candidate(a, draw(any_text), draw(kinds), draw(scores)) for a in answers)
    return candidates, tuple(draw(st.integers(1, 9)) for _ in answers)


@st.composite
def records(draw: st.DrawFn, kind: str | None = None) -> Prompt:
    kind = kind or draw(st.sampled_from(sorted(KINDS)))
    base = {"messages": draw(chats()), "source": draw(any_text), "group": draw(st.none() | texts)}
    base["split"] = draw(st.sampled_from([None, "train", "eval", "test"]))
    if kind == "demonstration":
        return Demonstration(**base, answer=draw(texts), author=draw(any_text))
    if kind == "proposal":
        return Proposal(**base, candidates=draw(candidate_lists())[0])
    if kind == "ranking":
        candidates, ranks = draw(candidate_lists())
        more = {"annotator": draw(any_text), "time": draw(st.none() | times), "shown": draw(st.booleans())}
        more |= {"seconds": draw(st.none() | st.floats(0, 1e6)), "weight": draw(st.floats(0.01, 10))}
        more |= {"merged": tuple(draw(st.lists(texts, max_size=3)))}
        return Ranking(**base, candidates=candidates, ranks=ranks, **more)
    return Prompt(**base)
