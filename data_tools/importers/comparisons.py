"""Importers of published comparisons of two answers, with a label or scores."""

from __future__ import annotations

import re
from typing import Any, Literal

from data_tools.published.table import any_of, row_format, rows_have
from data_tools.reading.fields import (
    chat,
    elements,
    need,
    number,
    one_of,
    ranking,
    ranks_of_two,
    text,
    text_if_any,
)
from data_tools.reading.judgements import ranks_with_scores
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking

SPLITS = {"train": "train", "valid1": "eval", "valid2": "eval", "validation": "eval", "test": "test"}
"""What published datasets call their splits."""


# ---- summarize-from-feedback -----------------------------------------------------------------------------------------


@row_format("summarize-from-feedback", detect=rows_have("info", "summaries", "choice"))
def summarize_from_feedback(row: Any) -> Ranking:
    """OpenAI summarize-from-feedback comparisons: rows {info, summaries[2], choice, worker, split}.

    Ranks: `choice` 0 = summaries[0] is the better, 1 = summaries[1]; the format has no ties, and does not say
    whether the summaries are in the order shown. `worker` is the annotator, `policy` the author ("ref" is the person
    who wrote the post). `extra.confidence` is not used: its scale is not documented.

    The prompt is as Stiennon et al. 2020 gave it to their models: ``SUBREDDIT: r/...``, ``TITLE: ...``, ``POST: ...``,
    ``TL;DR:``; for news articles the article and ``TL;DR:``. White space around a summary is dropped. Splits stay:
    valid1 and valid2 become eval.

    Rejected: rows of the axis evaluations (one summary with ratings), equal or empty summaries, another choice.
    """
    if isinstance(row, dict) and "summary" in row and "summaries" not in row:
        raise BadRecord("a rating of one summary, not a comparison", remedy="Import the files of `comparisons` only.")
    need(row, "info", "summaries", "choice")
    info, summaries = need(row["info"]), elements(row, "summaries")
    if len(summaries) != 2:
        raise BadRecord("summaries: not two", f"{len(summaries)}")
    if "article" in info:
        prompt = f"Article: {text(info, 'article')}\n\nTL;DR:"
    else:
        subreddit, title, post = (text(info, name) for name in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return Ranking(
        (Message("user", prompt),),
        source="summarize-from-feedback",
        split=SPLITS.get(text_if_any(row, "split")),
        candidates=tuple(_summary(need(summary)) for summary in summaries),
        ranks=ranks_of_two(2 * one_of(row["choice"], "choice", (0, 1)) - 1),
        annotator=text_if_any(row, "worker"),
    )


def _summary(summary: dict[str, Any]) -> Candidate:
    policy = text_if_any(summary, "policy")
    return Candidate(text(summary, "text").strip(), policy, "person" if policy == "ref" else "model")


# ---- WebGPT ----------------------------------------------------------------------------------------------------------


@row_format("webgpt", "question", "answer_0", "answer_1", "score_0", "score_1")
def webgpt(row: Any) -> Ranking:
    """WebGPT comparisons: rows {question{full_text}, answer_0, answer_1, score_0, score_1}.

    Ranks: the higher score is the better answer, equal scores are a tie. Scores go from -1 to 1 and sum to 0 (dataset
    card of openai/webgpt_comparisons). The format says neither the order shown nor who judged or wrote.
    The prompt is the question; `quotes` differ between the answers and are left out, marks such as [1] stay.

    Rejected: a score outside -1 to 1, equal or empty answers.
    """
    question = row["question"]
    asked = question if isinstance(question, str) else text(need(question, "full_text"), "full_text")
    scores = [number(row[name], name, -1, 1) for name in ("score_0", "score_1")]
    answers = [text(row, name) for name in ("answer_0", "answer_1")]
    return ranking("webgpt", asked, answers, ranks_of_two(scores[1] - scores[0]), scores=scores)


# ---- SHP -------------------------------------------------------------------------------------------------------------


@row_format("shp", "history", "human_ref_A", "human_ref_B", "labels")
def shp(row: Any) -> Ranking:
    """Stanford Human Preferences (SHP, SHP-2): rows {history, human_ref_A, human_ref_B, labels, score_A, score_B}.

    Ranks: `labels` 1 = human_ref_A is the better, 0 = human_ref_B (dataset card); equal scores are a tie. The
    preference is that of all voters: there is no annotator and no order shown. People wrote both answers. The scores
    (votes) are kept with the candidates. `domain` is the group, and gives the split where it ends in one:
    askculinary_train.

    Rejected: another label, a label that contradicts the scores, equal or empty answers.
    """
    names = ("human_ref_A", "human_ref_B")
    a_is_better = one_of(row["labels"], "labels", (0, 1))
    votes = [None if row.get(name) is None else number(row[name], name, -1e9, 1e9) for name in ("score_A", "score_B")]
    ranks = ranks_with_scores(ranks_of_two(1 - 2 * a_is_better), votes, names)
    domain = text_if_any(row, "domain")
    topic, _, split = domain.rpartition("_")
    answers = [text(row, name) for name in names]
    facts = {"group": topic if split in SPLITS else domain, "split": SPLITS.get(split)}
    return ranking("shp", text(row, "history"), answers, ranks, kind="person", scores=votes, **facts)


# ---- HelpSteer3 ------------------------------------------------------------------------------------------------------

HELPSTEER3_LEFT_OUT = (
    "individual_preference", "preference_statement", "preference_elaboration", "three_most_similar_preferences",
    "all_preferences_unprocessed",
)  # fmt: skip


@row_format(
    "helpsteer3",
    detect=any_of(
        rows_have("context", "response1", "response2", "overall_preference"),
        rows_have("prompt", "response_1", "response_2", "preference_strength"),
    ),
    left_out=HELPSTEER3_LEFT_OUT,
)
def helpsteer3(row: Any) -> Ranking:
    """HelpSteer3 preferences: rows {context, response1, response2, overall_preference}; also HelpSteer2's.

    Ranks: a negative preference (from -3) = response1 is the better, a positive one (to 3) = response2, 0 = a tie
    (dataset card of nvidia/HelpSteer3). It is aggregated from several annotators. The format names neither them nor the
    order shown; models wrote the answers. HelpSteer2's preference.jsonl has `prompt`, `response_1`, `response_2` and
    `preference_strength` with the same meaning. `domain` is the group. Left out are the preferences before the
    aggregation (`individual_preference`, `all_preferences_unprocessed`, ...) and the words that explain them.

    Rejected: a preference outside -3 to 3, equal or empty answers, a context that does not end with the user.
    """
    third = isinstance(row, dict) and "overall_preference" in row
    names = ("context", "response1", "response2", "overall_preference")
    asked, one, two, judged = names if third else ("prompt", "response_1", "response_2", "preference_strength")
    need(row, asked, one, two, judged)
    return ranking(
        "helpsteer3" if third else "helpsteer2",
        marked_prompt(row[asked]) if isinstance(row[asked], str) else chat(row[asked], asked),
        (text(row, one), text(row, two)),
        ranks_of_two(number(row[judged], judged, -3, 3)),
        kind="model",
        group=text_if_any(row, "domain"),
    )


_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def marked_prompt(prompt: str) -> tuple[Message, ...]:
    """The turns of a HelpSteer prompt, in which ``<extra_id_1>User`` and ``<extra_id_1>Assistant`` mark the later."""
    first, *later = _MARK.split(prompt)
    turns = [Message("user", first)] if first or not later else []
    roles: dict[str, Literal["user", "assistant"]] = {"User": "user", "Assistant": "assistant"}
    return (*turns, *(Message(roles[role], said) for role, said in zip(later[::2], later[1::2])))
