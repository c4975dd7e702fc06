"""Recorded updates: they are what happened, can be computed once more, and do not change the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import shared_base_runs
import tiny
import torch
from logged import lines
from ppo_runs import config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.ppo.config import PPOConfig
from rlhf.replay import record
from rlhf.replay.recompute import check_mathematics
from rlhf.replay.tokens import pieces
from stages.cli import app
from stages.ppo import run


def replay(*words: object):
    return CliRunner().invoke(app, ["replay", *map(str, words)], env={"COLUMNS": "200"})


def comparisons(*words: object) -> tuple[int, dict[str, str]]:
    """Exit status, and name -> verdict."""
    done = replay(*words, "--json")
    assert not isinstance(done.exception, UserError), done.exception
    return done.exit_code, {row["name"]: row["verdict"] for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, prompts) -> Path:
    """A run of three updates, each recorded, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    shaping = {"normalize_scores": True, "clip_score": 2.0, "whiten_rewards": True}
    run(config(folder, prompts, updates=3, log={"record_every": 1}, shaping=shaping, kl__estimator="k3"))
    return folder


def test_a_recorded_update_is_computed_once_more_with_and_without_the_models(recorded):
    assert record.recorded(recorded) == [1, 2, 3]
    for step in (1, 3):
        status, found = comparisons(recorded, "--step", step)
        assert status == 0
        mathematics = ("KL per token", "shaped scores", "rewards", "advantages", "returns", "objective/kl",
                       "objective/rlhf_reward", "val/explained_variance", "objective/kl_coef")  # fmt: skip
        assert {found[name] for name in mathematics} == {"equal"}
        for name in ("log-probs", "reference's log-probs", "values", "raw scores"):
            assert found[name].startswith("equal")


def test_the_record_holds_what_the_update_used(recorded):
    update, intact = record.read(recorded, 2)
    assert intact and update.step == 2
    rollout = update.experience.rollout
    assert len(rollout.completions) == 8 and rollout.response_mask.shape == update.rewards.shape
    row = next(row for row in lines(recorded) if row["step"] == 2 and "objective/scores" in row)
    assert float(update.experience.scores.mean()) == pytest.approx(row["objective/scores"])
    assert update.score_std != 1.0
    assert float(update.advantages.advantages[rollout.response_mask].std(correction=0)) == pytest.approx(1, 1e-3)


