"""Pairs in which the names of two fields say which answer is the better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from data_tools.published.table import PUBLISHED, Beginning
from data_tools.reading.fields import answer, as_jsonl, before_prompt, need, one_of, ranks_of_two, text
from data_tools.reading.rows import JSON
from data_tools.reading.turns import shared_turns, turns_of
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking


def _pair(prompt: Sequence[Message], better: str, worse: str, source: str, kind: Any = "unknown") -> Ranking:
    candidates = tuple(Candidate(said, author_kind=kind) for said in (better, worse))
    return Ranking(tuple(prompt), source=source, candidates=candidates, ranks=(1, 2))


# ---- LLaMA-Factory v1 ------------------------------------------------------------------------------------------------


def _detect_llamafactory(head: Beginning) -> str | None:
    found = head.all_have("chosen_messages", "rejected_messages")
    return "its rows have `chosen_messages` and `rejected_messages`" if found else None


def _sample_turn(role: str, said: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "value": said}], "loss_weight": float(role == "assistant")}


_LLAMAFACTORY_SAMPLE = as_jsonl(
    {
        "chosen_messages": [_sample_turn("user", "Name a fruit."), _sample_turn("assistant", "Pear.")],
        "rejected_messages": [_sample_turn("user", "Name a fruit."), _sample_turn("assistant", "Car.")],
    }
)


@PUBLISHED.row("llamafactory-preference", suffixes=JSON, sample=_LLAMAFACTORY_SAMPLE, detect=_detect_llamafactory)
def llamafactory_preference(row: Any) -> Ranking:
    """LLaMA-Factory v1 pairs: rows {chosen_messages, rejected_messages} of whole chats.

    Ranks: chosen 1, rejected 2; the format has no ties, and does not say in which order the answers were shown or who
    wrote them. The prompt is the turns with which both chats begin. A turn's content is text or a list of parts
    {type: text, value}. Demonstrations {messages} of the same form are imported as openai-chat.

    Rejected: chats that differ before the last turn, parts that are not text, turns of tools, identical or empty
    answers.
    """
    need(row, "chosen_messages", "rejected_messages")
    better, worse = (turns_of(row[name], name, "assistant") for name in ("chosen_messages", "rejected_messages"))
    same = shared_turns([better, worse])
    best, other = answer(better[same:], "chosen_messages"), answer(worse[same:], "rejected_messages")
    return _pair(better[:same], best, other, "llamafactory")


# ---- axolotl ---------------------------------------------------------------------------------------------------------


def _detect_axolotl(head: Beginning) -> str | None:
    if head.all_have("instruction", "chosen_response", "rejected_response"):
        return "its rows have `instruction`, `chosen_response` and `rejected_response`"
    turns = head.all_have("messages", "chosen", "rejected") and all(
        isinstance(row[name], dict) for row in head.rows for name in ("chosen", "rejected")
    )
    return "its rows have `messages`, and `chosen` and `rejected` are one turn" if turns else None


_AXOLOTL_SAMPLE = as_jsonl(
    {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a fruit."}],
        "chosen": {"role": "assistant", "content": "Pear."},
        "rejected": {"role": "assistant", "content": "Car."},
    }
)


@PUBLISHED.row("axolotl-preference", suffixes=JSON, sample=_AXOLOTL_SAMPLE, detect=_detect_axolotl)
def axolotl_preference(row: Any) -> Ranking:
    """axolotl pairs: rows {messages, chosen, rejected} of turns, or {instruction, chosen_response, rejected_response}.

    Ranks: chosen 1, rejected 2; the format has no ties, and does not say in which order the answers were shown or who
    wrote them. `system` comes before `instruction`. Read are axolotl's types `chat_template.default` and `*.argilla`.
    Its other types with `chosen` and `rejected` text or lists (`*.intel` with `question`, `*.icr` with `input`,
    `*.prompt_pairs`, `*.ultra`, `chat_template.argilla_chat`) are imported as trl-preference, and types with fields of
    your own by the csv mapping.

    Rejected: an answer that is not the assistant's, turns of tools, identical or empty answers.
    """
    if isinstance(row, dict) and "chosen_response" in row:
        need(row, "instruction", "chosen_response", "rejected_response")
        said = turns_of(row["instruction"], "instruction", "user")
        better, worse = text(row, "chosen_response"), text(row, "rejected_response")
    else:
        need(row, "messages", "chosen", "rejected")
        said = turns_of(row["messages"], "messages", "user")
        better, worse = (answer(turns_of(row[name], name, "assistant"), name) for name in ("chosen", "rejected"))
    return _pair([*before_prompt(row, said), *said], better, worse, "axolotl")


# ---- MedicalGPT ------------------------------------------------------------------------------------------------------


def _detect_medicalgpt(head: Beginning) -> str | None:
    found = head.all_have("question", "response_chosen", "response_rejected")
    return "its rows have `question`, `response_chosen` and `response_rejected`" if found else None


_MEDICALGPT_SAMPLE = as_jsonl(
    {
        "system": "",
        "history": [["My tooth aches.", "Brush it."]],
        "question": "It still aches.",
        "response_chosen": "See a dentist.",
        "response_rejected": "Ignore it.",
    }
)


@PUBLISHED.row("medicalgpt", suffixes=JSON, sample=_MEDICALGPT_SAMPLE, detect=_detect_medicalgpt)
def medicalgpt(row: Any) -> Ranking:
    """MedicalGPT pairs: rows {system, history, question, response_chosen, response_rejected}.

    Ranks: response_chosen 1, response_rejected 2; the format has no ties, and does not say in which order the answers
    were shown or who wrote them. The prompt is `question`, after `system` and `history`, a list of [user, assistant].
    Checked against data/reward/dpo_zh_500.jsonl of shibing624/MedicalGPT; its newer toolcall_dpo_zh_demo.jsonl is
    imported as sharegpt-preference.

    Rejected: another `history`, identical or empty answers.
    """
    need(row, "question", "response_chosen", "response_rejected")
    said = [Message("user", text(row, "question"))]
    better, worse = text(row, "response_chosen"), text(row, "response_rejected")
    return _pair([*before_prompt(row, said), *said], better, worse, "medicalgpt")


# ---- CValues ---------------------------------------------------------------------------------------------------------


def _detect_cvalues(head: Beginning) -> str | None:
    return "its rows have `pos_resp` and `neg_resp`" if head.all_have("prompt", "pos_resp", "neg_resp") else None


_CVALUES_SAMPLE = as_jsonl({"prompt": "How do I open a jar?", "pos_resp": "Warm the lid.", "neg_resp": "Use a hammer."})


@PUBLISHED.row("cvalues", suffixes=JSON, sample=_CVALUES_SAMPLE, detect=_detect_cvalues)
def cvalues(row: Any) -> Ranking:
    """CValues-Comparison: rows {prompt, pos_resp, neg_resp, pos_type, neg_type}.

    Ranks: pos_resp 1, neg_resp 2; the format has no ties, and does not say in which order the answers were shown.
    Models wrote the answers; a reward model and ChatGPT judged: advice with a refusal is better than a refusal, and
    that than an unsafe answer. `pos_type` and `neg_type` say of which of these kinds an answer is. Checked against the
    README of X-PLUG/CValues and the fields on the dataset card of mxz/CValues.

    Rejected: identical or empty answers.
    """
    need(row, "prompt", "pos_resp", "neg_resp")
    prompt = turns_of(row["prompt"], "prompt", "user")
    return _pair(prompt, text(row, "pos_resp"), text(row, "neg_resp"), "cvalues", "model")


# ---- Stack Exchange, paired ------------------------------------------------------------------------------------------


def _detect_paired(head: Beginning) -> str | None:
    found = head.all_have("question", "response_j", "response_k")
    return "its rows have `question`, `response_j` and `response_k`" if found else None


_PAIRED_SAMPLE = as_jsonl(
    {"qid": 1, "question": "How do I sort a list?", "response_j": "Use `sorted`.", "response_k": "By hand."}
)


@PUBLISHED.row("stack-exchange-paired", suffixes=JSON, sample=_PAIRED_SAMPLE, detect=_detect_paired)
def stack_exchange_paired(row: Any) -> Ranking:
    """Stack Exchange pairs (lvwerra/stack-exchange-paired): rows {question, response_j, response_k}.

    Ranks: response_j 1, response_k 2, by their votes; the format has no ties. The preference is that of all voters:
    there is no annotator and no order shown. People wrote the answers. Checked against the fields that cards of its
    copies list (qid, question, date, metadata, response_j, response_k) and the loaders of reward models, which take
    response_j as chosen.

    Rejected: identical or empty answers.
    """
    need(row, "question", "response_j", "response_k")
    prompt = [Message("user", text(row, "question"))]
    return _pair(prompt, text(row, "response_j"), text(row, "response_k"), "stack-exchange-paired", "person")


# ---- PKU-SafeRLHF ----------------------------------------------------------------------------------------------------


def _detect_saferlhf(head: Beginning) -> str | None:
    for judged in ("better_response_id", "safer_response_id"):
        if head.all_have("prompt", "response_0", "response_1", judged):
            return f"its rows have `prompt`, `response_0`, `response_1` and `{judged}`"
    return None


_SAFERLHF_SAMPLE = as_jsonl(
    {
        "prompt": "How do I open a stuck jar?",
        "response_0": "Hit it with a hammer.",
        "response_1": "Warm the lid under hot water.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 1,
        "safer_response_id": 1,
    }
)


_SAFERLHF_LEFT_OUT = ("better_response_id", "safer_response_id", "response_0_sha256", "response_1_sha256")


@PUBLISHED.row(
    "pku-saferlhf",
    suffixes=JSON,
    sample=_SAFERLHF_SAMPLE,
    detect=_detect_saferlhf,
    left_out=_SAFERLHF_LEFT_OUT,
)
def pku_saferlhf(row: Any, *, by: Literal["better", "safer"] = "better") -> Ranking:
    """PKU-SafeRLHF: rows {prompt, response_0, response_1, better_response_id, safer_response_id}.

    Ranks: the response with the number in `better_response_id` (or `safer_response_id`) 1, the other 2; the format has
    no ties, and names neither annotators nor the order shown. Models wrote the answers; `response_0_source` and
    `response_1_source` name them. The judgement that is not chosen is left out, and so are hashes.

    Args:
        by: better: the more helpful response wins. safer: the less harmful one. The two often disagree; import the
            file once by each for a reward model of helpfulness and one of harmlessness.

    Rejected: another number, a safer response that is marked unsafe while the other is marked safe, identical or empty
    answers, a missing judgement (the single-dimension data has only better).
    """
    judged = f"{by}_response_id"
    need(row, "prompt", "response_0", "response_1", judged)
    winner = one_of(row[judged], judged, (0, 1))
    safe = [row.get(f"is_response_{i}_safe") for i in (0, 1)]
    if by == "safer" and safe[winner] is False and safe[1 - winner] is True:
        remedy = "Annotate the row again, or leave it out."
        raise BadRecord("safer_response_id: contradicts is_response_0_safe and is_response_1_safe", f"{winner}", remedy)
    candidates = tuple(
        Candidate(text(row, f"response_{i}"), text(row, f"response_{i}_source", optional=True), "model") for i in (0, 1)
    )
    prompt = turns_of(row["prompt"], "prompt", "user")
    ranks = ranks_of_two(2 * winner - 1)
    return Ranking(tuple(prompt), source="pku-saferlhf", candidates=candidates, ranks=ranks)
