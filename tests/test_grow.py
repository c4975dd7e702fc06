"""`rlhf data grow`: tasks in a teacher's replies are parsed, judged, compared with all others, and balanced by kind."""

from __future__ import annotations

import json
import random
from typing import Any

import finished
import pytest
import tiny
from chat_servers import chat_server, completion, fault
from rouge_score.rouge_scorer import RougeScorer
from rows import jsonl

from data_tools.growth import tasks
from data_tools.growth.novelty import Novelty
from data_tools.growth.tasks import GrownTask, parse
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset
from stages.grow import command

SEEDS = [
    {"prompt": "Write a short poem about the given animal.\n\nowl", "answer": "An owl sat still."},
    {"prompt": "Explain why the sky looks blue at noon.", "answer": "Air scatters blue light most."},
    {"prompt": "Classify the review as positive or negative.\n\nI loved it.", "answer": "positive"},
    {"prompt": "Determine whether the number is even.\n\n7", "answer": "no"},
]
WORDS = ["apple", "bridge", "candle", "desert", "engine", "forest", "guitar", "harbour", "island", "jungle", "kettle",
         "ladder", "mirror", "needle", "orchard", "pencil", "quarry", "river", "saddle", "temple"]  # fmt: skip


@pytest.fixture
def seeds(tmp_path):
    return jsonl(tmp_path / "seeds.jsonl", SEEDS)


def grow(*words: object) -> dict[str, Any]:
    said, _ = finished.invoke(command, *words, "--json", program="rlhf data grow")
    return finished.last_json(said)


# ---- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        " List two fruits.\nInput: <noinput>\nOutput: Pear and plum.\n\nTask 8\n"
        "Instruction: Add them.\nInput: 2, 3\nOutput: 5",
        "Task 7\nInstruction: List two fruits.\nOutput: Pear and plum.\n\nTask 8\n"
        "Instruction: Add them.\nInput: 2, 3\nOutput: 5",
        "### Task 7\nInstruction: List two fruits.\nInput: None\nOutput: Pear and plum.\n### Task 8\n"
        "Instruction: Add them.\nInput: 2, 3\nOutput: 5",
    ],
)
def test_tasks_are_read_whether_the_teacher_goes_on_or_writes_the_form_again(text):
    assert parse(text, False) == [
        GrownTask("List two fruits.", "", "Pear and plum."),
        GrownTask("Add them.", "2, 3", "5"),
    ]
    assert parse(text, True) == [GrownTask("List two fruits.", "", "Pear and plum.")]


def test_a_request_shows_its_examples_and_is_read_back():
    shown = [GrownTask("List two fruits.", "", "Pear and plum."), GrownTask("Add the two numbers.", "2, 3", "5")]
    text = tasks.request(shown, 3)
    assert "Write 3 new tasks" in text and text.endswith("Task 3\nInstruction:")
    assert parse(text.split("\n\n", 2)[2], False)[:2] == shown


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("List three rivers of Europe.", None),
        ("Go home.", "fewer than 4"),
        ("word " * 151, "more than 150"),
        ("- List three rivers of Europe.", "punctuation"),
        ("列出欧洲 的 三条 河流", "English"),
        ("Describe what the Picture shows here.", "more than text"),
        ("Write a program that sorts numbers.", "a program"),
        ("Describe the graphite in a pencil.", None),
    ],
)
def test_instructions_of_no_use_have_a_reason(instruction, reason):
    found = tasks.fault(GrownTask(instruction.strip(), "", "An answer."))
    assert (found is None) if reason is None else reason in found.reason


def test_the_kind_is_judged_by_words_and_the_length_of_the_answer():
    assert GrownTask("Classify the review as positive or negative.", "Bad.", "negative").kind == "classification"
    assert GrownTask("Decide whether the claim is true.", "", "No. " * 20).kind == "generation"
    assert GrownTask("Write a poem.", "", "Rose").kind == "generation"


