"""Importers of preference pairs that name the better and the worse answer: TRL, OpenAI, ShareGPT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data_tools.importers import hh
from data_tools.published.table import FileHead, row_format, rows_have
from data_tools.reading.fields import (
    OPENAI,
    SHAREGPT,
    answer,
    chat,
    is_list_of,
    ranking,
    text_if_any,
    whole_prompt,
)
from data_tools.reading.judgements import chosen_and_rejected, ranks_with_scores
from data_tools.reading.turns import (
    has_later_marks,
    is_transcript,
    join_prompt,
    prompt_turns,
    shared_turns,
    tool_definitions,
    tool_fields,
    turns_by,
    turns_of,
)
from rlhf.data.schema import BadRecord, Message, Ranking, brief

PairTools = Literal["reject", "keep"]

# ---- TRL -------------------------------------------------------------------------------------------------------------


def _is_pair(row: Mapping[str, Any]) -> bool:
    sides = row["chosen"], row["rejected"]
    messages = all(is_list_of(dict, side) for side in sides)
    return "instruction" not in row and (messages or all(isinstance(side, str) for side in sides))


_pairs = rows_have("chosen", "rejected", where=_is_pair, why="its rows have `chosen` and `rejected`, texts or messages")


def _detect_trl(head: FileHead) -> str | None:
    return None if hh.detect(head) else _pairs(head)


@row_format("trl-preference", "chosen", "rejected", detect=_detect_trl, left_out=tool_fields)
def trl_preference(row: Any, *, tools: PairTools = "reject") -> Ranking:
    """TRL preference rows {prompt, chosen, rejected}: text or messages, with the prompt given or left in the answers.

    Ranks: chosen 1, rejected 2, unless their scores are equal, which is a tie. `score_chosen` and `score_rejected`
    (also `chosen_score`, `chosen-rating` and the like) stay with the candidates. The format does not say in which order
    the answers were shown or who wrote them (https://huggingface.co/docs/trl/dataset_formats).

    The prompt is `prompt`, or else `question`, `instruction` (followed by `input`), `query` or `input`: a text (a
    user's turn), a list of messages, JSON text of such a list, or text in which ``Human:`` and ``Assistant:`` mark the
    turns (as rm-static has them). `system` and `history` come before it. Messages with which `chosen` and `rejected`
    both begin belong to it, whether or not `prompt` repeats them (as UltraFeedback-binarized does). Where no field can
    be the prompt, texts are cut where they first differ, at the white space before that word (TRL cuts inside a word),
    and the white space at the cut is dropped; they must share three words, and JSON is never cut.

    Args:
        tools: What becomes of a row whose prompt has a turn that calls a tool or is a tool's. reject: it is a reject.
            keep: such turns and the definitions in `tools` are part of the prompt. Stages reject the prompts where
            the model's chat template does not write them.

    Rejected: two fields that could be the prompt, an HH-RLHF transcript without a prompt (import it as hh-rlhf),
    answers of several turns, an answer that calls tools, identical or empty answers, no prompt, a rejected answer with
    the higher score.
    """
    keep_tools = tools == "keep"
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("chosen and rejected: one is text, the other is not", remedy="Write both the same way.")
    asked = _trl_prompt(row, keep_tools)
    if not asked and is_transcript(chosen):
        raise BadRecord("a transcript of HH-RLHF", remedy="Import the file as hh-rlhf.")
    better, worse = (
        turns_of(said, name, "assistant", keep_tools=keep_tools)
        for name, said in (("chosen", chosen), ("rejected", rejected))
    )
    if not asked and len(better) == len(worse) == 1 and isinstance(chosen, str):
        return _preference(row, *_cut_where_they_differ(chosen, rejected), "trl-preference")
    same = shared_turns([better, worse])
    asked = join_prompt(asked, better[:same])
    best, other = answer(better[same:], "chosen"), answer(worse[same:], "rejected")
    if is_transcript(row.get("prompt")):
        if has_later_marks(best) or has_later_marks(other):
            raise BadRecord("an answer with a transcript inside", brief(best), "Cut it after its first turn.")
        best, other = best.strip(), other.strip()
    defined = tool_definitions(row) if keep_tools else []
    return _preference(row, [*defined, *asked], best, other, "trl-preference")


FEWEST_WORDS = 3
"""Two texts that share fewer words at their beginning do not hold a prompt."""


def _trl_prompt(row: Mapping[str, Any], keep_tools: bool) -> list[Message]:
    """The turns of `prompt`, or of the field that takes its place."""
    if row.get("prompt") in (None, "", []):
        return prompt_turns(row, (row["chosen"], row["rejected"]))
    said = turns_of(row["prompt"], "prompt", "user", keep_tools=keep_tools)
    return whole_prompt(row, said)


def _cut_where_they_differ(one: str, other: str) -> tuple[list[Message], str, str]:
    """The prompt with which both texts begin, and the two answers."""
    if one.lstrip()[:1] in ("{", "["):
        remedy = "Give the rows a prompt, or import by the mapping: csv --option answers=chosen,rejected ..."
        raise BadRecord("chosen: JSON that is no chat, and no prompt is found", brief(one), remedy)
    same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    at = same - len(re.split(r"\s", one[:same])[-1])
    if len(one[:at].split()) < FEWEST_WORDS:
        seen = f"chosen and rejected both begin with {brief(one[:at])}"
        raise BadRecord("no prompt is found", seen, "Give the rows a `prompt`.")
    return [Message("user", one[:at].strip())], one[at:].strip(), other[at:].strip()


def _preference(
    row: Mapping[str, Any],
    prompt: list[Message],
    chosen: str,
    rejected: str,
    source: str,
    names: Sequence[str] = ("chosen", "rejected"),
) -> Ranking:
    scores = chosen_and_rejected(row, names)
    return ranking(source, prompt, (chosen, rejected), ranks_with_scores((1, 2), scores, names), scores=scores)


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


@row_format("openai-preference", "input", "preferred_output", "non_preferred_output", left_out=tool_fields)
def openai_preference(row: Any, *, tools: PairTools = "reject") -> Ranking:
    """OpenAI preference fine-tuning (DPO): rows {input: {messages}, preferred_output, non_preferred_output}.

    Ranks: preferred_output 1, non_preferred_output 2; the format itself has no scores and no ties, and does not say in
    which order the answers were shown nor who wrote them
    (https://developers.openai.com/api/docs/guides/direct-preference-optimization). `preferred_output_score` and
    `non_preferred_output_score` (also `score_preferred_output` and the like), which some tools add, stay with the
    candidates, and equal scores are a tie. Each output is a list of one message of the assistant. A `developer`
    message is a system turn.

    Args:
        tools: What becomes of a row whose prompt has a turn that calls a tool or is a tool's. reject: it is a reject.
            keep: such turns and the definitions of the tools are part of the prompt. Stages reject the prompts where
            the model's chat template does not write them.

    Rejected: an output of several messages, an answer that calls tools, identical or empty answers, a non-preferred
    answer with the higher score.
    """
    keep_tools = tools == "keep"
    asked = row["input"] if isinstance(row["input"], dict) else {"messages": row["input"]}
    prompt = tool_definitions(asked) if keep_tools else []
    prompt += turns_by(asked.get("messages"), "input.messages", OPENAI, keep_tools)
    better, worse = (answer(chat(row[name], name), name) for name in ("preferred_output", "non_preferred_output"))
    return _preference(row, prompt, better, worse, "openai-preference", ("preferred_output", "non_preferred_output"))


# ---- ShareGPT --------------------------------------------------------------------------------------------------------


@row_format("sharegpt-preference", "conversations", "chosen", "rejected", left_out=tool_fields)
def sharegpt_preference(row: Any, *, tools: PairTools = "reject") -> Ranking:
    """ShareGPT-style pairs (LLaMA-Factory): rows {conversations, chosen, rejected} of turns {from, value}.

    Ranks: chosen 1, rejected 2, unless `score_chosen` and `score_rejected` are equal, which is a tie; scores stay with
    the candidates. The format does not say in which order the answers were shown or who wrote them. The prompt is
    `conversations`, after `system` where the row has one. `chosen` and `rejected` may be text, as in MedicalGPT's files
    with tools.

    Args:
        tools: What becomes of a row whose prompt has a turn that calls a tool or is a tool's. reject: it is a reject.
            keep: such turns and the definitions of the tools are part of the prompt. Stages reject the prompts where
            the model's chat template does not write them.

    Rejected: an answer that is not the assistant's text, identical or empty answers, a rejected answer with the higher
    score.
    """
    prompt = sharegpt_chat(row, tools == "keep")
    better, worse = (
        row[name] if isinstance(row[name], str) else answer(chat([row[name]], name, SHAREGPT), name)
        for name in ("chosen", "rejected")
    )
    return _preference(row, prompt, better, worse, "sharegpt-preference")


def sharegpt_chat(row: Mapping[str, Any], keep_tools: bool = False) -> list[Message]:
    """The turns of a ShareGPT row: `conversations`, after `system` where the row has one.

    Args:
        keep_tools: Turns of tools are kept, and the definitions of the tools come first.

    Raises:
        BadRecord: They are not a list of turns {from, value} of people and models, and of tools where these are kept.
    """
    defined = tool_definitions(row) if keep_tools else []
    system = text_if_any(row, "system")
    said = turns_by(row.get("conversations"), "conversations", SHAREGPT, keep_tools)
    return [*defined, *([Message("system", system)] if system else []), *said]