TAMPERED = {
    "rewards": {"rewards", "advantages", "returns"}, "advantages": {"advantages"}, "kl": {"KL per token"},
    "values": {"advantages", "returns"}, "scores": {"shaped scores"}, "returns": {"returns"},
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_changed_number_is_found_and_named(name, recorded, tmp_path):
    copy = tmp_path / "run"
    copy.symlink_to(recorded)
    file = record.folder(recorded, 2) / record.NUMBERS
    before = file.read_bytes()
    try:
        numbers = load_file(file)
        numbers[name][3] += 0.01
        save_file(numbers, file)
        done = replay(recorded, "--step", 2, "--no-models")
        status, found = comparisons(recorded, "--step", 2, "--no-models")
    finally:
        file.write_bytes(before)
    assert status == done.exit_code == 1 and "the checksum differs" in done.stderr
    assert TAMPERED[name] <= {one for one, verdict in found.items() if verdict == "DIFFERS"}


def test_log_probs_that_the_models_do_not_give_are_found(recorded):
    """The mathematics agrees, since everything was changed with them; the models do not."""
    place = record.folder(recorded, 3)
    before = {file: file.read_bytes() for file in place.iterdir()}
    try:
        numbers = load_file(place / record.NUMBERS)
        numbers["values"] += 0.1 * torch.arange(len(numbers["values"])) % 1
        save_file(numbers, place / record.NUMBERS)
        status, found = comparisons(recorded, "--step", 3)
    finally:
        for file, content in before.items():
            file.write_bytes(content)
    assert status == 1 and found["values"] == "DIFFERS" and found["log-probs"].startswith("equal")


def test_what_cannot_be_replayed_is_refused_with_what_can(recorded, tmp_path):
    error = replay(recorded, "--step", 7).exception
    assert isinstance(error, UserError) and "1, 2, 3" in str(error)
    assert f"{recorded}: 3 updates are recorded, of steps 1, 2, 3. To open the last: " in replay(recorded).stdout
    broken = tmp_path / "updates" / "step-00000001"
    broken.mkdir(parents=True)
    (broken / record.FACTS).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        record.read(tmp_path, 1)


def test_a_damaged_line_of_metrics_leaves_out_what_it_says_and_nothing_else(recorded):
    file = recorded / "metrics.jsonl"
    before = file.read_bytes()
    damaged = [b"{" if json.loads(line)["step"] == 2 else line for line in before.splitlines()]
    try:
        file.write_bytes(b"\n".join(damaged) + b"\n")
        done, other = (replay(recorded, "--step", step, "--no-models") for step in (3, 2))
        status, found = comparisons(recorded, "--step", 3, "--no-models")
    finally:
        file.write_bytes(before)
    assert status == done.exit_code == 0 and found["objective/kl"] == "equal"
    assert "cannot be read" in done.stderr and "not compared" not in done.stderr
    assert other.exit_code == 0 and "the metrics of update 2, so they are not compared" in other.stderr
    assert "objective/kl " not in other.stdout and "rewards" in other.stdout


def test_a_damaged_config_is_named(recorded):
    file = recorded / "config.yaml"
    before = file.read_bytes()
    try:
        for content in (b"", b"a: [", b"\xff"):
            file.write_bytes(content)
            assert "config.yaml: cannot be read" in str(replay(recorded, "--step", 1).exception), content
    finally:
        file.write_bytes(before)


def test_the_step_of_a_single_record_does_not_read_like_a_count(tmp_path):
    (tmp_path / "run.json").write_text('{"stage": "ppo", "status": "complete"}')
    assert f"{tmp_path}: no update is recorded; " in replay(tmp_path).stdout
    (tmp_path / "updates/step-00000050").mkdir(parents=True)
    assert f"1 update is recorded, of step 50. To open it: rlhf replay {tmp_path} --step 50" in replay(tmp_path).stdout


def test_without_the_checkpoint_the_models_are_left_out(recorded):
    assert not (recorded / "checkpoints" / "step-00000001").exists()  # pruned
    status, found = comparisons(recorded, "--step", 2)
    assert status == 0 and "log-probs" not in found and "advantages" in found
    assert "without the models" in replay(recorded, "--step", 2).stderr


def test_episodes_and_tokens_are_readable(recorded):
    done = replay(recorded, "--step", 1, "--no-models", "--episodes", 2, "--tokens", 0)
    assert done.exit_code == 0 and done.stdout.count("Episode ") == 3
    assert "logprobs" in done.stdout and "8 episodes" in done.stdout


@pytest.mark.slow
def test_recording_changes_nothing_and_a_resumed_run_records_the_same(tmp_path, prompts):
    plain = config(tmp_path / "plain", prompts, updates=3, log={"record_every": 0}, checkpoints__every=2)
    run(plain)
    whole = config(tmp_path / "whole", prompts, updates=3, log={"record_every": 2}, checkpoints__every=2)
    run(whole)
    assert lines(tmp_path / "plain") == lines(tmp_path / "whole")
    assert not (tmp_path / "plain" / record.FOLDER).exists() and record.recorded(tmp_path / "whole") == [1, 3]
    file = record.folder(tmp_path / "whole", 3) / record.NUMBERS
    first = file.read_bytes()
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000003")
    info = json.loads((tmp_path / "whole" / "run.json").read_text())
    (tmp_path / "whole" / "run.json").write_text(json.dumps(info | {"status": "running"}))
    file.write_bytes(b"left by a crash")
    run(whole, resume=True)
    assert file.read_bytes() == first and lines(tmp_path / "plain") == lines(tmp_path / "whole")


def test_the_first_and_the_newest_records_are_kept(tmp_path, recorded):
    update, _ = record.read(recorded, 1)
    for step in range(1, 7):
        record.write(tmp_path, dataclasses.replace(update, step=step), keep=3)
    assert record.recorded(tmp_path) == [1, 5, 6]
    record.forget_after(tmp_path, 5)
    assert record.recorded(tmp_path) == [1, 5]


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_updates_without_a_critic_are_recorded_too(estimator, tmp_path, prompts):
    c = config(tmp_path / "run", prompts, updates=1, advantage=estimator, rollout__samples_per_prompt=2)
    run(c)
    update, intact = record.read(tmp_path / "run", 1)
    assert intact and update.experience.values is None and "returns" not in update.columns
    assert {one.verdict for one in check_mathematics(c, update)} == {"equal"}
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert "advantage" not in samples[0]["tokens"] and "logprob" in samples[0]["tokens"]


@pytest.mark.slow
def test_the_models_are_replayed_with_adapters_and_on_a_shared_base(tmp_path, prompts):
    parents = shared_base_runs.parents()
    values = shared_base_runs.values_of(tmp_path / "shared", prompts, parents["sft"], parents["over-sft"])
    run(check_config(PPOConfig, values | {"log": {"record_every": 1}}, "test"))
    log = {"record_every": 1}
    run(config(tmp_path / "lora", prompts, tuning={"name": "lora", "rank": 4}, log=log, rollout__temperature=0.7))
    for name in ("shared", "lora"):
        for step in (1, 2):
            status, found = comparisons(tmp_path / name, "--step", step)
            assert status == 0 and found["log-probs"].startswith("equal") and found["values"].startswith("equal")


def test_samples_carry_the_numbers_of_their_tokens(recorded):
    samples = lines(recorded, "samples.jsonl")
    for row in samples:
        numbers = row["tokens"]
        assert "".join(numbers["text"]) == row["answer"]
        assert {len(column) for column in numbers.values()} == {len(numbers["text"])}
        assert numbers.keys() == {"text", "logprob", "ref_logprob", "value", "reward", "advantage"}
    assert samples[0]["tokens"]["logprob"] == samples[0]["tokens"]["ref_logprob"]  # nothing was learned yet


def test_pieces_of_a_text_join_to_it():
    chat = load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())
    ids = [*chat.tokenizer.encode("Ein Märchen – 日本語 😀, said the fox.", add_special_tokens=False), chat.end_id]
    found = pieces(chat, ids)
    assert len(found) == len(ids) and "".join(found) == chat.decode(ids) and found[-1] == ""
