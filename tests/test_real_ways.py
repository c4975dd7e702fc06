"""Every way of tuning beats the untrained base on held-out answers of a real task, with a real small model."""

from __future__ import annotations

import gzip
import json
import random

import pytest
import tiny

from rlhf import read_metrics, train_dpo, train_sft
from rlhf.data.schema import Candidate, Demonstration, Message, Ranking
from rlhf.inference.policy import open_policy
from rlhf.policy_evaluation.measures import demonstration_losses

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

MOST_CHARACTERS = 160
TRAIN, HELD_OUT = 96, 32


@pytest.fixture(scope="module")
def solutions(shared):
    """Short problems of GSM8K with their solutions."""
    with gzip.open(shared / "data" / "instructions" / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [row for row in rows if max(len(row["instruction"]), len(row["output"])) <= MOST_CHARACTERS]
    random.Random(0).shuffle(short)
    return [
        Demonstration(
            (Message("user", row["instruction"]),), split="eval" if number < HELD_OUT else "train", answer=row["output"]
        )
        for number, row in enumerate(short[: TRAIN + HELD_OUT])
    ]


@pytest.fixture(scope="module")
def untrained(solutions):
    """Loss of the base on the held-out solutions, nats a token."""
    policy = open_policy(tiny.STORIES, "plain")
    return demonstration_losses(policy, [one for one in solutions if one.split == "eval"]).metrics()["loss"]


def config(tmp_path, **more):
    return {
        "run": str(tmp_path / "run"),
        "model": {"path": str(tiny.STORIES), "chat_template": "plain"},
        "batch": {"max_steps": 12, "batch_size": 16},
        "eval": {"every": 12, "samples": 0},
        **more,
    }


@pytest.mark.parametrize(
    ("tuning", "lr"),
    [
        ("full", 1e-3),
        ({"name": "last-layers", "layers": 2}, 2e-3),
        ({"name": "lora", "rank": 8}, 5e-3),
        ("ia3", 3e-2),
        ({"name": "bottleneck", "placement": "houlsby", "reduction": 4}, 5e-3),
        ({"name": "bottleneck", "placement": "pfeiffer", "reduction": 4}, 5e-3),
        ({"name": "prompt-tuning", "tokens": 10, "init": "vocabulary"}, 5e-2),
        ({"name": "p-tuning", "tokens": 10}, 1e-2),
        ({"name": "prefix-tuning", "tokens": 4}, 0.3),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_tuning_lowers_the_loss_on_held_out_solutions(solutions, untrained, tmp_path, tuning, lr, record_property):
    run = train_sft(config(tmp_path, tuning=tuning, optimizer={"lr": lr}), solutions)
    loss = json.loads((run / "run.json").read_text("utf-8"))["metrics"]["eval/loss"]
    record_property("figures", f"{tuning}: {untrained:.3f} -> {loss:.3f} nats a token on held-out GSM8K solutions")
    assert loss < untrained - 0.05


def test_a_student_of_logits_learns_the_task_from_its_teacher(solutions, untrained, tmp_path, record_property):
    teacher = train_sft(config(tmp_path / "teacher", optimizer={"lr": 1e-3}), solutions)
    logits = {"teacher": str(teacher), "sft_weight": 0.0}
    student = config(tmp_path, optimizer={"lr": 1e-3}, distillation={"logits": logits})
    run = train_sft(student, solutions)
    held_out = [one for one in solutions if one.split == "eval"]
    loss = demonstration_losses(open_policy(run), held_out).metrics()["loss"]
    record_property("figures", f"a student of logits alone: {untrained:.3f} -> {loss:.3f} nats a token")
    assert loss < untrained - 0.05


def test_dpo_prefers_the_better_of_two_held_out_stories(shared, tmp_path, record_property):
    """The worse answer to each prompt is its own text with the words shuffled, so the preference can be learned."""
    text = (shared / "data" / "text" / "tinystories_1000.jsonl").read_text("utf-8").splitlines()
    rankings = []
    for number, line in enumerate(text[:120]):
        words = next(value for value in json.loads(line).values() if isinstance(value, str)).split()
        prompt, better = " ".join(words[:20]), words[20:40]
        worse = random.Random(number).sample(better, len(better))
        candidates = (Candidate(" ".join(better), "story"), Candidate(" ".join(worse), "shuffled"))
        split = "eval" if number < 30 else "train"
        rankings.append(Ranking((Message("user", prompt),), split=split, candidates=candidates, ranks=(1, 2)))
    run = train_dpo(config(tmp_path, optimizer={"lr": 5e-4}, eval={"every": 12}), rankings)
    found = read_metrics(run)
    accuracy = json.loads((run / "run.json").read_text("utf-8"))["metrics"]
    record_property("figures", f"DPO on stories against their shuffled words: {accuracy}; {len(found)} logged steps")
    # before training all implicit rewards are 0, so half of the pairs are right
    assert accuracy["accuracy"] > 0.75
