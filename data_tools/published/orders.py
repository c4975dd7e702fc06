"""Rows of K answers with their order, and pairs in which the names of two fields say which answer is the better."""

from __future__ import annotations

from typing import Any, Literal

from data_tools.published.table import any_of, are, row_format, rows_have
from data_tools.reading.fields import (
    answer,
    elements,
    is_list_of,
    need,
    number,
    one_of,
    ranking,
    ranks_of_two,
    text,
    text_if_any,
    whole_prompt,
)
from data_tools.reading.turns import shared_turns, turns_of
from rlhf.data.schema import BadRecord, Message, Ranking, brief, dense_ranks

# ---- RewardBench 2, RM-Bench -----------------------------------------------------------------------------------------


def _holds_lists_of_texts(row: dict[str, Any]) -> bool:
    lists = row["chosen"], row["rejected"]
    return all(one and is_list_of(str, one) for one in lists)


@row_format(
    "reward-bench-2",
    "prompt",
    "chosen",
    "rejected",
    detect=rows_have(
        "prompt",
        "chosen",
        "rejected",
        where=_holds_lists_of_texts,
        why="its rows have a `prompt`, and `chosen` and `rejected` are lists of texts",
    ),
)
def reward_bench_2(row: Any) -> Ranking:
    """RewardBench 2 and RM-Bench: rows {prompt, chosen, rejected} with lists of texts, any number in each.

    Ranks: each answer of `chosen` 1, each of `rejected` 2; those of one list are a tie. So one ranking of K answers
    states every pair of a good and a bad answer, and none between two good ones (RewardBench 2's subset Ties, the three
    styles of RM-Bench). `domain`, else `subset`, is the group. The `source` is rm-bench if there is a `domain`, or
    three answers in each list and no count of them, else reward-bench-2; in the subset Ties also the row's `id`, as in
    `reward-bench-2/tied:1`, which its scoring needs (see docs/evaluate.md). The format names neither annotators nor the
    order shown; `models` is not used, since it is not said to be in the order of the answers.

    Rejected: an empty list, `num_correct` or `total_completions` that contradict the lists, an empty answer, one that
    is in both lists.
    """
    better, worse = elements(row, "chosen"), elements(row, "rejected")
    for name, answers in (("chosen", better), ("rejected", worse)):
        if not answers:
            raise BadRecord(f"{name}: no answer in the list")
    for name, count in (("num_correct", len(better)), ("total_completions", len(better) + len(worse))):
        if row.get(name, count) != count:
            raise BadRecord(f"{name}: not the number of answers", f"{brief(row[name])}, there are {count}")
    styles = len(better) == len(worse) == 3 and "num_correct" not in row  # RM-Bench's files of single domains
    source = "rm-bench" if "domain" in row or ("subset" in row and styles) else "reward-bench-2" * ("subset" in row)
    if source == "reward-bench-2" and str(row["subset"]).lower() == "ties" and isinstance(row.get("id"), str):
        source += f"/{row['id']}"
    return ranking(
        source,
        turns_of(row["prompt"], "prompt", "user"),
        better + worse,
        (1,) * len(better) + (2,) * len(worse),
        group=text_if_any(row, "domain") or text_if_any(row, "subset"),
    )


# ---- Nectar ----------------------------------------------------------------------------------------------------------


def _holds_ranked_answers(row: dict[str, Any]) -> bool:
    answers = row["answers"]
    return is_list_of(dict, answers) and answers and all(item.keys() >= {"answer", "rank"} for item in answers)


@row_format(
    "nectar",
    "prompt",
    "answers",
    detect=rows_have(
        "prompt", "answers", where=_holds_ranked_answers, why="its rows have a `prompt` and `answers` with a `rank`"
    ),
)
def nectar(row: Any) -> Ranking:
    """Nectar: rows {prompt, answers[{answer, model, rank}]} of seven answers ranked by GPT-4.

    Ranks: `rank` 1 is the best, equal ranks are a tie. ``Human:`` and ``Assistant:`` mark the turns of the prompt.
    `model` is the author, and the annotator is "gpt-4". The format does not keep the order shown.

    Rejected, as a whole: a rank that is not a number from 1, an empty answer, the same answer at two ranks.
    """
    answers = [need(item, "answer", "rank") for item in elements(row, "answers")]
    return ranking(
        "nectar",
        turns_of(row["prompt"], "prompt", "user"),
        [text(item, "answer") for item in answers],
        dense_ranks(number(item["rank"], "rank", 1, 1000) for item in answers),
        authors=[text_if_any(item, "model") for item in answers],
        kind="model",
        annotator="gpt-4",
    )


# ---- LLaMA-Factory v1 ------------------------------------------------------------------------------------------------