def test_the_closest_instruction_is_that_of_a_comparison_with_all():
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS[:7], k=chance.randint(3, 9))) for _ in range(150)]
    novelty, scorer = Novelty(0.7), RougeScorer(["rougeL"])
    for i, text in enumerate(texts):
        scores = [scorer.score(other, text)["rougeL"].fmeasure for other in texts[:i]]
        found = novelty.closest(text)
        best = max(scores, default=0)
        assert (found is None) if best < 0.7 else found[0] == pytest.approx(best)
        novelty.add(text)


# ---- the command ---------------------------------------------------------------------------------------------------


def written(*found: tuple[str, str]) -> str:
    return "\n\n".join(
        f"Task {i}\nInstruction: {instruction}\nInput: <noinput>\nOutput: {output}"
        for i, (instruction, output) in enumerate(found, 9)
    )


def answer(request: dict[str, Any], number: int) -> Any:
    """Three tasks that differ by request: a text, a classification, and one that is too similar to a seed."""
    chance = random.Random(request["seed"])
    one, two, three, four = chance.sample(WORDS, 4)
    return completion(
        written(
            (f"Compare {one} {two} against {three} {four} thoroughly.", "They differ."),
            (f"Classify {four} {three} {two} as {one}.", "yes"),
            ("Explain why the sky looks blue at dawn.", "Air scatters light."),
        )
    )


def test_new_tasks_grow_and_what_is_thrown_away_is_kept_with_its_reason(seeds, tmp_path):
    with chat_server(answer) as found:
        made = grow(seeds, "--teacher", found.url, "--out", tmp_path / "o", "--count", 10, "--classification", 0.3)
    assert made["written"] == 10 and made["kinds"] == {"generation": 7, "classification": 3}
    assert made["reasons"]["the instruction is too similar to another"] >= 3
    assert made["reasons"]["there are enough classification tasks"] >= 1
    records = list(open_dataset(tmp_path / "o", "demonstration").records())
    assert {r.group for r in records} == {"generation", "classification"} and records[0].author == "model:m"
    rejects = [json.loads(line) for line in (tmp_path / "o" / "rejected.jsonl").read_text().splitlines()]
    near = next(row for row in rejects if "similar" in row["reason"])
    assert near["detail"].startswith("ROUGE-L 0.88") and json.loads(near["raw"])["output"] == "Air scatters light."
    shown = found.asked[-1]["messages"][0]["content"]
    assert all(text in shown for text in ("Task 1", "positive or negative", "Write 10 new tasks"))


def test_a_stopped_growth_goes_on_and_asks_for_nothing_twice(seeds, tmp_path):
    words = (seeds, "--out", tmp_path / "o", "--count", 40, "--concurrency", 1)
    with chat_server(lambda r, n: fault(401, "no") if n == 10 else answer(r, n)) as found:
        with pytest.raises(UserError, match="401"):
            grow(*words, "--teacher", found.url)
        made = grow(*words, "--teacher", found.url)
        again = grow(*words, "--teacher", found.url, "--overwrite")
    assert made["usage"]["cached"] == 10 and again["usage"]["requests"] == 0
    texts = [request["messages"][0]["content"] for request in found.asked]
    assert len(texts) - 1 == len(set(texts)) and made["requests"] == again["requests"]


def test_a_teacher_without_whole_tasks_makes_no_dataset(seeds, tmp_path):
    with chat_server(lambda *_: completion("Once upon a time.")) as found, pytest.raises(UserError, match="no task of"):
        grow(seeds, "--teacher", found.url, "--out", tmp_path / "o", "--count", 5, "--max-requests", 8)
    assert not (tmp_path / "o").exists()


@pytest.mark.real
def test_the_seed_tasks_of_self_instruct_are_new_to_each_other_and_the_small_story_model_is_no_teacher(tmp_path):
    from rows import run

    instructions = tiny.REPOSITORY.parent / "shared" / "data" / "instructions" / "self_instruct_seed_tasks.jsonl"
    assert run("import", "alpaca", instructions, "--out", tmp_path / "seeds").exit_code == 0
    with pytest.raises(UserError, match=r"the reply has no complete task \(2\)"):
        grow(
            tmp_path / "seeds", "--teacher", tiny.STORIES, "--out", tmp_path / "o", "--count", 5, "--max-requests", 2,
            "--max-new-tokens", 60, "--chat-template", "plain",
        )  # fmt: skip
