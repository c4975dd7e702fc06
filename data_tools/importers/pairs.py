"""Importers of preference pairs that name the better and the worse answer: HH-RLHF, TRL, OpenAI, ShareGPT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
    spoken,
    tool_definitions,
    tool_fields,
    turns_by,
    turns_of,
)
from rlhf.data.columns import Row, ranking_row
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking, brief

# ---- HH-RLHF ---------------------------------------------------------------------------------------------------------

_QUESTION, _ANSWER = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_MOST_EXCHANGES = 50
"""A usual row has no more."""
_SPEAKERS = ("user", "assistant") * _MOST_EXCHANGES


_detect_hh = rows_have(
    "chosen",
    "rejected",
    where=lambda row: "prompt" not in row and is_transcript(row["chosen"]) and is_transcript(row["rejected"]),
    why="its rows have `chosen` and `rejected` transcripts that begin with 'Human:' or 'Assistant:'",
)


def _usual(row: Any) -> Row | None:
    """The ranking of a row as nearly all are, or None: this is most of an import's time.

    Such a row is two texts and nothing else. They begin with a question, the speakers take turns, no turn is empty, and
    the second text repeats the first up to the last answer. It then needs no check, also not for a transcript inside
    one text.
    """
    if type(row) is not dict or len(row) != 2:
        return None
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if type(chosen) is not str or type(rejected) is not str:
        return None
    *exchanges, best = chosen.split(_ANSWER)
    start = len(chosen) - len(best)
    if not 0 < len(exchanges) <= _MOST_EXCHANGES or not rejected.startswith(chosen[:start]):
        return None
    other = rejected[start:]
    if (":" in best and _QUESTION in best) or (":" in other and (_QUESTION in other or _ANSWER in other)):
        return None  # a single character is found much faster, and most answers have no colon
    turns: list[str] = []
    for exchange in exchanges:  # an answer (before the first question: nothing) and the next question
        said = exchange.split(_QUESTION)
        if len(said) != 2:
            return None
        turns += said
    turns = [turn.strip() for turn in turns]
    best, other = best.strip(), other.strip()
    if turns.pop(0) or not (all(turns) and best and other and best != other):
        return None
    try:
        prompt = list(zip(_SPEAKERS, turns))
        return ranking_row(prompt, (best, other), _candidates(best, other), (1, 2), "hh-rlhf")
    except TypeError:  # a lone surrogate
        return None


@row_format("hh-rlhf", detect=_detect_hh, usual=_usual)
def hh_rlhf(row: Any) -> Ranking:
    """Anthropic HH-RLHF: rows {chosen, rejected} of whole transcripts that share all but the last answer.

    Ranks: chosen 1, rejected 2; the format has no ties. The format does not say in which order the
    answers were shown. The prompt is the turns before the last answer. A model wrote both answers, a crowdworker
    chose; the format names neither.

    Turns are marked by a blank line and ``Human:`` or ``Assistant:``. Two marks of one speaker in a row are one turn,
    joined by a blank line: in the published data the model wrote the second mark inside its own answer, and the
    annotator saw and judged the whole. White space around a turn is dropped.

    Rejected: an empty or missing answer, two identical answers, transcripts that differ before the last answer (what
    was preferred is then not an answer to one prompt), and text that does not begin and end with a turn.
    """
    if not isinstance(row, dict) or not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
        remedy = 'Each line needs {"chosen": text, "rejected": text}; is this the right format name?'
        raise BadRecord("not a row of chosen and rejected text", remedy=remedy)
    prompt, best = _transcript(row["chosen"], "chosen")
    other_prompt, other = _transcript(row["rejected"], "rejected")
    if other_prompt != prompt:
        remedy = "Import such rows as two demonstrations, or cut both transcripts at the last common turn."
        raise BadRecord("the transcripts differ before the last answer", remedy=remedy)
    if best == other:
        raise BadRecord("the two answers are identical", remedy="Nothing was preferred; leave the row out.")
    candidates = tuple(Candidate(*candidate) for candidate in _candidates(best, other))
    return Ranking(prompt, source="hh-rlhf", candidates=candidates, ranks=(1, 2))


def _candidates(chosen: str, rejected: str) -> tuple[tuple[str, str, Literal["model"], None], ...]:
    """The fields of both candidates."""
    return (chosen, "", "model", None), (rejected, "", "model", None)


def _transcript(text: str, field: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last answer, and that answer."""
    head, *parts = _TURN.split("\n\n" + text.lstrip())
    if head or not parts:
        remedy = "Begin the transcript with a blank line and 'Human:'."
        raise BadRecord("a transcript does not begin with 'Human:' or 'Assistant:'", field, remedy)
    *prompt, (last, answer) = spoken(parts)
    if last != "assistant":
        raise BadRecord("a transcript does not end with 'Assistant:'", field, "Cut it after its last answer.")
    if not answer:
        raise BadRecord("an answer is empty", field, "Leave the row out, or write the answer.")
    return tuple(prompt), answer


# ---- TRL -------------------------------------------------------------------------------------------------------------


PairTools = Literal["reject", "keep"]


def _is_pair(row: Mapping[str, Any]) -> bool:
    sides = row["chosen"], row["rejected"]
    messages = all(is_list_of(dict, side) for side in sides)
    return "instruction" not in row and (messages or all(isinstance(side, str) for side in sides))


_pairs = rows_have("chosen", "rejected", where=_is_pair, why="its rows have `chosen` and `rejected`, texts or messages")


def _detect_trl(head: FileHead) -> str | None:
    return None if _detect_hh(head) else _pairs(head)


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
