"""Instruction tuning: the loss is what it says, evaluations change nothing, the best weights are the result.

The slow tests kill runs with SIGKILL, resume them, and compare ZeRO on two processes with one process.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from logged import lines
from safetensors.torch import load_file
from sft_runs import RUN, launch, losses, run, same_weights, settings, weights, zero
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.tables import tokenize
from rlhf.models.load import load_policy
from rlhf.runs.run import read_run
from rlhf.sft.config import SFTConfig
from rlhf.training.epoch_order import epoch_order
from rlhf.training.loop import supervised_engine
from stages import sft


def rows(demos: str, folder: Path) -> Any:
    """The token rows that a run trains on and holds out."""
    config = check_config(SFTConfig, settings(demos, folder), "the test")
    chat = load_tokenizer(config.model, tiny.llama())
    folder.mkdir()
    return tokenize(folder, chat, 128, config.data, "demonstration")


def nll(model: Any, records: list[dict[str, Any]]) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the labelled tokens, record by record without padding, and their number."""
    total, count = torch.zeros(()), 0
    for record in records:
        logits = model(torch.tensor([record["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(record["labels"])[1:]
        total = total + cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total, count


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_training_equals_plain_torch(demos: str, tmp_path: Path) -> None:
    optimizer = {"lr": 3e-3, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.1, "max_grad_norm": 0.5}
    found = losses(run(settings(demos, tmp_path / "run", optimizer=optimizer)))
    table = rows(demos, tmp_path / "rows").train
    config = check_config(SFTConfig, settings(demos, tmp_path / "run"), "the test")
    model = load_policy(config.model, tiny.llama())
    decay = [p for n, p in model.named_parameters() if "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=3e-3)
    for step in range(10):
        order = epoch_order(0, step // 5, 40, 8, table["length"][:])
        batch = [table[row] for row in order[8 * (step % 5) :][:8]]
        total, count = nll(model, batch)
        loss = total / count
        assert found[step] == pytest.approx(float(loss), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.step()
        adam.zero_grad()


def test_only_assistant_tokens_give_a_gradient(demos: str, tmp_path: Path) -> None:
    config = check_config(SFTConfig, settings(demos, tmp_path / "run"), "the test")
    chat = load_tokenizer(config.model, tiny.llama())
    table = rows(demos, tmp_path / "rows").train
    model = load_policy(config.model, tiny.llama())
    states: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output.retain_grad()
        states.append(output)

    model.model.norm.register_forward_hook(keep)
    objective = sft.SFTObjective(config, chat, model, None)
    batch = objective.batch([table[i] for i in range(4)])
    objective.loss(supervised_engine(config, sft.TokenPredictor(model)), batch)[0].backward()
    gradient = states[0].grad.abs().sum(-1)[:, :-1]
    asked = batch.labelled[:, 1:]
    assert (gradient[asked] > 0).all() and (gradient[~asked] == 0).all()
    for record in table.select(range(4)):
        said = [token for token, label in zip(record["input_ids"], record["labels"]) if label != -100]
        assert chat.decode(said).startswith("It goes to the") and said[-1] == chat.end_id


@pytest.mark.parametrize("tuning", ["prompt-tuning", "p-tuning", "prefix-tuning"])
def test_virtual_tokens_have_the_loss_and_gradient_of_pefts_own_forward(
    tuning: str, demos: str, tmp_path: Path
) -> None:
    config = check_config(SFTConfig, settings(demos, tmp_path / "run", tuning=tuning), "the test")
    chat = load_tokenizer(config.model, tiny.llama())
    table = rows(demos, tmp_path / "rows").train
    model = config.tuning(load_policy(config.model, tiny.llama()), chat, "causal")
    trained = [p for p in model.parameters() if p.requires_grad]
    objective = sft.SFTObjective(config, chat, model, None)
    batch = objective.batch([table[i] for i in range(4)])
    total, _ = objective.loss(supervised_engine(config, sft.TokenPredictor(model)), batch)
    loss = total / objective.items(batch)
    found = torch.autograd.grad(loss, trained)
    labels = batch.input_ids.masked_fill(~batch.labelled, -100)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, theirs)
    for mine, other in zip(found, torch.autograd.grad(theirs, trained)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_accuracy_and_entropy_of_training_are_those_of_full_logits(demos: str, tmp_path: Path) -> None:
    done = run(settings(demos, tmp_path / "run", eval={"every": 100, "samples": 0}, batch={"batch_size": 40}))
    first, count, right, entropy = lines(done)[0], 0, 0, 0.0
    model = load_policy(check_config(SFTConfig, settings(demos, tmp_path), "the test").model, tiny.llama())
    with torch.no_grad():
        for record in rows(demos, tmp_path / "rows").train:
            logits = model(torch.tensor([record["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(record["labels"])[1:]
            kept = labels != -100
            right += int((logits.argmax(-1) == labels)[kept].sum())
            entropy += float(torch.distributions.Categorical(logits=logits[kept]).entropy().sum())
            count += int(kept.sum())
    assert first["train/token_accuracy"] == right / count
    assert first["train/entropy"] == pytest.approx(entropy / count, rel=1e-6)


def test_held_out_loss_is_a_mean_over_tokens(demos: str, tmp_path: Path) -> None:
    done = run(settings(demos, tmp_path / "run", eval={"every": 10, "samples": 0}))
    last = lines(done)[-1]
    model = AutoModelForCausalLM.from_pretrained(done / "model")
    with torch.no_grad():
        total, count = nll(model, list(rows(demos, tmp_path / "rows").eval))
    assert last["eval/loss"] == pytest.approx(float(total) / count, abs=1e-5)
    assert last["eval/perplexity"] == pytest.approx(math.exp(float(total) / count), rel=1e-4)
    assert read_run(done)["metrics"] == {k: v for k, v in last.items() if k in ("eval/loss", "eval/perplexity")}


@pytest.mark.slow
def test_evaluations_samples_and_log_intervals_change_no_step(demos: str, tmp_path: Path) -> None:
    plain = run(settings(demos, tmp_path / "a", eval={"every": 100, "samples": 0}))
    busy = run(settings(demos, tmp_path / "b", eval={"every": 1, "samples": 4}))
    assert losses(plain) == losses(busy)
    sparse = run(
        settings(demos, tmp_path / "c", eval={"every": 100, "samples": 0}, log={"every": 4}, checkpoints={"every": 5})
    )
    logged = {row["step"]: row["train/loss"] for row in lines(sparse) if "train/loss" in row}
    assert list(logged) == [4, 5, 8, 10]  # also at checkpoints
    assert logged[4] == pytest.approx(sum(losses(plain)[:4]) / 4, abs=1e-5)


@pytest.mark.parametrize(
    "schedule, falls", [("constant", [1.0] * 6), ("linear", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])]
)
def test_the_learning_rate_climbs_over_the_warm_up_and_then_follows_the_schedule(
    schedule: str, falls: list[float], demos: str, tmp_path: Path
) -> None:
    optimizer = {"lr": 1e-3, "warmup": 0.4, "schedule": schedule}
    done = run(settings(demos, tmp_path / "run", optimizer=optimizer, eval={"every": 100, "samples": 0}))
    rates = [row["optimizer/lr"] for row in lines(done) if "optimizer/lr" in row]
    assert rates == pytest.approx([1e-3 * scale for scale in (0, 0.25, 0.5, 0.75, *falls)])


# ---- the result ----------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_result_and_is_kept(
    demos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = 3
    held_out = lambda objective, engine, step: {"loss": 1.0 + abs(step - best)}  # noqa: E731
    monkeypatch.setattr(sft.SFTObjective, "evaluate", held_out)
    done = run(settings(demos, tmp_path / "run", eval={"every": 1, "samples": 0}, checkpoints={"every": 2, "keep": 1}))
    assert read_run(done)["step"] == best and read_run(done)["metrics"]["eval/loss"] == 1.0
    kept = sorted(path.name for path in (done / "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", "step-00000010"]
    saved = load_file(done / "checkpoints" / f"step-{best:08d}" / "state-000-0.safetensors")
    assert all(
        torch.equal(value, saved[f"weights/model.{name}@0"].view_as(value)) for name, value in weights(done).items()
    )


def test_the_result_loads_in_plain_transformers_and_answers(demos: str, tmp_path: Path) -> None:
    batch = {"batch_size": 8, "epochs": 12}
    done = run(settings(demos, tmp_path / "run", eval={"every": 30, "samples": 2}, batch=batch, optimizer={"lr": 1e-2}))
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    model = AutoModelForCausalLM.from_pretrained(done / "model")
    chat = [{"role": "user", "content": tiny.question(3)}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=60)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith(" It goes to the")
    samples = lines(done, "samples.jsonl")
    assert [row["step"] for row in samples] == [30, 30, 60, 60]
    assert samples[-1]["answer"].startswith("It goes to") and samples[-1]["prompt"].endswith("Assistant:")
    assert samples[0]["demonstration"] == tiny.answer(40, 0)
    assert [row["ended"] for row in samples] == [False] * 4  # after 8 tokens


@pytest.mark.parametrize("tuning", ["lora", "prefix-tuning"])
def test_an_adapter_run_leaves_adapter_and_model(tuning: str, demos: str, tmp_path: Path, capsys: Any) -> None:
    values = settings(demos, tmp_path / "run", tuning=tuning, optimizer={"lr": 0.03})
    values["model"] = {"path": tiny.llama(), "max_length": 100}
    done = run(values)
    assert f"Tuning: {tuning}" in capsys.readouterr().out
    assert losses(done)[-1] < losses(done)[0]
    assert (done / "adapter").exists() == (tuning == "lora")
    if tuning == "lora":
        AutoModelForCausalLM.from_pretrained(done / "model")
    else:
        peft.AutoPeftModelForCausalLM.from_pretrained(done / "model")


def test_without_held_out_prompts_the_last_weights_are_the_result(tmp_path: Path) -> None:
    demos = tiny.write_demonstrations(tmp_path / "demos", 16, held_out=0)
    done = run(settings(demos, tmp_path / "run"))
    assert read_run(done)["step"] == 4 and not any("eval/loss" in row for row in lines(done))


def test_activation_checkpointing_changes_no_number(demos: str, tmp_path: Path) -> None:
    batch = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 4}
    plain = run(settings(demos, tmp_path / "a", batch=batch))
    spare = run(settings(demos, tmp_path / "b", batch=batch, gradient_checkpointing=True))
    assert losses(plain) == losses(spare)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_packing_is_refused_where_rows_would_see_each_other(demos: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch.packing: the attention implementation is 'sdpa'"):
        run(settings(demos, tmp_path / "run", batch={"packing": True}))


def test_packed_rows_hold_whole_demonstrations(demos: str, tmp_path: Path) -> None:
    table = rows(demos, tmp_path / "rows").train
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama())
    model.config._attn_implementation = "flash_attention_2"
    packed = sft.pack(table, 128, model)
    assert len(packed) < len(table) and all(
        sum(n) == len(ids) for n, ids in zip(packed["seq_lengths"], packed["input_ids"])
    )
    assert sorted(n for lengths in packed["seq_lengths"] for n in lengths) == sorted(table["length"][:])


def test_a_learned_prefix_with_activation_checkpointing_is_refused(demos: str, tmp_path: Path) -> None:
    batch = {"batch_size": 8}
    values = settings(demos, tmp_path / "run", tuning="prefix-tuning", batch=batch, gradient_checkpointing=True)
    values["model"] = {"path": tiny.llama(), "max_length": 100}
    with pytest.raises(UserError, match="does not work with prefix-tuning"):
        run(values)


@pytest.fixture(scope="module")
def undisturbed(demos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without changes."""
    return run(settings(demos, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_move(
    fault: str, demos: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = sft.SFTObjective.loss, itertools.count()

    def spoiled(self: Any, engine: Any, batch: Any) -> tuple[Tensor, list[Tensor]]:
        loss, sums = usual(self, engine, batch)
        if next(calls) // 2 != 7:  # two micro-batches a step
            return loss, sums
        if fault == "loss":
            return loss * math.nan, sums
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, sums

    monkeypatch.setattr(sft.SFTObjective, "loss", spoiled)
    with pytest.raises(UserError) as error:
        run(settings(demos, tmp_path / "run"))
    assert f"step 8: the {fault} is not finite" in str(error.value)
    assert f"{tmp_path}/run/checkpoints/step-00000006" in str(error.value)
    resumed = run(settings(demos, tmp_path / "run"), resume=True)
    assert lines(resumed) == lines(undisturbed) and same_weights(resumed, undisturbed)


def test_resuming_a_finished_run_gives_the_same_result(demos: str, tmp_path: Path) -> None:
    done = run(settings(demos, tmp_path / "run"))
    before, kept = lines(done), weights(done)
    run(settings(demos, tmp_path / "run"), resume=True)
    assert lines(done) == before and all(torch.equal(kept[name], value) for name, value in weights(done).items())


# ---- killed, and on several processes ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes, stage, log_every", [(1, None, 1), (1, None, 4), (2, 2, 1), (2, 3, 4)])
def test_a_killed_run_resumes_bit_for_bit(
    processes: int, stage: int | None, log_every: int, demos: str, tmp_path: Path
) -> None:
    changes = {"deepspeed": zero(tmp_path, stage)} if stage else {}
    changes |= {"log": {"every": log_every}}
    changes |= {"batch": {"batch_size": 8, "micro_batch_size": 2, "epochs": 2}}
    whole = launch(processes, settings(demos, tmp_path / "whole", **changes))
    values = settings(demos, tmp_path / "killed", **changes)
    for kill in ("in-write 3", "in-step 5", "in-write 6"):  # each continues what the one before left
        killed = launch(processes, values, kill, resume=kill != "in-write 3")
        assert not (killed / "model").exists()
        if kill.startswith("in-write"):
            assert list((killed / "checkpoints").glob(".step-*.partial/state-*"))
    launch(processes, values, resume=True)
    assert lines(killed) == lines(whole)
    assert lines(killed, "samples.jsonl") == lines(whole, "samples.jsonl")
    assert same_weights(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_equal_one(stage: int, tuning: str, demos: str, tmp_path: Path) -> None:
    changes = {
        "tuning": tuning,
        "batch": {"batch_size": 8, "micro_batch_size": 2, "epochs": 2, "group_by_length": False},
    }
    one = run(settings(demos, tmp_path / "one", **changes))
    two = launch(2, settings(demos, tmp_path / "two", deepspeed=zero(tmp_path, stage), **changes))
    assert len(losses(two)) == 10
    for mine, other in zip(lines(one), lines(two)):
        assert mine.keys() == other.keys()
        for key in (
            "train/loss",
            "optimizer/grad_norm",
            "optimizer/lr",
            "train/tokens",
            "eval/loss",
            "eval/token_accuracy",
        ):
            assert mine.get(key) == pytest.approx(other.get(key), abs=1e-4), (mine["step"], key)
    assert read_run(one)["step"] == read_run(two)["step"]
    exported, expected = weights(two), weights(one)
    assert exported.keys() == expected.keys()
    assert max(float((exported[name] - expected[name]).abs().max()) for name in expected) < 1e-3
    table = rows(demos, tmp_path / "rows").eval
    with torch.no_grad():
        total, count = nll(AutoModelForCausalLM.from_pretrained(two / "model"), list(table))
    assert float(total) / count == pytest.approx(read_run(two)["metrics"]["eval/loss"], abs=1e-4)


@pytest.mark.slow
def test_a_deepspeed_file_works_on_one_process(demos: str, tmp_path: Path) -> None:
    batch = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 4}
    plain = run(settings(demos, tmp_path / "plain", batch=batch))
    for stage in (2, 3):
        values = settings(demos, tmp_path / f"zero{stage}", batch=batch, deepspeed=zero(tmp_path, stage))
        assert losses(launch(1, values)) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(demos: str, tmp_path: Path) -> None:
    spoil = """
usual = sft.SFTObjective.loss
def spoiled(*args):
    loss, sums = usual(*args)
    return loss * (float("nan") if STEP[0] == 4 and RANK else 1), sums
sft.SFTObjective.loss = spoiled
with exit_on_error():"""
    values = settings(demos, tmp_path / "run")
    done = tiny.launch(2, RUN.replace("with exit_on_error():", spoil), json.dumps(values), "", "0")
    assert done.returncode != 0 and "step 5: the loss is not finite" in done.stdout, done.stdout[-3000:]
    assert "lost contact" not in done.stdout
