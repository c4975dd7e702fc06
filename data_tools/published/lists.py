"""Rows of K answers: RewardBench 2, RM-Bench, Nectar."""

from __future__ import annotations

from typing import Any

from data_tools.published.table import row_format, rows_have
from data_tools.reading.fields import elements, is_list_of, need, number, ranking, text, text_if_any
from data_tools.reading.turns import turns_of
from rlhf.data.schema import BadRecord, Ranking, brief, dense_ranks

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
