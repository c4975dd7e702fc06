"""Distilling Step-by-Step: labels and rationales are two tasks of one model; serving needs the label task alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logged import lines
from rows import jsonl
from sft_runs import launch, losses, run, same_weights, settings, zero
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.sft.config import SFTConfig
from rlhf.tasks.answers import answer_pattern


def rationale_demos(path: Path, count: int = 40) -> str:
    """Sums with a rationale; every fourth has none, and the last has no answer at all."""
    rows = [
        {
            "prompt": f"What is {i} plus 1?",
            "answer": f"{'' if i % 4 == 3 else f'One more than {i} is {i + 1}. '}The answer is {i + 1}.",
            "split": "train" if i < count else "eval",
        }
        for i in range(count + 8)
    ]
    rows.append({"prompt": "And?", "answer": "I do not know.", "split": "train"})
    return str(jsonl(path, rows))


def learning(demos: str, folder: Path, changes: dict[str, Any] | None = None, **steps: Any) -> dict[str, Any]:
    return settings(demos, folder, distillation={"step_by_step": steps}, **(changes or {}))


@pytest.mark.parametrize(
    ("pattern", "text", "parts"),
    [
        ("the-answer-is", "It has no tea. So no.\nThe answer is no.", ("It has no tea. So no.", "The answer is no.")),
        ("the-answer-is", "The answer is yes.", ("", "The answer is yes.")),
        ("gsm8k", "48/2 = 24\n48+24 = 72\n#### 72", ("48/2 = 24\n48+24 = 72", "#### 72")),
        ("gsm8k", "72", None),
        # an answer that the reasoning already says: the last one counts
        ("number", "I have 72 of them.\nSo 72.", ("I have 72 of them.", "So 72.")),
    ],
)
def test_a_text_is_a_rationale_and_a_label(pattern, text, parts):
    assert answer_pattern(pattern).parts(text) == parts


def test_the_loss_is_the_labels_plus_the_weighted_rationales_each_a_mean_over_its_tokens(tmp_path):
    demos = rationale_demos(tmp_path / "d.jsonl", count=8)
    one_batch = {"batch": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 1}, "eval": {"every": 1}}
    done = run(learning(demos, tmp_path / "run", one_batch, rationale_weight=0.3))
    model = AutoModelForCausalLM.from_pretrained(tiny.llama())
    tokenizer = tiny.tokenizer()

    def mean_loss(prefix: str, i: int, text: str) -> float:
        from rlhf.config.base import ModelConfig
        from rlhf.data.chat_tokenizer import load_tokenizer
        from rlhf.data.schema import Message

        chat = load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())
        turns = [Message("user", f"{prefix}What is {i} plus 1?"), Message("assistant", text)]
        ids, flags = chat.conversation(turns)
        logits = model(torch.tensor([ids])).logits[0, :-1]
        wanted = torch.tensor([t if flag else -100 for t, flag in zip(ids, flags)])[1:]
        return float(cross_entropy(logits, wanted, ignore_index=-100))

    assert tokenizer
    with torch.no_grad():
        labels = sum(mean_loss("", i, f"The answer is {i + 1}.") for i in range(8)) / 8
        with_rationale = [i for i in range(8) if i % 4 != 3]
        texts = {i: f"One more than {i} is {i + 1}." for i in with_rationale}
        rationales = sum(0.3 * mean_loss("[rationale] ", i, text) for i, text in texts.items()) / 8
    row = lines(done)[0]
    assert row["train/label_loss"] == pytest.approx(labels, rel=1e-4)
    assert row["train/rationale_loss"] == pytest.approx(rationales, rel=1e-4)
    assert row["train/loss"] == pytest.approx(labels + rationales, rel=1e-4)


@pytest.mark.slow
def test_training_lowers_both_losses_and_texts_without_a_label_are_counted(tmp_path, capsys):
    demos = rationale_demos(tmp_path / "d.jsonl")
    changes = {"optimizer": {"lr": 2e-2}, "eval": {"every": 1}}
    changes |= {"batch": {"batch_size": 8, "micro_batch_size": 4, "group_by_length": False, "epochs": 4}}
    done = run(learning(demos, tmp_path / "run", changes))
    held_out = [row for row in lines(done) if "eval/loss" in row]
    for name in ("eval/loss", "eval/label_loss"):
        assert held_out[-1][name] < 0.9 * held_out[0][name]
    assert "1 skipped: no label is found in the answer" in capsys.readouterr().out


def test_the_sizes_of_micro_batches_change_no_number(tmp_path):
    demos = rationale_demos(tmp_path / "d.jsonl")
    few, many = (
        run(learning(demos, tmp_path / f"{size}", {"batch": {"batch_size": 8, "micro_batch_size": size}}))
        for size in (2, 8)
    )
    assert losses(few) == pytest.approx(losses(many), rel=1e-4)


def test_without_weight_only_labels_are_learned(tmp_path):
    demos = rationale_demos(tmp_path / "d.jsonl")
    done = run(learning(demos, tmp_path / "run", {"tuning": {"name": "lora", "rank": 4}}, rationale_weight=0))
    assert (done / "adapter" / "adapter_config.json").is_file()
    assert {row["train/rationale_loss"] for row in lines(done) if "train/rationale_loss" in row} == {0.0}


def test_two_prefixes_that_are_equal_and_a_pattern_that_does_not_compile_are_refused(tmp_path):
    for steps, message in (
        ({"rationale_prefix": ""}, "must differ"),
        ({"pattern": "("}, "is not a regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(SFTConfig, learning("d", tmp_path, **steps), "the test")


@pytest.mark.slow
def test_killed_on_two_processes_it_resumes_bit_for_bit_and_equals_one_process(tmp_path):
    demos = rationale_demos(tmp_path / "d.jsonl")
    changes = {"batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 5, "group_by_length": False}}
    one = run(learning(demos, tmp_path / "one", changes))
    changes |= {"deepspeed": zero(tmp_path, 2)}
    whole = launch(2, learning(demos, tmp_path / "whole", changes))
    killed = launch(2, learning(demos, tmp_path / "killed", changes), "in-step 4")
    launch(2, learning(demos, tmp_path / "killed", changes), resume=True)
    assert lines(killed) == lines(whole) and same_weights(killed, whole)
    for mine, other in zip(lines(one), lines(whole), strict=True):
        for key in ("train/loss", "train/rationale_loss", "eval/loss", "eval/token_accuracy"):
            assert mine.get(key) == pytest.approx(other.get(key), abs=1e-4), (mine["step"], key)
