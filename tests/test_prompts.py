"""Prompts with examples: their layout, and which examples are chosen."""

from __future__ import annotations

from typing import Any

import finished
import pytest
import tiny
from prompting_calls import ask, prompter

from rlhf.data.schema import Message, Prompt
from rlhf.inference.policy import open_policy
from rlhf.prompting.examples import Example, ExamplePool
from rlhf.prompting.prompts import PromptBuilder
from rlhf.prompting.ways import PROMPTING, Shots, read_prompting
from rlhf.rollout.types import SamplingParams
from rlhf.tasks.answers import answer_pattern


@pytest.fixture(scope="module")
def policy() -> Any:
    return open_policy(tiny.llama())


# ---- prompts -------------------------------------------------------------------------------------------------------


def shown(layout: str, **options: Any) -> list[tuple[str, str]]:
    spec = {"name": "few-shot", "layout": layout, **options}
    builder = PromptBuilder(PROMPTING.pick(spec)(), open_policy(finished.chatml()).chat)
    examples = [Example((Message("user", "1 + 1?"),), "2", "2", "a")]
    question = (Message("system", "Be brief."), Message("user", "2 + 2?"))
    return [tuple(message) for message in builder.messages(question, examples)]


def test_examples_are_turns_or_text():
    words = {"instruction": "Add.", "template": "Q: {prompt}\nA: {answer}"}
    assert shown("turns", **words) == [
        ("system", "Be brief."), ("user", "Add.\n\nQ: 1 + 1?\nA:"), ("assistant", "2"), ("user", "Q: 2 + 2?\nA:"),
    ]  # fmt: skip
    assert shown("text", **words) == [
        ("system", "Be brief."), ("user", "Add.\n\nQ: 1 + 1?\nA: 2\n\nQ: 2 + 2?\nA:"),
    ]  # fmt: skip
    assert shown("plain", **words) == [("user", "Be brief.\n\nAdd.\n\nQ: 1 + 1?\nA: 2\n\nQ: 2 + 2?\nA:")]


def test_a_model_without_a_chat_template_reads_plain_text_and_others_turns(policy):
    way = read_prompting("few-shot")
    assert PromptBuilder(way, policy.chat).layout == "plain"
    assert PromptBuilder(way, open_policy(finished.chatml()).chat).layout == "turns"
    assert PromptBuilder(way, open_policy(tiny.llama(), "plain").chat).layout == "plain"
    assert PromptBuilder(way, open_policy(tiny.llama(), "default").chat).layout == "turns"


def test_the_cue_begins_the_answer_of_plain_text_and_ends_a_users_turn(policy):
    way = read_prompting('{name: chain-of-thought, template: "{prompt} A: {answer}"}')
    (message,) = PromptBuilder(way, policy.chat).messages((Message("user", "Why?"),), [])
    assert message.content == "Why? A: Let's think step by step."
    (turn,) = PromptBuilder(way, open_policy(finished.chatml()).chat).messages((Message("user", "Why?"),), [])
    assert turn.content == "Why? A:\nLet's think step by step."


def test_examples_that_do_not_fit_are_left_out_and_counted(policy):
    pool = [ask(f"What does the owl number {i} do in the garden?", "It goes to the river.") for i in range(9)]
    answered = prompter(policy, "{name: few-shot, shots: 8}", pool).answer(
        [ask("Why?"), ask("Who?")], SamplingParams(8)
    )
    kept = [len(row["examples"]) for row in answered.rows]
    assert answered.left_out == sum(8 - count for count in kept) > 0 and answered.shortened == 2
    assert all(0 < count < 8 for count in kept)
    assert answered.prompt_tokens <= 120


# ---- examples ------------------------------------------------------------------------------------------------------


def pool(seed: int = 0, labels: tuple[str, ...] = (), **options: Any) -> ExamplePool:
    records = [ask(f"{'red' if i < 15 else 'blue'} {word} {i}", "warm" if i < 15 else "cold")
               for i, word in zip(range(20), tiny.ANIMALS * 3)]  # fmt: skip
    return ExamplePool(records, Shots(**options), lambda r: r.answer, lambda r, label: label, labels, seed)


def test_examples_depend_on_the_seed_and_not_on_the_number_of_shots():
    question = ask("What?")
    assert pool().take(question, 2) == pool().take(question, 4)[:2]
    assert pool().take(question, 4) == pool().take(ask("Which?"), 4) != pool(1).take(question, 4)
    redrawn = pool(redraw=True)
    assert redrawn.take(question, 4) != redrawn.take(ask("Which?"), 4)
    one, other = pool(order_seed=1).take(question, 6), pool(order_seed=2).take(question, 6)
    assert one != other and {e.prompt_id for e in one} == {e.prompt_id for e in other}


def test_balanced_examples_have_each_label_as_often():
    found = pool(choose="balanced").take(ask("What?"), 6)
    assert sorted(example.label for example in found) == ["cold"] * 3 + ["warm"] * 3
    assert len({example.prompt_id for example in found}) == 6


def test_the_most_similar_example_is_next_to_the_question():
    found = pool(choose="similar").take(ask("a blue owl 18"), 3)
    assert found[-1].messages[0].content == "blue owl 18"
    assert all({"blue", "owl"} & set(example.messages[0].content.split()) for example in found)


def test_no_question_is_its_own_example():
    found = pool().take(ask("red cat 0", "warm"), 20)
    assert len(found) == 19 and "red cat 0" not in [e.messages[0].content for e in found]
    with_system = Prompt((Message("system", "Be brief."), Message("user", "red cat 0")))
    assert pool().take(with_system, 20) == found


def test_random_labels_are_of_the_task_and_seeded():
    found = pool(random_labels=True, labels=("warm", "cold")).take(ask("What?"), 20)
    wrong = sum((e.label == "warm") != ("red" in e.messages[0].content) for e in found)
    assert {e.answer for e in found} == {"warm", "cold"} and 3 < wrong < 17
    assert found == pool(random_labels=True, labels=("warm", "cold")).take(ask("What?"), 20)


def test_chains_of_thought_show_rationales_and_few_shot_only_answers(policy):
    records = [ask(f"{i} + 1?", f"One more than {i}. So the answer is {i + 1}.") for i in range(3)]
    records.append(ask("9 + 1?", "The answer is 10."))
    rules = {"pattern": answer_pattern("the-answer-is")}
    reasons = prompter(policy, "{name: chain-of-thought, shots: 4}", records, **rules).pool.take(ask("What?"), 4)
    assert sorted(e.answer for e in reasons) == sorted(record.answer for record in records[:3])
    answers = prompter(policy, "{name: few-shot, shots: 4}", records, **rules).pool.take(ask("What?"), 4)
    assert sorted(e.answer for e in answers) == sorted(
        [*(f"So the answer is {i + 1}." for i in range(3)), "The answer is 10."]
    )