@row_format("llamafactory-preference", "chosen_messages", "rejected_messages")
def llamafactory_preference(row: Any) -> Ranking:
    """LLaMA-Factory v1 pairs: rows {chosen_messages, rejected_messages} of whole chats.

    Ranks: chosen 1, rejected 2; the format has no ties, and does not say in which order the answers were shown or who
    wrote them. The prompt is the turns with which both chats begin. A turn's content is text or a list of parts
    {type: text, value}. Demonstrations {messages} of the same form are imported as openai-chat.

    Rejected: chats that differ before the last turn, parts that are not text, turns of tools, identical or empty
    answers.
    """
    better, worse = (turns_of(row[name], name, "assistant") for name in ("chosen_messages", "rejected_messages"))
    same = shared_turns([better, worse])
    best, other = answer(better[same:], "chosen_messages"), answer(worse[same:], "rejected_messages")
    return ranking("llamafactory", better[:same], (best, other), (1, 2))


# ---- axolotl ---------------------------------------------------------------------------------------------------------


@row_format(
    "axolotl-preference",
    detect=any_of(
        rows_have("instruction", "chosen_response", "rejected_response"),
        rows_have(
            "messages",
            "chosen",
            "rejected",
            where=are(dict, "chosen", "rejected"),
            why="its rows have `messages`, and `chosen` and `rejected` are one turn",
        ),
    ),
)
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
    return ranking("axolotl", whole_prompt(row, said), (better, worse), (1, 2))


# ---- MedicalGPT ------------------------------------------------------------------------------------------------------


@row_format("medicalgpt", "question", "response_chosen", "response_rejected")
def medicalgpt(row: Any) -> Ranking:
    """MedicalGPT pairs: rows {system, history, question, response_chosen, response_rejected}.

    Ranks: response_chosen 1, response_rejected 2; the format has no ties, and does not say in which order the answers
    were shown or who wrote them. The prompt is `question`, after `system` and `history`, a list of [user, assistant].
    Checked against data/reward/dpo_zh_500.jsonl of shibing624/MedicalGPT; its newer toolcall_dpo_zh_demo.jsonl is
    imported as sharegpt-preference.

    Rejected: another `history`, identical or empty answers.
    """
    said = [Message("user", text(row, "question"))]
    answers = text(row, "response_chosen"), text(row, "response_rejected")
    return ranking("medicalgpt", whole_prompt(row, said), answers, (1, 2))


# ---- CValues ---------------------------------------------------------------------------------------------------------


@row_format("cvalues", "prompt", "pos_resp", "neg_resp")
def cvalues(row: Any) -> Ranking:
    """CValues-Comparison: rows {prompt, pos_resp, neg_resp, pos_type, neg_type}.

    Ranks: pos_resp 1, neg_resp 2; the format has no ties, and does not say in which order the answers were shown.
    Models wrote the answers; a reward model and ChatGPT judged: advice with a refusal is better than a refusal, and
    that than an unsafe answer. `pos_type` and `neg_type` say of which of these kinds an answer is. Checked against the
    README of X-PLUG/CValues and the fields on the dataset card of mxz/CValues.

    Rejected: identical or empty answers.
    """
    answers = text(row, "pos_resp"), text(row, "neg_resp")
    return ranking("cvalues", turns_of(row["prompt"], "prompt", "user"), answers, (1, 2), kind="model")


# ---- Stack Exchange, paired ------------------------------------------------------------------------------------------


@row_format("stack-exchange-paired", "question", "response_j", "response_k")
def stack_exchange_paired(row: Any) -> Ranking:
    """Stack Exchange pairs (lvwerra/stack-exchange-paired): rows {question, response_j, response_k}.

    Ranks: response_j 1, response_k 2, by their votes; the format has no ties. The preference is that of all voters:
    there is no annotator and no order shown. People wrote the answers. Checked against the fields that cards of its
    copies list (qid, question, date, metadata, response_j, response_k) and the loaders of reward models, which take
    response_j as chosen.

    Rejected: identical or empty answers.
    """
    answers = text(row, "response_j"), text(row, "response_k")
    return ranking("stack-exchange-paired", text(row, "question"), answers, (1, 2), kind="person")


# ---- PKU-SafeRLHF ----------------------------------------------------------------------------------------------------


_SAFERLHF_LEFT_OUT = ("better_response_id", "safer_response_id", "response_0_sha256", "response_1_sha256")


@row_format(
    "pku-saferlhf",
    "prompt",
    "response_0",
    "response_1",
    detect=any_of(
        *(rows_have("prompt", "response_0", "response_1", f"{by}_response_id") for by in ("better", "safer"))
    ),
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
    winner = one_of(need(row, judged)[judged], judged, (0, 1))
    safe = [row.get(f"is_response_{i}_safe") for i in (0, 1)]
    if by == "safer" and safe[winner] is False and safe[1 - winner] is True:
        remedy = "Annotate the row again, or leave it out."
        raise BadRecord("safer_response_id: contradicts is_response_0_safe and is_response_1_safe", f"{winner}", remedy)
    return ranking(
        "pku-saferlhf",
        turns_of(row["prompt"], "prompt", "user"),
        [text(row, f"response_{i}") for i in (0, 1)],
        ranks_of_two(2 * winner - 1),
        authors=[text_if_any(row, f"response_{i}_source") for i in (0, 1)],
        kind="model",
    )
