"""`rlhf sample`: what is printed and written, repeatability, best of n, refusals."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import tiny
import torch

from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Message, Prompt
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.inference.best_of import best_of_curve, evaluations_of, expected_best
from rlhf.inference.policy import open_policy
from rlhf.inference.sampling import sample
from rlhf.inference.sampling_params import sampling_params
from rlhf.rollout.types import SamplingParams
from rlhf.runs.parents import resolve_model_path
from rlhf.sft.config import SFTConfig
from stages.sample import command
from stages.sft import run as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    sft = finished.sft(folder / "sft")
    reward = finished.reward(folder / "reward", sft)
    other = finished.reward(folder / "other", finished.sft(folder / "chatml", model=finished.chatml()))
    ppo = finished.ppo(folder / "ppo", sft, reward, temperature=0.5, top_k=7, stop=["zz"])
    prompt_tuning = finished.sft(folder / "prompt-tuning", "prompt-tuning")
    return {"sft": sft, "reward": reward, "other": other, "ppo": ppo, "prompt-tuning": prompt_tuning}


def lines(*words: Any) -> list[dict[str, Any]]:
    """The JSON lines of `rlhf sample ... --json`."""
    said, _ = finished.invoke(command, *words, "--json", "--max-new-tokens", 8)
    return [json.loads(line) for line in said.splitlines()]


def test_an_answer_is_printed_below_its_prompt(runs: dict[str, str]) -> None:
    said, _ = finished.invoke(command, runs["sft"], "-p", "What is [red]?", "--max-new-tokens", 8, "--seed", 3)
    (row,) = lines(runs["sft"], "-p", "What is [red]?", "--seed", 3)
    assert "user: What is [red]?" in said
    assert f"{row['tokens']} tokens" in said and "tokens/s" in said


def test_json_lines_hold_messages_answer_end_and_length(runs: dict[str, str]) -> None:
    rows = lines(runs["sft"], "-p", "One?", "-p", "Two?", "--n", 3, "--system", "Be brief.")
    assert [(row["messages"][-1]["content"], row["sample"]) for row in rows] == [
        (text, k) for text in ("One?", "Two?") for k in range(3)
    ]
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert all(row["tokens"] == 8 or row["ended"] for row in rows)


def test_the_same_seed_gives_the_same_answers_whatever_else_is_sampled(runs: dict[str, str]) -> None:
    alone = lines(runs["sft"], "-p", "One?", "--seed", 5)
    among = lines(runs["sft"], "-p", "A longer one, is it not?", "-p", "One?", "--n", 4, "--seed", 5)
    assert alone[0]["answer"] == among[4]["answer"]
    assert lines(runs["sft"], "-p", "One?", "--seed", 6)[0]["answer"] != alone[0]["answer"]


def test_temperature_zero_is_greedy(runs: dict[str, str]) -> None:
    (row,) = lines(runs["sft"], "-p", "One?", "--temperature", 0)
    chat = load_tokenizer(ModelConfig(path=runs["sft"]), resolve_model_path(runs["sft"]))
    ids = chat.prompt([Message("user", "One?")])
    for _ in range(row["tokens"]):
        ids.append(int(finished.policy_logits(runs["sft"], torch.tensor([ids]))[0, -1].argmax()))
    assert chat.decode(ids[-row["tokens"] :]) == row["answer"]


def test_a_datasets_prompts_are_answered_once_each_from_its_eval_split(runs: dict[str, str], tmp_path: Path) -> None:
    data = tiny.write_rankings(tmp_path / "rankings", 4, held_out=3)
    assert len(lines(runs["sft"], "--dataset", data)) == 3
    assert len(lines(runs["sft"], "--dataset", data, "--split", "train", "--limit", 2)) == 2
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"prompt": "One?"}\n{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    assert len(lines(runs["sft"], "--dataset", twice)) == 2, "no splits: everything"


def test_answers_are_written_whole(runs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    shown = lines(runs["sft"], "-p", "One?", "--n", 2, "--out", out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == shown
    assert list(tmp_path.iterdir()) == [out]


# ---- scores ------------------------------------------------------------------------------------------------------


def test_scores_are_the_reward_models_of_the_very_tokens(runs: dict[str, str]) -> None:
    policy = open_policy(runs["sft"])
    prompt = Prompt((Message("user", "One?"),))
    (answers,) = sample(policy, [prompt], SamplingParams(8), seed=0, n=3)
    rows = lines(runs["sft"], "-p", "One?", "--n", 3, "--reward", runs["reward"])
    expected = finished.scores(runs["reward"], [a.prompt_ids + a.completion.ids for a in answers])
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [row["best"] for row in rows] == (expected == expected.max()).tolist()


def test_a_reward_model_with_another_tokenizer_reads_the_text(runs: dict[str, str]) -> None:
    (row,) = lines(runs["sft"], "-p", "One?", "--reward", runs["other"])
    other = load_tokenizer(ModelConfig(path=runs["other"]), resolve_model_path(runs["other"]))
    expected = finished.scores(runs["other"], [other.whole(row["messages"], row["answer"])])
    assert row["score"] == pytest.approx(float(expected), abs=1e-5)


def test_the_best_of_n_is_shown_with_its_score(runs: dict[str, str]) -> None:
    words = (runs["sft"], "-p", "One?", "--n", 4, "--reward", "test_sample:characters")
    said, _ = finished.invoke(command, *words, "--max-new-tokens", 8)
    scores = [row["score"] for row in lines(*words)]
    assert said.count("answer:") == 1 and "best of 4" in said
    assert f"score {max(scores):g}" in said


def characters(messages: list[dict[str, str]], answer: str) -> float:
    """A reward: longer is better."""
    return len(answer)


def not_a_number(messages: list[dict[str, str]], answer: str) -> float:
    return float("nan")


# ---- how it samples ----------------------------------------------------------------------------------------------


def test_waiting_prompts_take_the_places_of_finished_answers_and_results_come_early_and_in_order(
    runs: dict[str, str],
) -> None:
    policy = open_policy(runs["sft"])
    prompts = [Prompt((Message("user", f"{i}?"),)) for i in range(20)]
    shapes: list[tuple[int, ...]] = []
    hook = policy.model.register_forward_pre_hook(
        lambda module, inputs, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    stream = sample(policy, prompts, SamplingParams(30, batch_size=2), seed=0)
    first = next(stream)
    prefilled = sum(rows for rows, columns in shapes if columns > 1)
    found = [answer for (answer,) in [first, *stream]]
    hook.remove()
    assert prefilled < len(prompts)
    assert [answer.prompt for answer in found] == prompts
    lengths = [len(answer.completion.ids) for answer in found]
    in_pairs = sum(max(pair) for pair in zip(lengths[::2], lengths[1::2]))
    assert sum(columns == 1 for _, columns in shapes) < in_pairs


def test_a_ppo_run_is_sampled_as_in_training_by_default(runs: dict[str, str]) -> None:
    found = sampling_params(runs["ppo"])
    assert (found.max_new_tokens, found.temperature, found.top_k, found.stop) == (12, 0.5, 7, ("zz",))
    assert sampling_params(runs["ppo"], temperature=0, stop=["a"]).stop == ("a",)
    assert sampling_params(runs["ppo"], temperature=0).temperature == 0
    assert sampling_params(runs["sft"]) == SamplingParams(128, batch_size=32)


def test_a_policy_of_virtual_tokens_uses_them_at_every_step(runs: dict[str, str]) -> None:
    policy = open_policy(runs["prompt-tuning"])
    assert policy.limit == 128 - 20
    (row,) = lines(runs["prompt-tuning"], "-p", "One?", "--temperature", 0)
    ids = policy.chat.prompt([Message("user", "One?")])
    found: list[int] = []
    for _ in range(row["tokens"]):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([ids + found])).logits[0, -1]
        found.append(int(logits.argmax()))
    assert policy.chat.decode(found) == row["answer"]
    assert lines(runs["prompt-tuning"], "-p", "One?") == lines(runs["prompt-tuning"], "-p", "One?")


@pytest.mark.parametrize("name", ["sft", "prompt-tuning"])
def test_an_answer_ends_after_a_stop_string(name: str, runs: dict[str, str]) -> None:
    words = (runs[name], "-p", "One?", "--min-new-tokens", 8, "--temperature", 0)
    (row,) = lines(*words)
    stop = row["answer"][:2]
    assert stop.isprintable() and row["tokens"] == 8 and not row["ended"]
    (cut,) = lines(*words, "--stop", stop)
    assert cut["ended"] and cut["tokens"] < 8 and cut["answer"].endswith(stop)


def test_a_long_prompt_keeps_its_end(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    policy = open_policy(runs["sft"])
    (answers,) = sample(policy, [Prompt((Message("user", "word " * 200 + "owl?"),))], SamplingParams(8), seed=0)
    assert len(answers[0].prompt_ids) == 120
    assert "owl?" in policy.chat.tokenizer.decode(answers[0].prompt_ids)
    assert "1 prompts are longer than 120 tokens and were cut to their end" in capsys.readouterr().err


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt and --dataset"),
        (["-p", "One?", "--dataset", "x"], "--prompt and --dataset"),
        (["-p", " "], "--prompt: messages.content: empty"),
        (["--dataset", "nowhere"], "there is no dataset"),
        (["-p", "One?", "--temperature", -1], "--temperature"),
        (["-p", "One?", "--temperature", "nan"], "--temperature"),
        (["-p", "One?", "--top-p", 0], "--top-p"),
        (["-p", "One?", "--min-new-tokens", 9, "--max-new-tokens", 8], "above --max-new-tokens"),
        (["-p", "One?", "--max-new-tokens", 128], "leaves no room"),
        (["-p", "One?", "--reward", "test_sample:nothing"], "cannot be imported"),
        (["-p", "One?", "--reward", "test_sample:not_a_number", "--max-new-tokens", 8], "returned nan"),
        (["-p", "One?", "--out", "/proc/nowhere/answers.jsonl"], "its folder cannot be made"),
    ],
)
def test_a_bad_call_is_refused(words: list[Any], message: str, runs: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message):
        finished.invoke(command, runs["sft"], *words)


def test_models_that_cannot_answer_or_score_are_refused(runs: dict[str, str]) -> None:
    with pytest.raises(UserError, match="gives scores, not answers"):
        finished.invoke(command, runs["reward"], "-p", "One?")
    with pytest.raises(UserError, match="gives scores, not answers"):
        finished.invoke(command, resolve_model_path(runs["reward"]), "-p", "One?")
    with pytest.raises(UserError, match="not a reward model"):
        finished.invoke(command, runs["sft"], "-p", "One?", "--reward", runs["sft"])
    with pytest.raises(UserError, match="no such run, model or file"):
        finished.invoke(command, "./nowhere", "-p", "One?")


def test_a_split_that_is_not_there_is_refused(runs: dict[str, str], tmp_path: Path) -> None:
    data = tiny.write_demonstrations(tmp_path / "demos", 4, held_out=0)
    with pytest.raises(UserError, match=r"no records in the split 'eval'\nIt contains: train \(4\)"):
        finished.invoke(command, runs["sft"], "--dataset", data)


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    from rlhf.core.console import printable

    assert printable("a\x1b[2Jb\n\tc\r") == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc\N{REPLACEMENT CHARACTER}"


def test_each_prompt_is_answered_by_the_adapter_of_its_task(runs: dict[str, str], tmp_path: Path) -> None:
    base = tiny.llama()
    tuned = {"rivers": finished.sft(tmp_path / "a", "lora", model=base), "trees": runs["prompt-tuning"], "rest": "none"}
    with DatasetWriter(tmp_path / "prompts", "prompt") as writer:
        for number in range(8):
            group = ["rivers", "trees", "rest", "?"][number % 4]
            writer.write(Prompt((Message("user", tiny.question(number)),), group=group))
    words = [word for task, path in tuned.items() for word in ("--adapter", f"{task}={path}")]
    said, warned = finished.invoke(
        command, base, "--dataset", tmp_path / "prompts", *words, "--route", "group", "--temperature", 0,
        "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["task"] for row in rows] == ["rivers", "trees", "rest"] * 2
    assert "2 prompts are rejected, since no adapter was given for their group: ? 2" in " ".join(warned.split())
    for row in rows:
        alone = base if tuned[row["task"]] == "none" else tuned[row["task"]]
        (expected,) = lines(alone, "-p", row["messages"][-1]["content"], "--temperature", 0)
        assert row["answer"] == expected["answer"], row["task"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--adapter", "a"], "expected TASK=PATH"),
        (["--adapter", "a=x", "--adapter", "a=y"], "named twice"),
        (["--adapter", "a=x", "--adapter", "b=y"], "there are several tasks"),
        (["--adapter", "a=x", "--route", "topic"], "is none of group, source"),
        (["--route", "group"], "there is no --adapter to choose"),
    ],
)
def test_unclear_adapters_are_refused_before_the_model_is_loaded(words: list[str], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        finished.invoke(command, "no/such/model", "-p", "One?", *words)


# ---- best of n


def test_the_curve_is_the_mean_over_all_subsets_of_the_answers():
    scores = np.random.default_rng(0).normal(size=(5, 6))
    for n in (1, 2, 3, 6):
        by_hand = [np.mean([max(subset) for subset in combinations(row, n)]) for row in scores]
        np.testing.assert_allclose(expected_best(scores, n), by_hand)
    curve = best_of_curve(scores.tolist())
    assert [point.n for point in curve] == [1, 2, 4, 6]
    assert curve[0].score == pytest.approx(scores.mean()) and curve[-1].score == pytest.approx(scores.max(1).mean())
    assert all(point.low <= point.score <= point.high for point in curve)
    assert [point.kl for point in curve[:2]] == pytest.approx([0.0, 0.693147 - 0.5], abs=1e-6)
    with pytest.raises(ValueError, match="from 1 to the 6 answers"):
        expected_best(scores, 7)


def test_best_of_keeps_the_best_answers_prints_the_curve_and_writes_demonstrations(runs, tmp_path):
    words = ["-p", "One?", "-p", "Two?", "--reward", runs["reward"], "--max-new-tokens", 8]
    everything = lines(runs["sft"], "-p", "One?", "-p", "Two?", "--n", 4, "--reward", runs["reward"])
    out, kept = tmp_path / "best.jsonl", tmp_path / "kept"
    said, _ = finished.invoke(
        command, runs["sft"], *words, "--best-of", 4, "--out", out, "--demonstrations", kept
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [row["answer"] for row in everything if row["best"]]
    assert "Score of the best of n answers" in said and "KL to the policy" in said and "8 answers" in said
    found = list(open_dataset(kept).records())
    assert [(record.answer, record.author) for record in found] == [
        (row["answer"].strip(), f"model:{runs['sft']}") for row in rows if row["answer"].strip()
    ]


def test_the_curve_is_written_as_numbers_for_the_report(runs, tmp_path):
    file = tmp_path / "curve.json"
    words = ["-p", "One?", "--reward", runs["reward"], "--max-new-tokens", 8, "--best-of", 4, "--curve", file]
    finished.invoke(command, runs["sft"], *words)
    found = json.loads(file.read_text())
    assert [point["n"] for point in found["best_of"]] == [1, 2, 4]
    assert (found["policy"], found["reward"], found["prompts"]) == (runs["sft"], runs["reward"], 1)
    with pytest.raises(UserError, match="--with: needs a plot"):
        finished.invoke(command, runs["sft"], *words, "--with", tmp_path)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_curve_is_drawn_with_the_evaluations_of_ppo_runs(suffix, runs, tmp_path):
    ppo = Path(finished.ppo(tmp_path / "ppo", runs["sft"], runs["reward"]))
    words = ["-p", "One?", "--reward", runs["reward"], "--max-new-tokens", 8, "--best-of", 4, "--with", ppo]
    with pytest.raises(UserError, match="has no evaluations"):
        finished.invoke(command, runs["sft"], *words, "--curve", tmp_path / "none.svg")
    rows = [{"step": 0, "eval/kl": -0.001, "eval/scores": 0.1}, {"step": 1, "objective/kl": 1.0}]
    rows.append({"step": 1, "eval/kl": 0.25, "eval/scores": 0.3})
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluations_of(str(ppo)) == [(0.0, 0.1), (0.25, 0.3)]
    file = tmp_path / f"curve.{suffix}"
    finished.invoke(command, runs["sft"], *words, "--curve", file)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in content
    assert suffix == "png" or content.count(b"<use") > 0


def test_the_best_answers_are_trained_on_in_another_round_of_sft(runs, tmp_path):
    words = ["-p", "One?", "-p", "Two?", "--reward", runs["reward"], "--max-new-tokens", 8, "--best-of", 8]
    finished.invoke(command, runs["sft"], *words, "--demonstrations", tmp_path / "best")
    batch = {"batch_size": 2, "micro_batch_size": 2, "max_steps": 1}
    values = {"run": str(tmp_path / "again"), "model": {"path": runs["sft"]}, "data": {"train": str(tmp_path / "best")}}
    train(check_config(SFTConfig, values | {"batch": batch}, "test"))
    before, after = (
        finished.policy_logits(run, torch.tensor([[1, 5, 9]])) for run in (runs["sft"], str(tmp_path / "again"))
    )
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--best-of", 4], "--best-of: needs a reward"),
        (["--best-of", 4, "--n", 2], "cannot be combined"),
        (["--demonstrations", "new"], "--demonstrations: needs the best"),
        (["--curve", "curve.svg"], "--curve: needs the scores"),
        (["--with", "runs/ppo"], "--with: needs a plot"),
        (["--best-of", 4, "--reward", "x:y", "--curve", "curve.gif"], "neither an .svg nor a .png"),
        (["--limit", 3], "--limit: is for --dataset"),
    ],
)
def test_best_of_with_unfit_options_is_refused(words, fault, runs):
    with pytest.raises(UserError, match=fault):
        finished.invoke(command, runs["sft"], "-p", "One?", *words)
