"""Win rates from people's rankings, against numbers counted by hand; no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest

from rlhf.core.errors import UserError
from rlhf.data.jsonl import from_dict
from rlhf.data.schema import Ranking
from rlhf.policy_evaluation.ranked import find_author, ranked_comparisons
from rlhf.policy_evaluation.tables import headlines
from stages.evaluate import command


def row(prompt: str, authors: str, ranks: list[int], annotator: str = "kim") -> dict[str, Any]:
    """A ranking of one answer by each author; authors are single letters."""
    names = {"p": "runs/ppo", "s": "runs/sft", "g": "model:gpt", "?": ""}
    candidates = [
        {"text": f"answer {place} by {one}", "author": names[one], "author_kind": "model"}
        for place, one in enumerate(authors)
    ]
    return {"prompt": prompt, "candidates": candidates, "ranks": ranks, "annotator": annotator}


ROWS = [
    row("one", "ps", [1, 2]),
    row("one", "ps", [2, 1], "lee"),
    row("two", "spg", [1, 1, 2]),
    row("three", "pps", [1, 3, 2]),
    row("four", "g?", [1, 2]),
]
# ppo against sft: one: 1, 0; two: a tie; three: 1 and 0


def rankings(rows: list[dict[str, Any]]) -> list[Ranking]:
    return [one for one in map(from_dict, rows) if isinstance(one, Ranking)]


def test_wins_ties_and_losses_are_those_of_the_ranks() -> None:
    (sft,), pairs = ranked_comparisons(rankings(ROWS), "runs/ppo", "runs/sft")
    assert (sft["wins"], sft["ties"], sft["losses"], sft["win_rate"]) == (2, 1, 2, 0.5)
    assert (sft["prompts"], sft["annotators"], len(pairs["runs/sft"])) == (3, 2, 5)
    assert sft["by_annotator"]["lee"]["losses"] == 1 and sft["by_annotator"]["kim"]["wins"] == 2
    low, high = sft["interval"]
    assert 0 < low < 0.5 < high < 1


def test_the_other_side_has_the_complement() -> None:
    (mine,), _ = ranked_comparisons(rankings(ROWS[:1] + ROWS[2:3]), "runs/ppo", "runs/sft")
    (theirs,), _ = ranked_comparisons(rankings(ROWS[:1] + ROWS[2:3]), "runs/sft", "runs/ppo")
    assert mine["win_rate"] == 1 - theirs["win_rate"] == 0.75


def test_without_an_opponent_every_author_of_shared_rankings_is_one_most_comparisons_first() -> None:
    found, _ = ranked_comparisons(rankings(ROWS), "runs/ppo/", None)
    assert [(one["against"], one["wins"]) for one in found] == [("runs/sft", 2), ("model:gpt", 1)]


def test_an_author_may_be_named_without_its_prefix() -> None:
    assert find_author("gpt", rankings(ROWS), "--against ") == "model:gpt"


@pytest.mark.parametrize(
    ("mine", "other", "fault"),
    [
        ("runs/dpo", None, "wrote none of the 12 ranked answers"),
        ("runs/ppo", "runs/ppo/", "is the policy itself"),
        ("runs/sft", "runs/dpo", "--against runs/dpo: wrote none"),
    ],
)
def test_what_has_no_win_rate_is_refused_with_the_known_authors(mine: str, other: str | None, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        ranked_comparisons(rankings(ROWS), mine, other)
    with pytest.raises(UserError, match="no ranking holds answers of"):
        ranked_comparisons(rankings([ROWS[0], ROWS[4]]), "runs/sft", "gpt")


def test_the_command_prints_them_and_writes_a_page_with_the_answers(tmp_path: Path) -> None:
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    words = ("runs/ppo", tmp_path / "rankings.jsonl", "--judge", "rankings", "--html", tmp_path / "page.html")
    said, _ = finished.invoke(command, *words, "--json")
    assert "Win rate of runs/ppo against runs/sft: 50.0% (95% Wilson interval" in said
    assert "2 wins, 1 tie, 2 losses; a tie counts half; 3 prompts ranked by 2 named annotators" in said
    assert finished.last_json(said)["comparisons"][0]["wins"] == 2
    page = (tmp_path / "page.html").read_text()
    assert "Compared by people" in page and "answer 0 by p" in page and "rank 1 of 2" in page and "lee" in page


def test_estimators_of_the_kl_whose_intervals_do_not_overlap_are_named():
    policy = {"kl": 2.6, "kl_low": 2.4, "kl_high": 2.8, "kl_k3": 1.8, "kl_k3_low": 1.5, "kl_k3_high": 2.0}
    said = headlines({"model": "m", "reference": "sft", "policy": policy})
    assert said[-1].startswith("The estimator k3 gives 1.8 (1.5 to 2): too few answers")
    assert len(headlines({"model": "m", "reference": "sft", "policy": policy | {"kl_k3_high": 2.5}})) == 1
