"""A student that learns from a teacher: the divergences are TRL's, the teacher is frozen, runs resume bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logged import lines
from sft_runs import launch, losses, run, same_weights, settings, zero
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.experimental.gkd import GKDTrainer

from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.models.forward import head_logits, predicting_states
from rlhf.models.load import load_policy
from rlhf.runs.model_folder import fingerprint
from rlhf.runs.run import read_run
from rlhf.sft.config import SFTConfig
from rlhf.sft.divergence import divergence, student_predictions


def teacher_folder(path: Path, vocab_size: int = 320) -> str:
    """A larger random Llama with the tiny tokenizer; its logits are far from uniform."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return teacher_folder(tmp_path_factory.mktemp("teachers") / "large", vocab_size=336)  # more rows than tokens


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "demos", 40)


SHORT = {"batch": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 5, "group_by_length": False}}


def learning(demos: str, folder: Path, teacher: str, changes: dict[str, Any] | None = None, **logits: Any) -> Any:
    more = {"distillation": {"logits": {"teacher": teacher, "max_new_tokens": 6, **logits}}, **(changes or {})}
    return settings(demos, folder, **more)


# ---- the divergences -----------------------------------------------------------------------------------------------


def test_divergences_equal_numbers_worked_by_hand():
    # p = (3/4, 1/4) of the teacher, q = (1/4, 3/4) of the student
    student, teacher = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[3.0, 1.0]]).log()
    three = torch.tensor(3.0).log().item()
    assert divergence(student, teacher, "forward-kl", 0.5, 1.0).item() == pytest.approx(three / 2)
    assert divergence(student, teacher, "reverse-kl", 0.5, 1.0).item() == pytest.approx(three / 2)
    # the mixture is (1/2, 1/2): each KL is 3/4 ln 3/2 + 1/4 ln 1/2
    half = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert divergence(student, teacher, "jsd", 0.5, 1.0).item() == pytest.approx(half.item())
    # at T = 2 the odds are sqrt(3) to 1
    odds = 3**0.5 / (1 + 3**0.5)
    expected = (odds - (1 - odds)) * three / 2
    assert divergence(student, teacher, "forward-kl", 0.5, 2.0).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "beta", "trl"), [("forward-kl", 0.5, 0), ("reverse-kl", 0.5, 1), ("jsd", 0.3, 0.3), ("jsd", 0.9, 0.9)]
)
def test_divergences_and_their_gradients_are_those_of_trl(kind, beta, trl):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 50, generator=generator) for _ in range(2))
    mine, theirs = (student.clone().requires_grad_() for _ in range(2))
    found = divergence(mine, teacher, kind, beta, 0.9).sum()
    expected = GKDTrainer.generalized_jsd_loss(theirs[None], teacher[None], beta=trl, temperature=0.9, reduction="sum")
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 4])
def test_chunks_change_neither_the_loss_nor_the_gradient(chunks):
    model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama())
    ids = torch.arange(3, 33).view(2, 15)
    labelled = torch.ones_like(ids, dtype=torch.bool)
    labelled[:, :4] = False
    with torch.no_grad():
        frozen = torch.randn(22, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    hidden, targets = predicting_states(model, ids, None, labelled)
    found = student_predictions(
        model, hidden, targets, frozen, lambda states: states,
        lambda s, t: divergence(s, t, "jsd", 0.5, 1.0), tokens=300, chunks=chunks,
    )  # fmt: skip
    whole = divergence(head_logits(model, hidden)[:, :300], frozen[:, :300], "jsd", 0.5, 1.0)
    torch.testing.assert_close(found.divergences, whole)
    parameters = list(model.parameters())
    mine = torch.autograd.grad(found.divergences.sum(), parameters, retain_graph=True)
    other = torch.autograd.grad(whole.sum(), parameters)
    for a, b in zip(mine, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- runs ----------------------------------------------------------------------------------------------------------


def last(folder: Path, name: str) -> float:
    return [row[name] for row in lines(folder) if name in row][-1]


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_a_student_comes_closer_to_its_frozen_teacher(kind, demos, teacher, tmp_path):
    before = fingerprint(Path(teacher))
    done = run(learning(demos, tmp_path / "run", teacher, {"optimizer": {"lr": 2e-2}}, divergence=kind))
    assert losses(done)[-1] < 0.95 * losses(done)[0]
    assert last(done, "eval/divergence") == last(done, "eval/loss") < 0.95 * losses(done)[0]
    assert fingerprint(Path(teacher)) == before
    assert [parent["path"] for parent in read_run(done)["parents"]] == [tiny.llama(), teacher]


def test_a_student_that_is_its_teacher_has_no_loss_on_any_answer(demos, tmp_path):
    done = run(learning(demos, tmp_path / "run", tiny.llama(), {"optimizer": {"lr": 1e-9}}, on_policy=0.5))
    assert max(map(abs, losses(done))) < 1e-5


def test_an_encoder_decoder_that_is_its_own_teacher_has_no_loss_on_any_answer(demos, tmp_path):
    path = tiny.encoder_decoder("t5")
    changes = {"model": {"path": path, "max_length": 128}, "optimizer": {"lr": 1e-9}, **SHORT}
    done = run(learning(demos, tmp_path / "run", path, changes, on_policy=0.5))
    assert max(map(abs, losses(done))) < 1e-5 and any(row.get("train/on_policy", 0) > 0 for row in lines(done))


@pytest.mark.slow
def test_answers_of_the_student_take_the_place_of_a_fraction_of_the_demonstrations(demos, teacher, tmp_path):
    none, some, every = (
        run(learning(demos, tmp_path / str(share), teacher, on_policy=share)) for share in (0.0, 0.5, 1.0)
    )
    shares = [
        [row["train/on_policy"] for row in lines(folder) if "train/on_policy" in row] for folder in (none, some, every)
    ]
    assert set(shares[0]) == {0.0} and set(shares[2]) == {1.0}
    assert 0.05 < sum(shares[1]) / len(shares[1]) < 0.8


@pytest.mark.slow
def test_the_loss_of_demonstrations_can_be_added(demos, teacher, tmp_path):
    plain = run(learning(demos, tmp_path / "plain", teacher))
    added = run(learning(demos, tmp_path / "added", teacher, sft_weight=0.5))
    alone = run(settings(demos, tmp_path / "alone"))
    assert losses(added)[0] == pytest.approx(losses(plain)[0] + 0.5 * losses(alone)[0], rel=1e-5)


def test_a_student_may_have_an_adapter_and_sample(demos, teacher, tmp_path):
    changes = {"tuning": {"name": "lora", "rank": 4}, "optimizer": {"lr": 2e-2}}
    done = run(learning(demos, tmp_path / "run", teacher, changes, on_policy=0.5))
    assert losses(done)[-1] < losses(done)[0]
    assert (done / "adapter" / "adapter_config.json").is_file()


def test_resuming_a_finished_run_gives_the_same_result(demos, teacher, tmp_path):
    values = learning(demos, tmp_path / "run", teacher, on_policy=0.5)
    done = run(values)
    before, kept = lines(done), shutil.copytree(done, tmp_path / "kept")
    run(values, resume=True)
    assert lines(done) == before and same_weights(done, kept)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_teacher_with_another_vocabulary_is_refused_by_name(demos, tmp_path):
    other = teacher_folder(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"other has another vocabulary than .*: 321 tokens against 320; 1 ") as at:
        run(learning(demos, tmp_path / "run", other))
    assert "'<extra>'" in str(at.value) and "rlhf data distill" in at.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {}}, "needs `logits` or `step_by_step`"),
        ({"batch": {"packing": True}}, "does not work with batch.packing"),
        ({"tuning": "prompt-tuning"}, "prompt-tuning cannot be sampled from"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_config(changes, message, demos, teacher, tmp_path):
    with pytest.raises(UserError, match=message):
        check_config(SFTConfig, learning(demos, tmp_path / "run", teacher, changes, on_policy=1.0), "the test")


# ---- killed, and on several processes ------------------------------------------------------------------------------


def compare(one: Path, two: Path) -> None:
    """Metrics of a run on one process and on two."""
    for mine, other in zip(lines(one), lines(two), strict=True):
        for key in ("train/loss", "optimizer/grad_norm", "train/tokens", "train/on_policy", "eval/loss"):
            assert mine.get(key) == pytest.approx(other.get(key), abs=1e-4), (mine["step"], key)


@pytest.mark.slow
def test_under_zero_3_a_killed_student_resumes_bit_for_bit_and_equals_one_process(demos, teacher, tmp_path):
    changes = {**SHORT, "deepspeed": zero(tmp_path, 3)}
    whole = launch(2, learning(demos, tmp_path / "whole", teacher, changes, on_policy=0.5))
    values = learning(demos, tmp_path / "killed", teacher, changes, on_policy=0.5)
    killed = launch(2, values, "in-step 4")
    assert not (killed / "model").exists()
    launch(2, values, resume=True)
    assert lines(killed) == lines(whole) and same_weights(killed, whole)
    compare(run(learning(demos, tmp_path / "one", teacher, SHORT, on_policy=0.5)), whole)


@pytest.mark.slow
def test_under_zero_2_two_processes_equal_one(demos, teacher, tmp_path):
    one = run(learning(demos, tmp_path / "one", teacher, SHORT, on_policy=0.5))
    changes = {**SHORT, "deepspeed": zero(tmp_path, 2)}
    compare(one, launch(2, learning(demos, tmp_path / "two", teacher, changes, on_policy=0.5)))
