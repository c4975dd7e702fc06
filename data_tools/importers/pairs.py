"""Importers of preference pairs that name the better and the worse answer: TRL, OpenAI, ShareGPT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.importers import hh
from data_tools.importers.table import IMPORTERS, Head, convert_rows
from data_tools.reading.fields import SHAREGPT_ROLES, answer, as_jsonl, chat, need, text
from data_tools.reading.rows import JSON
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking, Record
from rlhf.data.store import OnReject

# ---- TRL -------------------------------------------------------------------------------------------------------------


def _detect_trl(head: Head) -> str | None:
    if not head.all_have("chosen", "rejected") or any("instruction" in row for row in head.rows) or hh.detect(head):
        return None
    pairs = [(row["chosen"], row["rejected"]) for row in head.rows]
    if all(isinstance(one, str) and isinstance(other, str) for one, other in pairs):
        return "its rows have `chosen` and `rejected` text"
    if all(isinstance(one, list) and isinstance(other, list) for one, other in pairs):
        return "its rows have `chosen` and `rejected` lists of messages"
    return None


TRL_SAMPLE = as_jsonl(
    {"prompt": "What colour is the sky?", "chosen": "It is blue.", "rejected": "It is green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
)


@IMPORTERS.row("trl-preference", suffixes=JSON, sample=TRL_SAMPLE, detect=_detect_trl)
def trl_preference(path: Path, reject: OnReject) -> Iterator[Record]:
    """TRL preference rows {prompt, chosen, rejected}: text or messages, with the prompt given or left in the answers.

    Ranks: chosen 1, rejected 2; the format has no ties, and does not say in which order the answers were shown or
    who wrote them (https://huggingface.co/docs/trl/dataset_formats).

    The prompt is `prompt`, a text (a user's turn) or a list of messages. Messages with which `chosen` and `rejected`
    both begin belong to it, whether or not `prompt` repeats them (as UltraFeedback-binarized does). Without `prompt`,
    texts are cut where they first differ, at the white space before that word (TRL cuts inside a word), and the white
    space at the cut is dropped.

    Rejected: an HH-RLHF transcript (import it as hh-rlhf), answers of several turns, identical or empty answers, no
    common beginning, turns of tools.
    """
    return convert_rows(path, reject, _trl_ranking)


def _trl_ranking(row: Any) -> Ranking:
    need(row, "chosen", "rejected")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            if hh.is_transcript(chosen):
                raise BadRecord("a transcript of HH-RLHF", remedy="Import the file as hh-rlhf.")
            prompt, chosen, rejected = _cut_where_they_differ(chosen, rejected)
        return _preference(_trl_prompt(prompt), chosen, rejected, "trl-preference")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRecord("chosen and rejected: one is text, the other is not", remedy="Write both the same way.")
    better, worse = chat(chosen, "chosen"), chat(rejected, "rejected")
    same = 0
    while same < min(len(better), len(worse)) - 1 and better[same] == worse[same]:
        same += 1
    turns = [] if prompt is None else _trl_prompt(prompt)
    shared = better[:same]
    turns = shared if all(turn in shared for turn in turns) else turns + shared
    return _preference(turns, answer(better[same:], "chosen"), answer(worse[same:], "rejected"), "trl-preference")


def _trl_prompt(prompt: Any) -> list[Message]:
    return [Message("user", prompt)] if isinstance(prompt, str) else chat(prompt, "prompt")


def _cut_where_they_differ(one: str, other: str) -> tuple[str, str, str]:
    same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    at = same - len(re.split(r"\s", one[:same])[-1])
    return one[:at].strip(), one[at:].strip(), other[at:].strip()


def _preference(prompt: list[Message], chosen: str, rejected: str, source: str) -> Ranking:
    return Ranking(tuple(prompt), source=source, candidates=(Candidate(chosen), Candidate(rejected)), ranks=(1, 2))


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


def _detect_openai(head: Head) -> str | None:
    if head.all_have("input", "preferred_output", "non_preferred_output"):
        return "its rows have `input`, `preferred_output` and `non_preferred_output`"
    return None


OPENAI_SAMPLE = as_jsonl(
    {
        "input": {"messages": [{"role": "user", "content": "Name a fruit."}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "Pear."}],
        "non_preferred_output": [{"role": "assistant", "content": "Car."}],
    }
)


@IMPORTERS.row("openai-preference", suffixes=JSON, sample=OPENAI_SAMPLE, detect=_detect_openai)
def openai_preference(path: Path, reject: OnReject) -> Iterator[Record]:
    """OpenAI preference fine-tuning (DPO): rows {input: {messages}, preferred_output, non_preferred_output}.

    Ranks: preferred_output 1, non_preferred_output 2; the format has no ties, and does not say in which order the
    answers were shown nor who wrote them (https://developers.openai.com/api/docs/guides/direct-preference-optimization).
    Each output is a list of one message of the assistant. A `developer` message is a system turn.

    Rejected: an output of several messages, turns that call tools, identical or empty answers.
    """
    return convert_rows(path, reject, _openai_ranking)


def _openai_ranking(row: Any) -> Ranking:
    need(row, "input", "preferred_output", "non_preferred_output")
    asked = row["input"]
    prompt = chat(asked.get("messages") if isinstance(asked, dict) else asked, "input.messages")
    better, worse = (answer(chat(row[name], name), name) for name in ("preferred_output", "non_preferred_output"))
    return _preference(prompt, better, worse, "openai-preference")


# ---- ShareGPT --------------------------------------------------------------------------------------------------------


def _detect_sharegpt(head: Head) -> str | None:
    if head.all_have("conversations", "chosen", "rejected"):
        return "its rows have `conversations`, `chosen` and `rejected`"
    return None


SHAREGPT_SAMPLE = as_jsonl(
    {
        "conversations": [{"from": "human", "value": "Name a fruit."}],
        "chosen": {"from": "gpt", "value": "Pear."},
        "rejected": {"from": "gpt", "value": "Car."},
    }
)


@IMPORTERS.row("sharegpt-preference", suffixes=JSON, sample=SHAREGPT_SAMPLE, detect=_detect_sharegpt)
def sharegpt_preference(path: Path, reject: OnReject) -> Iterator[Record]:
    """ShareGPT-style pairs (LLaMA-Factory): rows {conversations, chosen, rejected} of turns {from, value}.

    Ranks: chosen 1, rejected 2; the format has no ties, and does not say in which order the answers were shown or
    who wrote them. The prompt is `conversations`, after `system` where the row has one.

    Rejected: turns of tools (`function_call`, `observation`), an answer that is not the assistant's, identical or
    empty answers.
    """
    return convert_rows(path, reject, _sharegpt_ranking)


def _sharegpt_ranking(row: Any) -> Ranking:
    need(row, "conversations", "chosen", "rejected")
    prompt = sharegpt_chat(row)
    better, worse = (
        answer(chat([row[name]], name, SHAREGPT_ROLES, "from", "value"), name) for name in ("chosen", "rejected")
    )
    return _preference(prompt, better, worse, "sharegpt-preference")


def sharegpt_chat(row: dict[str, Any]) -> list[Message]:
    """The turns of a ShareGPT row: `conversations`, after `system` where the row has one.

    Raises:
        BadRecord: They are not a list of turns {from, value} of people and models.
    """
    system = text(row, "system", optional=True)
    turns = chat(row.get("conversations"), "conversations", SHAREGPT_ROLES, "from", "value")
    return [Message("system", system), *turns] if system else turns
