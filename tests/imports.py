"""Importing a file or a few rows of a format, and looking at what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rows import jsonl

from data_tools.importers import IMPORTERS
from rlhf.data.columns import as_record

DATA = Path(__file__).parents[2] / "shared" / "data"
EXPORTS = DATA / "annotation_exports"
real = pytest.mark.skipif(not DATA.exists(), reason="../shared is absent")
AUTHENTIC = {
    "alpaca": [EXPORTS / "alpaca" / "alpaca_demo.json", DATA / "instructions" / "flan_cot.jsonl.gz"],
    "alpaca-ranked": [EXPORTS / "alpaca" / "ranked_output_list.json"],
    "hh-rlhf": [
        EXPORTS / "hh_rlhf" / "harmless_test.first20.jsonl", DATA / "preferences" / "hh_harmless_base_test.jsonl.gz",
    ],
    "jsonl": [DATA / "preferences" / "oasst1_en_validation_ranked.jsonl"],
    "openai-chat": [
        EXPORTS / "openai_chat" / "toy_chat_fine_tuning.first3.jsonl",
        DATA / "instructions" / "oasst1_en_validation_sft.jsonl",
    ],
    "openai-preference": [EXPORTS / "openai_chat" / "preference_dpo.documented.json"],
    "openassistant": [
        EXPORTS / "openassistant" / "en_100_tree.first20.jsonl",
        EXPORTS / "openassistant" / "en_100_message.first20.jsonl",
    ],
    "pandalm": [EXPORTS / "pandalm" / "testset_first10.json", DATA / "preferences" / "pandalm_human_test.jsonl"],
    "sharegpt": [EXPORTS / "sharegpt" / "fastchat_dummy_conversation.json"],
    "sharegpt-preference": [EXPORTS / "sharegpt" / "llamafactory_dpo_sharegpt.json"],
    "shp": [EXPORTS / "shp" / "row.documented.json"],
    "summarize-from-feedback": [EXPORTS / "summarize_from_feedback" / "comparison.json"],
    "text": [DATA / "text" / "gutenberg_grimm.txt"],
    "trl-preference": [DATA / "preferences" / "ukpconvarg1_strict_pairs.jsonl.gz"],
}  # fmt: skip
"""Format -> authentic or documented files of it."""


def read(name, path, **options):
    """(records, rejects) of one file."""
    rejects = []
    made = IMPORTERS.pick({"name": name, **options})(Path(path), rejects.append)
    return list(map(as_record, made)), rejects


def made(tmp_path, name, *rows, **options):
    """(records, reasons) of a file of these rows."""
    records, rejects = read(name, jsonl(tmp_path / "in.jsonl", rows), **options)
    return records, [reject.reason for reject in rejects]


def one(tmp_path, name, row, **options):
    """The one record of a row."""
    ((record,), reasons) = made(tmp_path, name, row, **options)
    assert reasons == []
    return record


def by_rank(record):
    """Rank -> the texts that have it."""
    order: dict[int, list[str]] = {}
    for candidate, rank in zip(record.candidates, record.ranks):
        order.setdefault(rank, []).append(candidate.text)
    return order


def best(record):
    """The text that won."""
    (text,) = by_rank(record)[1]
    return text


def said(record):
    return [(message.role, message.content) for message in record.messages]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def vote(winner, a="Car.", b="Pear.", **more):
    """A row of Chatbot Arena."""
    sides = {f"conversation_{side}": [user("Fruit?"), assistant(text)] for side, text in (("a", a), ("b", b))}
    return {"model_a": "ma", "model_b": "mb", "winner": winner, **sides, **more}
