"""Rows of K answers: RewardBench 2, RM-Bench, Nectar."""

from __future__ import annotations

from typing import Any

from data_tools.published.table import PUBLISHED, Beginning, are_lists_of_text
from data_tools.reading.annotation_exports import brief
from data_tools.reading.fields import as_jsonl, elements, need, number, text
from data_tools.reading.rows import JSON
from data_tools.reading.turns import turns_of
from rlhf.data.schema import BadRecord, Candidate, Ranking, dense_ranks

# ---- RewardBench 2, RM-Bench -----------------------------------------------------------------------------------------


def _detect_reward_bench(head: Beginning) -> str | None:
    found = head.all_have("prompt") and are_lists_of_text(head, "chosen", "rejected")
    return "its rows have a `prompt`, and `chosen` and `rejected` are lists of texts" if found else None


_REWARD_BENCH_SAMPLE = as_jsonl(
    {
        "id": "1",
        "prompt": "Name a colour of the rainbow.",
        "chosen": ["Red.", "Blue."],
        "rejected": ["Pink.", "Brown."],
        "subset": "Ties",
    }
)


@PUBLISHED.row("reward-bench-2", suffixes=JSON, sample=_REWARD_BENCH_SAMPLE, detect=_detect_reward_bench)
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
    need(row, "prompt", "chosen", "rejected")
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
    return Ranking(
        tuple(turns_of(row["prompt"], "prompt", "user")),
        source=source,
        group=text(row, "domain", optional=True) or text(row, "subset", optional=True) or None,
        candidates=tuple(map(Candidate, better + worse)),
        ranks=(1,) * len(better) + (2,) * len(worse),
    )


# ---- Nectar ----------------------------------------------------------------------------------------------------------


def _detect_nectar(head: Beginning) -> str | None:
    found = head.all_have("prompt", "answers") and all(
        isinstance(row["answers"], list)
        and row["answers"]
        and all(isinstance(item, dict) and item.keys() >= {"answer", "rank"} for item in row["answers"])
        for row in head.rows
    )
    return "its rows have a `prompt` and `answers` with a `rank`" if found else None


_NECTAR_SAMPLE = as_jsonl(
    {
        "prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ",
        "answers": [
            {"answer": "Car.", "model": "m7", "rank": 3.0},
            {"answer": "Pear.", "model": "m1", "rank": 1.0},
            {"answer": "A plant.", "model": "m2", "rank": 2.0},
        ],
        "turns": 1,
        "num_responses": 3,
        "good_natured": True,
    }
)


@PUBLISHED.row("nectar", suffixes=JSON, sample=_NECTAR_SAMPLE, detect=_detect_nectar)
def nectar(row: Any) -> Ranking:
    """Nectar: rows {prompt, answers[{answer, model, rank}]} of seven answers ranked by GPT-4.

    Ranks: `rank` 1 is the best, equal ranks are a tie. ``Human:`` and ``Assistant:`` mark the turns of the prompt.
    `model` is the author, and the annotator is "gpt-4". The format does not keep the order shown.

    Rejected, as a whole: a rank that is not a number from 1, an empty answer, the same answer at two ranks.
    """
    need(row, "prompt", "answers")
    answers = [need(item, "answer", "rank") for item in elements(row, "answers")]
    return Ranking(
        tuple(turns_of(row["prompt"], "prompt", "user")),
        source="nectar",
        candidates=tuple(
            Candidate(text(item, "answer"), text(item, "model", optional=True), "model") for item in answers
        ),
        ranks=dense_ranks(number(item["rank"], "rank", 1, 1000) for item in answers),
        annotator="gpt-4",
    )
