"""Label words: calibration, log-probs of continuations, the label of the likeliest word."""

from __future__ import annotations

import math
from typing import Any

import finished
import numpy as np
import pytest
import tiny
import torch
from prompting_calls import ask, prompter

from rlhf.core.errors import UserError
from rlhf.data.schema import Message
from rlhf.inference.policy import open_policy
from rlhf.prompting.continuations import continuation_logprobs, embeddings
from rlhf.prompting.label_words import calibrated, label_logprobs, word_scores
from rlhf.prompting.prompts import PromptBuilder
from rlhf.prompting.ways import read_prompting
from rlhf.rollout.types import SamplingParams


@pytest.fixture(scope="module")
def policy() -> Any:
    return open_policy(tiny.llama())


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
