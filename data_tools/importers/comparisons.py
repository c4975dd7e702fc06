"""Importers of published comparisons of two answers, with a label or scores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.importers.table import IMPORTERS, Head, convert_rows
from data_tools.reading.fields import as_jsonl, chat, elements, need, number, one_of, ranks_of_two, text
from data_tools.reading.judgements import ranks_with_scores
from data_tools.reading.rows import JSON
from rlhf.data.jsonl import OnReject
from rlhf.data.schema import BadRecord, Candidate, Message, Ranking, Record

SPLITS = {"train": "train", "valid1": "eval", "valid2": "eval", "validation": "eval", "test": "test"}
"""What published datasets call their splits."""


# ---- summarize-from-feedback -----------------------------------------------------------------------------------------


def _detect_summarize(head: Head) -> str | None:
    found = head.all_have("info", "summaries", "choice")
    return "its rows have `info`, `summaries` and `choice`" if found else None


SUMMARIZE_SAMPLE = as_jsonl(
    {
        "info": {"id": "t3_1", "subreddit": "advice", "title": "My car", "post": "Somebody hit my car."},
        "summaries": [{"text": " My car was hit.", "policy": "ref"}, {"text": " Cars.", "policy": "sup4"}],
        "choice": 0,
        "worker": "w1",
        "split": "train",
        "extra": {"confidence": 2},
    }
)


@IMPORTERS.row("summarize-from-feedback", suffixes=JSON, sample=SUMMARIZE_SAMPLE, detect=_detect_summarize)
def summarize_from_feedback(path: Path, reject: OnReject) -> Iterator[Record]:
    """OpenAI summarize-from-feedback comparisons: rows {info, summaries[2], choice, worker, split}.

    Ranks: `choice` 0 = summaries[0] is the better, 1 = summaries[1]; the format has no ties, and does not say
    whether the summaries are in the order shown. `worker` is the annotator, `policy` the author ("ref" is the person
    who wrote the post). `extra.confidence` is not used: its scale is not documented.

    The prompt is as Stiennon et al. 2020 gave it to their models: ``SUBREDDIT: r/...``, ``TITLE: ...``, ``POST: ...``,
    ``TL;DR:``; for news articles the article and ``TL;DR:``. White space around a summary is dropped. Splits stay:
    valid1 and valid2 become eval.

    Rejected: rows of the axis evaluations (one summary with ratings), equal or empty summaries, another choice.
    """
    return convert_rows(path, reject, _summaries)


def _summaries(row: Any) -> Ranking:
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
        split=SPLITS.get(text(row, "split", optional=True)),
        candidates=tuple(_summary(need(summary)) for summary in summaries),
        ranks=ranks_of_two(2 * one_of(row["choice"], "choice", (0, 1)) - 1),
        annotator=text(row, "worker", optional=True),
    )


def _summary(summary: dict[str, Any]) -> Candidate:
    policy = text(summary, "policy", optional=True)
    return Candidate(text(summary, "text").strip(), policy, "person" if policy == "ref" else "model")


# ---- WebGPT ----------------------------------------------------------------------------------------------------------


def _detect_webgpt(head: Head) -> str | None:
    if head.all_have("question", "answer_0", "answer_1", "score_0", "score_1"):
        return "its rows have `question`, `answer_0`, `answer_1` and their scores"
    return None


WEBGPT_SAMPLE = as_jsonl(
    {
        "question": {"dataset": "eli5", "id": "1", "full_text": "Why is the sky blue?"},
        "answer_0": "Air scatters blue light most [1].",
        "answer_1": "It is.",
        "score_0": 0.5,
        "score_1": -0.5,
    }
)


@IMPORTERS.row("webgpt", suffixes=JSON, sample=WEBGPT_SAMPLE, detect=_detect_webgpt)
def webgpt(path: Path, reject: OnReject) -> Iterator[Record]:
    """WebGPT comparisons: rows {question{full_text}, answer_0, answer_1, score_0, score_1}.

    Ranks: the higher score is the better answer, equal scores are a tie. Scores go from -1 to 1 and sum to 0 (dataset
    card of openai/webgpt_comparisons). The format says neither the order shown nor who judged or wrote.
    The prompt is the question; `quotes` differ between the answers and are left out, marks such as [1] stay.

    Rejected: a score outside -1 to 1, equal or empty answers.
    """
    return convert_rows(path, reject, _webgpt)


def _webgpt(row: Any) -> Ranking:
    need(row, "question", "answer_0", "answer_1", "score_0", "score_1")
    question = row["question"]
    asked = question if isinstance(question, str) else text(need(question, "full_text"), "full_text")
    scores = [number(row[name], name, -1, 1) for name in ("score_0", "score_1")]
    answers = [text(row, name) for name in ("answer_0", "answer_1")]
    return Ranking(
        (Message("user", asked),),
        source="webgpt",
        candidates=tuple(Candidate(answer, score=score) for answer, score in zip(answers, scores)),
        ranks=ranks_of_two(scores[1] - scores[0]),
    )


# ---- SHP -------------------------------------------------------------------------------------------------------------


def _detect_shp(head: Head) -> str | None:
    found = head.all_have("history", "human_ref_A", "human_ref_B", "labels")
    return "its rows have `history`, `human_ref_A`, `human_ref_B` and `labels`" if found else None


SHP_SAMPLE = as_jsonl(
    {
        "post_id": "a1",
        "domain": "askculinary_train",
        "history": "How long do I boil an egg?",
        "human_ref_A": "Eight minutes.",
        "human_ref_B": "Ask a hen.",
        "labels": 1,
        "score_A": 52,
        "score_B": 4,
    }
)


@IMPORTERS.row("shp", suffixes=JSON, sample=SHP_SAMPLE, detect=_detect_shp)
def shp(path: Path, reject: OnReject) -> Iterator[Record]:
    """Stanford Human Preferences (SHP, SHP-2): rows {history, human_ref_A, human_ref_B, labels, score_A, score_B}.

    Ranks: `labels` 1 = human_ref_A is the better, 0 = human_ref_B (dataset card); equal scores are a tie. The
    preference is that of all voters: there is no annotator and no order shown. People wrote both answers. The scores
    (votes) are kept with the candidates. `domain` is the group, and gives the split where it ends in one:
    askculinary_train.

    Rejected: another label, a label that contradicts the scores, equal or empty answers.
    """
    return convert_rows(path, reject, _shp)


def _shp(row: Any) -> Ranking:
    need(row, "history", "human_ref_A", "human_ref_B", "labels")
    a_is_better = one_of(row["labels"], "labels", (0, 1))
    votes = [None if row.get(name) is None else number(row[name], name, -1e9, 1e9) for name in ("score_A", "score_B")]
    ranks = ranks_with_scores(ranks_of_two(1 - 2 * a_is_better), votes, ("human_ref_A", "human_ref_B"))
    domain = text(row, "domain", optional=True)
    name, _, split = domain.rpartition("_")
    return Ranking(
        (Message("user", text(row, "history")),),
        source="shp",
        group=(name if split in SPLITS else domain) or None,
        split=SPLITS.get(split),
        candidates=tuple(
            Candidate(text(row, field), author_kind="person", score=score)
            for field, score in zip(("human_ref_A", "human_ref_B"), votes)
        ),
        ranks=ranks,
    )


# ---- HelpSteer3 ------------------------------------------------------------------------------------------------------


def _detect_helpsteer3(head: Head) -> str | None:
    if head.all_have("context", "response1", "response2", "overall_preference"):
        return "its rows have `context`, `response1`, `response2` and `overall_preference`"
    if head.all_have("prompt", "response_1", "response_2", "preference_strength"):
        return "its rows have `prompt`, `response_1`, `response_2` and `preference_strength`"
    return None


HELPSTEER3_SAMPLE = as_jsonl(
    {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": "Name a fruit."}],
        "response1": "Car.",
        "response2": "Pear.",
        "overall_preference": 2,
    }
)


HELPSTEER3_LEFT_OUT = (
    "individual_preference", "preference_statement", "preference_elaboration", "three_most_similar_preferences",
    "all_preferences_unprocessed",
)  # fmt: skip


@IMPORTERS.row("helpsteer3", suffixes=JSON, sample=HELPSTEER3_SAMPLE, detect=_detect_helpsteer3)
def helpsteer3(path: Path, reject: OnReject) -> Iterator[Record]:
    """HelpSteer3 preferences: rows {context, response1, response2, overall_preference}; also HelpSteer2's.

    Ranks: a negative preference (from -3) = response1 is the better, a positive one (to 3) = response2, 0 = a tie
    (dataset card of nvidia/HelpSteer3). It is aggregated from several annotators. The format names neither them nor the
    order shown; models wrote the answers. HelpSteer2's preference.jsonl has `prompt`, `response_1`, `response_2` and
    `preference_strength` with the same meaning. `domain` is the group. Left out are the preferences before the
    aggregation (`individual_preference`, `all_preferences_unprocessed`, ...) and the words that explain them.

    Rejected: a preference outside -3 to 3, equal or empty answers, a context that does not end with the user.
    """
    return convert_rows(path, reject, _helpsteer3, HELPSTEER3_LEFT_OUT)


def _helpsteer3(row: Any) -> Ranking:
    third = isinstance(row, dict) and "overall_preference" in row
    names = ("context", "response1", "response2", "overall_preference")
    asked, one, two, judged = names if third else ("prompt", "response_1", "response_2", "preference_strength")
    need(row, asked, one, two, judged)
    return Ranking(
        marked_prompt(row[asked]) if isinstance(row[asked], str) else tuple(chat(row[asked], asked)),
        source="helpsteer3" if third else "helpsteer2",
        group=text(row, "domain", optional=True) or None,
        candidates=tuple(Candidate(text(row, name), author_kind="model") for name in (one, two)),
        ranks=ranks_of_two(number(row[judged], judged, -3, 3)),
    )


_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def marked_prompt(prompt: str) -> tuple[Message, ...]:
    """The turns of a HelpSteer prompt, in which ``<extra_id_1>User`` and ``<extra_id_1>Assistant`` mark the later."""
    first, *later = _MARK.split(prompt)
    turns = [Message("user", first)] if first or not later else []
    roles: dict[str, Literal["user", "assistant"]] = {"User": "user", "Assistant": "assistant"}
    return (*turns, *(Message(roles[role], said) for role, said in zip(later[::2], later[1::2])))
