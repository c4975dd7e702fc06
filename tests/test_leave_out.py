"""`rlhf data annotators`: who harms, who helps, and what is refused."""

from __future__ import annotations

import random

import pytest
from rows import last_line, run, write

from data_tools.check.leave_out import leave_out
from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Message, Ranking


def rankings(prompts, annotators, few=None, words=40):
    """Prompts whose better answer has good words: annotator -> the chance of preferring it.

    Args:
        words: Good words there are, and bad ones.
        few: Only the first so many prompts are ranked by all; the others by the first annotator alone.
    """
    draw = random.Random(0)
    found = []
    for number in range(prompts):
        best, worst = (" ".join(f"{kind}{draw.randrange(words)}" for _ in range(2)) for kind in ("good", "bad"))
        for place, (name, skill) in enumerate(annotators.items()):
            if few is not None and number >= few and place:
                continue
            ranks = (1, 2) if draw.random() < skill else (2, 1)
            found.append(
                Ranking((Message("user", f"Q{number}"),), candidates=(Candidate(best), Candidate(worst)), ranks=ranks,
                        annotator=name)
            )  # fmt: skip
    return found


def test_who_ranks_in_reverse_harms_the_reward_model(tmp_path):
    path = write(tmp_path / "r", rankings(120, {"ann": 0.7, "bob": 0.7, "kim": 0.7, "eve": 0.0})).path
    found = leave_out(path)
    eve = found["effects"][0]
    assert (eve["name"], eve["verdict"], eve["rankings"]) == ("eve", "harms", 120), "the most harmful first"
    assert eve["gain"]["low"] <= eve["gain"]["value"] <= eve["gain"]["high"] < 0
    assert eve["gain_over_others"]["value"] < eve["gain"]["value"], "others in their place would help"


def test_who_ranks_most_and_well_helps_the_reward_model(tmp_path):
    path = write(tmp_path / "r", rankings(240, {"ann": 1.0, "bob": 0.9, "kim": 0.9}, few=25, words=400)).path
    (*_, ann) = leave_out(path)["effects"]
    assert (ann["name"], ann["verdict"]) == ("ann", "helps") and ann["gain"]["low"] > 0


def test_equal_annotators_have_no_clear_effect(tmp_path):
    path = write(tmp_path / "r", rankings(60, dict.fromkeys("abcd", 0.9))).path
    found = last_line(run("annotators", path, "--json", "--most", "3"))
    assert [one["verdict"] for one in found["effects"]] == ["no clear effect"] * 3 and found["not_tried"] == 1
    assert found["accuracy"] > 0.8 and found["pairs"] == 240 and found["prompts"] == 60


@pytest.mark.parametrize(
    ("prompts", "annotators", "fault"),
    [(10, {"a": 1, "b": 1}, "too few rankings"), (60, {"a": 1}, "no annotator can be left out")],
)
def test_too_few_annotators_or_prompts_are_refused(tmp_path, prompts, annotators, fault):
    with pytest.raises(UserError, match=fault):
        leave_out(write(tmp_path / "r", rankings(prompts, annotators)).path)
