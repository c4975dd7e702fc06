"""Prompting without training: layouts, examples, label words, masks, votes, `rlhf evaluate --prompting`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf.core.errors import UserError
from rlhf.data.schema import Demonstration, Message, Prompt
from rlhf.inference.policy import open_policy
from rlhf.prompting.continuations import continuation_logprobs, embeddings
from rlhf.prompting.examples import Example, ExamplePool
from rlhf.prompting.label_words import calibrated, label_logprobs, word_scores
from rlhf.prompting.masked import open_masked
from rlhf.prompting.prompts import PromptBuilder
from rlhf.prompting.run import Prompter, VoteOutcome, vote
from rlhf.prompting.ways import PROMPTING, Shots, read_prompting
from rlhf.rollout.types import SamplingParams
from rlhf.tasks.answers import answer_pattern
from rlhf.tasks.task import AnswerRules
from stages.evaluate import command
from stages.sample import command as sample_command


@pytest.fixture(scope="module")
def policy() -> Any:
    return open_policy(tiny.llama())


def ask(text: str, answer: str = "yes") -> Demonstration:
    return Demonstration((Message("user", text),), answer=answer)


def prompter(model: Any, spec: str, examples: Any = (), seed: int = 0, **rules: Any) -> Prompter:
    return Prompter(model, read_prompting(spec), AnswerRules(**rules), seed, examples)


# ---- label words ---------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    # p = (0.6, 0.4), p_cf = mean of (0.8, 0.2) and (0.7, 0.3) = (0.75, 0.25): p / p_cf = (0.8, 1.6) -> (1/3, 2/3)
    content_free = np.log([[0.8, 0.2], [0.7, 0.3]])
    found = calibrated(np.log([[0.6, 0.4]]), content_free)
    assert np.exp(found)[0] == pytest.approx([1 / 3, 2 / 3])
    each = calibrated(np.log([[0.6, 0.4]]), content_free[None])
    assert np.allclose(each, found)


def test_a_label_has_the_mean_probability_of_its_words_and_length_may_count_or_not():
    totals = np.log([[0.1, 0.3, 0.4]])
    labels = label_logprobs(word_scores(totals, [1, 1, 1], False), [0, 0, 1], 2)
    assert np.exp(labels)[0] == pytest.approx([0.2 / 0.6, 0.4 / 0.6])
    long = np.log([[0.25, 0.3]])  # 0.25 over two tokens is 0.5 a token
    assert label_logprobs(word_scores(long, [2, 1], False), [0, 1], 2)[0].argmax() == 1
    assert np.exp(label_logprobs(word_scores(long, [2, 1], True), [0, 1], 2))[0] == pytest.approx([0.625, 0.375])


@pytest.mark.parametrize("run", ["base", "prompt-tuning"])
def test_log_probs_of_continuations_are_those_of_whole_texts(run, policy, tmp_path, monkeypatch):
    if run != "base":
        policy = open_policy(finished.sft(tmp_path / "run", run))
    prompts = [[1, 30, 40, 50], [1, 60], [1, *range(70, 95)]]
    continuations = [[[5], [6, 7, 8], [9, 10]], [[11, 12]], [[5], [6]]]
    monkeypatch.setattr("rlhf.prompting.continuations.BATCH_TOKENS", 40)
    found = continuation_logprobs(policy.model, policy.chat, prompts, continuations)
    for prompt, several, totals in zip(prompts, continuations, found):
        for tokens, total in zip(several, totals):
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -len(tokens) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum()
            assert total == pytest.approx(float(expected), abs=1e-4)


def test_label_words_share_their_prompt(policy):
    shapes: list[tuple[int, ...]] = []
    body = policy.model.model
    hook = body.register_forward_pre_hook(
        lambda module, inputs, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    prompt = list(range(3, 83))
    continuation_logprobs(policy.model, policy.chat, [prompt], [[[5], [6], [7]]])
    assert shapes == [(1, 80)], "words of one token read nothing but the prompt"
    shapes.clear()
    continuation_logprobs(policy.model, policy.chat, [prompt], [[[5, 6], [7, 8, 9], [4]]])
    hook.remove()
    assert shapes[-1] == (1, 80 + 1 + 2), "longer words share one row"


def test_embeddings_are_means_of_hidden_states_of_length_one(policy):
    found = embeddings(policy.model, policy.chat, [[5, 6, 7], [8]])
    with torch.no_grad():
        hidden = policy.model.model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0].mean(0)
    assert found[0] == pytest.approx((hidden / hidden.norm()).numpy(), abs=1e-5)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1])


def test_cloze_chooses_the_label_of_the_likeliest_word(policy):
    spec = '{name: cloze, template: "{prompt} It is {answer}", verbaliser: {good: [fine, nice], bad: the river}}'
    (row,) = prompter(policy, spec).answer([ask("A tree.")], SamplingParams(8)).rows
    chat = PromptBuilder(read_prompting(spec), policy.chat).chat
    prompt = chat.prompt([Message("user", "A tree. It is")])
    total = []
    for word in (" fine", " nice", " the river"):
        ids = chat.response(word)[:-1]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        total.append(math.exp(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()))
    good, bad = (total[0] + total[1]) / 2, total[2]
    assert row["probabilities"] == pytest.approx({"good": good / (good + bad), "bad": bad / (good + bad)}, rel=1e-3)
    assert row["answer"] == ("good" if good > bad else "bad")
    assert row["confidence"] == pytest.approx(abs(good - bad) / (good + bad), rel=1e-3)


def test_a_calibrated_cloze_is_undecided_on_input_without_content(policy):
    spec = '{name: cloze, template: "{prompt} It is {answer}", verbaliser: {a: fine, b: red}, calibrate: true}'
    answered = prompter(policy, spec[:-1] + ', content_free: ["N/A"]}').answer(
        [ask("N/A"), ask("Yes")], SamplingParams(8)
    )
    first, second = answered.rows
    assert first["probabilities"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert second["probabilities"]["a"] != pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_chooses_labels_and_answers(family):
    model = open_policy(tiny.encoder_decoder(family))
    spec = "{name: cloze, shots: 1, verbaliser: {good: fine, bad: the river}}"
    examples = [ask("A tree.", "good")]
    way = prompter(model, spec, examples, labels=("good", "bad"))
    (row,) = way.answer([ask("A house.")], SamplingParams(8)).rows
    assert way.builder.layout == "text"
    prompt = model.chat.prompt([Message("user", "A tree.\nfine\n\nA house.")])
    scores = []
    for word in ("fine", "the river"):
        ids = model.chat.response(word)[:-1]
        start = model.model.config.decoder_start_token_id
        with torch.no_grad():
            logits = model.model(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *ids[:-1]]])
            ).logits[0]
        scores.append(math.exp(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()))
    assert row["probabilities"]["good"] == pytest.approx(scores[0] / sum(scores), rel=1e-3)
    (row,) = prompter(model, "few-shot", examples).answer([ask("A house.")], SamplingParams(4, temperature=0)).rows
    assert isinstance(row["text"], str)
    with pytest.raises(UserError, match="plain is not for an encoder-decoder"):
        prompter(model, "{name: few-shot, layout: plain}", examples)


# ---- masked language models ----------------------------------------------------------------------------------------


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "movie",
    "makes",
    "me",
    "feel",
    "happy",
    "sad",
    "very",
    ".",
]


def masked(folder: Path, family: str) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "electra"])
def test_a_masked_model_fills_its_mask(family, tmp_path):
    model = open_masked(masked(tmp_path, family))
    spec = '{name: cloze, template: "{prompt} me feel {answer} .", verbaliser: {good: happy, bad: very sad}}'
    (row,) = prompter(model, spec).answer([ask("the movie makes")], SamplingParams(8)).rows
    scores = []
    for word in ([10], [12, 11]):
        ids = [2, 5, 6, 7, 8, 9, *[4] * len(word), 13, 3]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids])).logits[0, 6 : 6 + len(word)]
        scores.append(math.exp(logits.log_softmax(-1).gather(-1, torch.tensor(word)[:, None]).sum()))
    assert row["probabilities"]["good"] == pytest.approx(scores[0] / sum(scores), rel=1e-4)


def test_text_that_spells_the_mask_is_text(tmp_path):
    model = open_masked(masked(tmp_path, "bert"))
    assert model.text_ids("the [MASK] feel ", 2, " .").count(4) == 2


def test_a_masked_model_writes_no_text_and_knows_its_words(tmp_path):
    model = open_masked(masked(tmp_path, "bert"))
    with pytest.raises(UserError, match="writes no text"):
        prompter(model, "few-shot")
    with pytest.raises(UserError, match="'joyful' is not in the vocabulary"):
        prompter(model, "{name: cloze, verbaliser: {good: joyful, bad: sad}}")


# ---- votes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["72", "71", "72.", None], VoteOutcome("72", 2, 0.25)),
        (["no", "yes"], VoteOutcome("no", 1, 0.0)),
        (["a"] * 3, VoteOutcome("a", 3, 1.0)),
        ([None, None], VoteOutcome(None, 0, 0.0)),
    ],
)
def test_the_answer_with_most_votes_wins_by_a_margin(answers, expected):
    assert vote(answers) == expected


def test_numbers_are_voted_on_by_value():
    assert vote(["1,000", "7", "$1000"], "number") == VoteOutcome("1,000", 2, pytest.approx(1 / 3))


def test_a_vote_prefills_its_prompt_once(policy):
    rows: list[int] = []
    hook = policy.model.register_forward_pre_hook(
        lambda module, inputs, named: rows.append(named["input_ids"].shape[0])
        if named["input_ids"].shape[1] > 1 else None, with_kwargs=True,
    )  # fmt: skip
    spec = "{name: chain-of-thought, samples: 8}"
    params = SamplingParams(6, temperature=1.0, batch_size=32)
    (row,) = prompter(policy, spec, pattern=answer_pattern(r"\w")).answer([ask("How many?")], params).rows
    assert sum(rows) == 1
    rows.clear()
    many = SamplingParams(20, temperature=1.0, batch_size=12)  # not all answers to a question start together
    prompter(policy, spec).answer([ask(f"{i}?") for i in range(12)], many)
    hook.remove()
    assert sum(rows) == 12
    assert len(row["answers"]) == 8 and row["votes"] == max(map(row["answers"].count, {*row["answers"]} - {None}))


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


# ---- the command ---------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[tuple[str, str, str]]) -> str:
    lines = [{"prompt": prompt, "answer": answer, "split": split} for prompt, answer, split in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [(f"{tiny.COLOURS[i % 6]} {i}", "warm" if i % 6 < 3 else "cold", "eval" if i > 23 else "train")
            for i in range(36)]  # fmt: skip
    return write(tmp_path_factory.mktemp("data") / "colours.jsonl", rows)


def test_ways_and_shots_are_lines_of_one_table(colours, tmp_path):
    words = (tiny.llama(), "--dataset", colours, "--labels", "warm,cold", "--max-new-tokens", 4)
    ways = ("--prompting", "few-shot", "--prompting", "{name: cloze, choose: balanced}", "--shots", "0,2")
    out, answers = tmp_path / "out.json", tmp_path / "answers.jsonl"
    said, _ = finished.invoke(command, *words, *ways, "--out", out, "--answers", answers, "--json")
    found = finished.last_json(said)
    assert json.loads(out.read_text()) == found
    cells = [(cell["title"], cell["shots"]) for cell in found["prompting"]]
    assert cells == [("few-shot", 0), ("few-shot", 2), ("cloze choose=balanced", 0), ("cloze choose=balanced", 2)]
    assert "cloze choose=balanced" in said and "labels: warm, cold" in said
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 4 * 12 and all(len(row["examples"]) == row["shots"] for row in rows)
    for cell, mine in zip(found["prompting"], np.array_split(np.arange(48), 4)):
        accuracy = next(metric for metric in cell["metrics"] if metric["metric"] == "accuracy")
        assert accuracy["value"] == pytest.approx(sum(rows[i]["right"] for i in mine) / 12)
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    again, _ = finished.invoke(command, *words, *ways, "--json")
    assert finished.last_json(again) == found


def test_log_likelihood_is_that_of_the_right_answer(colours):
    words = (tiny.llama(), "--dataset", colours, "--metric", "log_likelihood", "--prompting", "zero-shot", "--limit", 2)
    said, _ = finished.invoke(command, *words, "--max-new-tokens", 4, "--json")
    (metric,) = finished.last_json(said)["prompting"][0]["metrics"]
    policy = open_policy(tiny.llama(), "plain")
    expected = 0.0
    for text, answer in (("red 24", "warm"), ("blue 25", "warm")):
        prompt, ids = policy.chat.prompt([Message("user", text + "\n")]), policy.chat.response(answer)[:-1]
        logits = finished.policy_logits(tiny.llama(), torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        expected += float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    assert metric["value"] == pytest.approx(expected / 2, abs=1e-3)


def test_examples_come_from_another_dataset(colours, tmp_path):
    other = write(tmp_path / "other.jsonl", [(f"Is {i} odd?", "yes" if i % 2 else "no", "train") for i in range(6)])
    spec = f"{{name: few-shot, shots: 3, examples_from: {other}}}"
    answers = tmp_path / "answers.jsonl"
    finished.invoke(command, tiny.llama(), "--dataset", colours, "--labels", "warm,cold", "--prompting", spec,
                    "--answers", answers, "--max-new-tokens", 4)  # fmt: skip
    ids = {Prompt((Message("user", f"Is {i} odd?"),)).prompt_id for i in range(6)}
    assert all(set(json.loads(line)["examples"]) <= ids for line in answers.read_text().splitlines())


def test_a_file_holds_a_way(tmp_path):
    (tmp_path / "mine.yaml").write_text('name: zero-shot\ninstruction: "Answer yes or no."\n')
    found = read_prompting(str(tmp_path / "mine.yaml"))
    assert (found.title, found.wording.instruction) == ("mine", "Answer yes or no.")


def test_sample_shows_the_answer_and_what_it_was_taken_by(colours, tmp_path):
    words = (tiny.llama(), "-p", "red?", "--prompting", "{name: chain-of-thought, samples: 3, cue: Look.}")
    said, _ = finished.invoke(sample_command, *words, "--pattern", r"\w", "--max-new-tokens", 6)
    assert said.count("text: ") == 3 and "of 3 votes" in said and r"answer: last match of \w" in said
    out = tmp_path / "out.jsonl"
    words = (tiny.llama(), "--dataset", colours, "--limit", 2, "--labels", "warm,cold", "--out", out)
    said, _ = finished.invoke(sample_command, *words, "--prompting", "{name: cloze, shots: 2}", "--json")
    rows = [json.loads(line) for line in said.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows and len(rows) == 2
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1) and len(row["examples"]) == 2
        assert row["answer"] == max(row["probabilities"], key=row["probabilities"].get)
        text = row["messages"][-1]["content"]
        said, _ = finished.invoke(sample_command, tiny.llama(), "-p", text, "--labels", "warm,cold", "--json",
                                  "--prompting", f"{{name: cloze, shots: 2, examples_from: {colours}}}")  # fmt: skip
        assert json.loads(said)["probabilities"] == pytest.approx(row["probabilities"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompting", "few-shot"], "no examples to show"),
        (["--prompting", "cloze"], "needs the labels"),
        (["--prompting", "zero-shot", "-n", 2], "--n and --reward are not for --prompting"),
        (["--pattern", "number"], "are for --prompting"),
    ],
)
def test_what_sample_cannot_prompt_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        finished.invoke(sample_command, tiny.llama(), "-p", "red?", *words)


@pytest.mark.real
def test_label_words_beat_free_text_on_pronouns_of_stories(tmp_path):
    """Which pronoun begins the next sentence of a story? The 260K model knows, but does not just say so."""
    rows = []
    for line in (tiny.STORIES.parents[1] / "data" / "text" / "tinystories_1000.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        found = re.search(r"(?<=[.!?] )(She|He)\b", text)
        before = text[: found.start()].strip() if found else ""
        if found and 40 < len(before) < 400 and not re.search(r"\b(she|he|her|him|his)\b", before, re.IGNORECASE):
            rows.append((before, found[1].lower(), "eval" if len(rows) % 3 == 0 else "train"))
    data = write(tmp_path / "pronouns.jsonl", rows)
    spec = '{name: cloze, template: "{prompt} {answer}", verbaliser: {she: She, he: He}}'
    said, _ = finished.invoke(command, tiny.STORIES, "--dataset", data, "--prompting", "zero-shot", "--prompting", spec,
                              "--labels", "she,he", "--max-new-tokens", 8, "--json")  # fmt: skip
    zero_shot, cloze = (cell["metrics"][0] for cell in finished.last_json(said)["prompting"])
    assert cloze["value"] > 0.9 and cloze["low"] > zero_shot["high"]


@pytest.mark.parametrize("row", list(PROMPTING), ids=lambda row: row.name)
def test_every_way_has_a_summary_and_works_with_its_defaults(row, policy):
    assert row.summary.endswith((".", "it."))
    records = [ask(f"Is {i} odd?", f"Look. The answer is {'yes' if i % 2 else 'no'}.") for i in range(8)]
    rules = {"pattern": answer_pattern("the-answer-is"), "labels": ("yes", "no")}
    answered = prompter(policy, row.name, records, **rules).answer(records[:2], SamplingParams(4, temperature=0))
    assert len(answered.rows) == 2 and all(row is not None for row in answered.rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompting", "few-shoot"], "unknown way of prompting 'few-shoot'; did you mean 'few-shot'"),
        (["--prompting", "{name: few-shot, shot: 2}"], "has no option 'shot'; did you mean 'shots'"),
        (["--prompting", "{name: few-shot, shots: -1}"], "greater than or equal to 0"),
        (["--prompting", "nowhere.yaml"], "no such config file"),
        (["--prompting", '{name: zero-shot, template: "{answer}"}'], "needs {prompt} once"),
        (["--prompting", "zero-shot", "--shots", "1"], "zero-shot shows no examples"),
        (["--prompting", "few-shot", "--shots", "1,x"], "not a list of whole numbers"),
        (["--prompting", "few-shot", "--pattern", "(a"], "not a regular expression"),
        (["--prompting", "few-shot", "--metric", "acuracy"], "did you mean 'accuracy'"),
        (["--prompting", "few-shot", "--labels", "warm,hot"], "no record of .* has the answer 'hot'"),
        (["--prompting", "{name: cloze, verbaliser: {warm: hot, hot: x}}", "--labels", "warm,cold"], "no label 'hot'"),
        (["--prompting", "{name: cloze, verbaliser: {warm: hot}}", "--labels", "warm,cold"], "'cold' has no word"),
        (["--prompting", "{name: cloze, verbaliser: {warm: []}}"], "has no word, or an empty one"),
        (["--prompting", "{name: chain-of-thought, samples: 4}", "--temperature", 0], "would all be the same"),
        (["--prompting", "few-shot", "--reward", "x"], "--reward: is not for --prompting"),
        (["--shots", "1"], "--shots: is for --prompting"),
    ],
)
def test_what_cannot_be_prompted_is_refused(words, message, colours):
    with pytest.raises(UserError, match=message):
        finished.invoke(command, tiny.llama(), "--dataset", colours, *words)


def test_label_words_are_checked_before_a_model_is_looked_for(colours):
    spec = "{name: cloze, verbaliser: {warm: hot}}"
    with pytest.raises(UserError, match="'cold' has no word"):
        finished.invoke(command, "./nowhere", "--dataset", colours, "--labels", "warm,cold", "--prompting", spec)
