"""`rlhf evaluate` of policies: loss, rewards, comparisons, KL, the page; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import tiny
import torch
from chat_servers import Response, chat_server, completion
from evaluated import letters, metrics_of
from scipy import stats

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.intervals import Z_95
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.encode_records import EncodingCounts, best_response, encode_demonstration
from rlhf.data.store import open_dataset
from rlhf.judging.win_rate import win_rates
from rlhf.runs.parents import resolve_model_path
from stages.evaluate import command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    sft = finished.sft(folder / "sft")
    return {
        "sft": sft,
        "other": finished.sft(folder / "other", seed=9),
        "chatml": finished.sft(folder / "chatml", model=finished.chatml()),
        "prompt-tuning": finished.sft(folder / "prompt-tuning", "prompt-tuning"),
        "reward": finished.reward(folder / "reward", sft),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{tiny.question(i)}"}}\n' for i in range(10)))
    return {
        "demonstration": tiny.write_demonstrations(folder / "demos", 2, held_out=10),
        "ranking": tiny.write_rankings(folder / "rankings", 2, held_out=10),
        "prompt": str(folder / "prompts.jsonl"),
    }


# ---- policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["demonstration", "ranking"])
@pytest.mark.parametrize("name", ["sft", "prompt-tuning"])
def test_loss_is_the_mean_over_answer_tokens(kind: str, name: str, runs: dict[str, str], data: dict[str, str]) -> None:
    found = metrics_of(runs[name], "--dataset", data[kind])["policy"]
    losses = token_losses(runs[name], list(open_dataset(data[kind]).records("eval")))
    assert (found["records"], found["tokens"], found["skipped"]) == (10, len(losses), 0)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def token_losses(run: str, records: list[Any]) -> list[float]:
    """-log p of every token of the answers, one record at a time, from plain full logits."""
    from rlhf.inference.policy import open_policy

    policy, losses = open_policy(run), []
    for record in records:
        chat = policy.chat
        prompt, answer = chat.prompt(record.messages), chat.response(best_response(record))
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        for i, token in enumerate(answer):
            losses.append(-float(logits[-len(answer) - 1 + i].log_softmax(-1)[token]))
    return losses


def test_answers_that_do_not_fit_are_counted(runs: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "One?", "answer": answer} for answer in ("Yes.", "word " * 300)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = metrics_of(runs["sft"], "--dataset", tmp_path / "data.jsonl")["policy"]
    assert (found["records"], found["skipped"]) == (1, 1)
    (tmp_path / "data.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="no answer fits in the 128 tokens"):
        metrics_of(runs["sft"], "--dataset", tmp_path / "data.jsonl")


def test_a_reward_gives_mean_score_length_and_eos_rate(runs: dict[str, str], data: dict[str, str]) -> None:
    from stages.sample import command as sample

    words = ("--dataset", data["prompt"], "--reward", runs["reward"], "--n", 2)
    said, _ = finished.invoke(sample, runs["sft"], *words, "--max-new-tokens", 8, "--json")
    rows = [json.loads(line) for line in said.splitlines()]
    found = metrics_of(runs["sft"], *words)["policy"]
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64).view(10, 2).mean(1)
    half = stats.t.ppf(0.975, 9) * float(scores.std()) / math.sqrt(10)
    assert (found["prompts"], found["answers"]) == (10, 20)
    assert found["score"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert found["score_high"] - found["score_low"] == pytest.approx(2 * half, abs=1e-5)
    assert found["answer_tokens"] == sum(row["tokens"] for row in rows) / 20
    assert found["eos_rate"] == sum(row["ended"] for row in rows) / 20
    assert "loss" not in found


def test_a_policy_against_another_gives_wins_and_both_perplexities(runs: dict[str, str], data: dict[str, str]) -> None:
    words = ("--dataset", data["demonstration"], "--reward", "evaluated:letters")
    there = metrics_of(runs["sft"], *words, "--against", runs["other"])
    back = metrics_of(runs["other"], *words, "--against", runs["sft"])
    assert there["against"]["perplexity"] == back["policy"]["perplexity"] != there["policy"]["perplexity"]
    one, two = there["comparison"], back["comparison"]
    assert one["wins"] + one["ties"] + one["losses"] == 10
    assert (one["wins"], one["losses"]) == (two["losses"], two["wins"])
    assert one["win_rate"] == pytest.approx((one["wins"] + one["ties"] / 2) / 10) == pytest.approx(1 - two["win_rate"])
    assert one["interval"][0] < one["win_rate"] < one["interval"][1]
    assert one["mean_difference"] == pytest.approx(there["policy"]["score"] - there["against"]["score"])


def test_a_policy_against_itself_ties_every_time(runs: dict[str, str], data: dict[str, str]) -> None:
    words = ("--dataset", data["prompt"], "--reward", runs["reward"], "--against", runs["sft"])
    found = metrics_of(runs["sft"], *words)["comparison"]
    assert (found["ties"], found["win_rate"], found["mean_difference"]) == (10, 0.5, 0.0)


def test_without_a_reward_two_policies_are_compared_by_perplexity(runs: dict[str, str], data: dict[str, str]) -> None:
    found = metrics_of(runs["sft"], "--dataset", data["demonstration"], "--against", runs["other"])
    assert found["against"]["perplexity"] > 0 and "comparison" not in found


def test_policies_with_different_tokenizers_are_said_not_to_compare(runs: dict[str, str], data: dict[str, str]) -> None:
    words = (runs["sft"], "--dataset", data["demonstration"], "--against", runs["chatml"])
    _, said = finished.invoke(command, *words)
    assert "not comparable" in said


@pytest.mark.parametrize("kind", ["demonstration", "ranking"])
def test_a_policy_is_compared_with_the_datasets_own_answers(
    kind: str, runs: dict[str, str], data: dict[str, str]
) -> None:
    words = ("--dataset", data[kind], "--reward", "evaluated:letters", "--against", "references")
    found = metrics_of(runs["sft"], *words)
    references = [best_response(record) for record in open_dataset(data[kind]).records("eval")]
    mean = sum(letters([], text) for text in references) / len(references)
    assert found["comparison"]["mean_difference"] == pytest.approx(found["policy"]["score"] - mean)
    assert found["comparison"]["mean_lengths"][1] == pytest.approx(sum(map(len, references)) / len(references))
    assert 0 < found["comparison"]["length_controlled"] < 1
    assert {"distinct_1", "distinct_2", "self_bleu", "repetition", "refusals"} <= set(found["policy"])


def test_a_judge_on_a_server_compares_two_policies(runs: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Response:  # the longer answer wins; of equal ones nothing is said
        a, b = (body["messages"][0]["content"].split(f"[answer {x}]")[1].split("[end")[0] for x in "AB")
        return completion("[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "no verdict")

    with chat_server(answer) as server:
        spec = json.dumps({"url": server.url, "cache": str(tmp_path / "replies")})
        words = ("--dataset", data["prompt"], "--judge", spec, "--n", 2)
        found = metrics_of(runs["sft"], *words, "--against", runs["other"])["comparison"]
    assert found["wins"] + found["ties"] + found["losses"] + found["unreadable"] == 20
    assert found["judge"]["model"] == "m" and "mean_difference" not in found
    assert found["ties"] == 0 and found["wins"] > 0 and found["losses"] > 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("demonstration", "--judge", "http://127.0.0.1:9/v1"), "needs answers to compare with"),
        (("demonstration", "--against", "references"), "needs something that compares"),
        (("prompt", "--against", "references", "--reward", "evaluated:letters"), "no answers to compare with"),
    ],
)
def test_a_comparison_without_its_other_half_is_refused(
    words: tuple[str, ...], fault: str, runs: dict[str, str], data: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=fault):
        metrics_of(runs["sft"], "--dataset", data[words[0]], *words[1:])


def test_the_interval_is_wilsons() -> None:
    found = win_rates([1.0] * 7 + [0.0] * 3, [(1, 1)] * 10, range(10))
    p, n = 0.7, 9.0  # one answer a prompt: the effective size is R - 1
    centre, half = p + Z_95**2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    expected = [(centre - half) / (1 + Z_95**2 / n), (centre + half) / (1 + Z_95**2 / n)]
    assert found["interval"] == pytest.approx(expected)
    assert (found["wins"], found["ties"], found["losses"]) == (7, 0, 3)


def test_the_table_shows_what_the_json_holds(runs: dict[str, str], data: dict[str, str], tmp_path: Path) -> None:
    words = ("--dataset", data["demonstration"], "--reward", "evaluated:constant", "--against", runs["other"])
    said, _ = finished.invoke(command, runs["sft"], *words, "--max-new-tokens", 8, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert "perplexity" in said and "answers that ended" in said
    assert "50.0% (95% Wilson interval" in said and "0 wins, 10 ties, 0 losses; a tie counts half" in said
    assert found["policy"]["score"] == 1.0 and found["sampling"]["max_new_tokens"] == 8
    assert found["fingerprint"] == open_dataset(data["demonstration"]).fingerprint


def test_the_kl_to_a_reference_is_the_sum_over_tokens(runs: dict[str, str], data: dict[str, str]) -> None:
    words = ("--dataset", data["prompt"], "--n", 2, "--seed", 4, "--temperature", 0.7)
    found = metrics_of(runs["sft"], *words, "--reference", runs["other"], "--against", runs["other"])
    k1, k3 = kls_by_hand(runs["sft"], runs["other"], data["prompt"], 0.7)
    assert found["policy"]["kl"] == pytest.approx(k1.mean(), abs=1e-4)
    assert found["policy"]["kl_k3"] == pytest.approx(k3.mean(), abs=1e-4)
    half = stats.t.ppf(0.975, 9) * k1.reshape(10, 2).mean(1).std(ddof=1) / math.sqrt(10)
    assert found["policy"]["kl_high"] - found["policy"]["kl"] == pytest.approx(half, abs=1e-4)
    assert found["policy"]["kl"] > 0 and found["reference"] == runs["other"]
    assert found["against"]["kl"] == found["against"]["kl_k3"] == 0, "the reference is no distance from itself"
    assert "comparison" not in found, "nothing says whose answers are better"


def kls_by_hand(run: str, reference: str, prompts: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """k1 and k3 of each answer from plain full logits, one answer at a time."""
    from rlhf.inference.policy import open_policy
    from rlhf.inference.sampling import sample
    from rlhf.rollout.types import SamplingParams

    models, params = [open_policy(one) for one in (run, reference)], SamplingParams(8, temperature=temperature)
    rows = []
    for samples in sample(models[0], list(open_dataset(prompts).records()), params, 4, 2):
        for one in samples:
            ids, size = torch.tensor([one.prompt_ids + one.completion.ids]), len(one.completion.ids)
            with torch.no_grad():
                logits = [model.model(input_ids=ids).logits[0, -size - 1 : -1].double() for model in models]
            mine, theirs = ((found / temperature).log_softmax(-1)[range(size), ids[0, -size:]] for found in logits)
            log_ratio = theirs - mine
            rows.append((float(-log_ratio.sum()), float((log_ratio.exp() - 1 - log_ratio).sum())))
    first, third = np.array(rows).T
    return first, third


def test_the_alignment_tax_is_the_paired_difference_of_losses(runs: dict[str, str], data: dict[str, str]) -> None:
    found = metrics_of(runs["sft"], "--dataset", data["demonstration"], "--against", runs["other"])
    records = list(open_dataset(data["demonstration"]).records("eval"))
    each = [[token_losses(run, [record]) for record in records] for run in (runs["sft"], runs["other"])]
    gaps = [np.subtract(*pair) for pair in zip(*each)]
    tax = found["loss_difference"]
    assert tax["value"] == pytest.approx(np.concatenate(gaps).mean(), abs=1e-5)
    assert tax["value"] == pytest.approx(found["policy"]["loss"] - found["against"]["loss"], abs=1e-9)
    total = sum(map(len, gaps))
    error = math.sqrt(sum(((gap - tax["value"]).sum()) ** 2 for gap in gaps) * 10 / 9) / total
    assert tax["high"] - tax["value"] == pytest.approx(stats.t.ppf(0.975, 9) * error, rel=1e-3)
    assert found["policy"]["loss_low"] < found["policy"]["loss"] < found["policy"]["loss_high"]


def test_policies_have_a_page_with_their_answers_side_by_side(
    runs: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = ("--dataset", data["demonstration"], "--reward", "evaluated:letters", "--reference", runs["other"])
    finished.invoke(
        command, runs["sft"], *words, "--against", runs["other"], "--max-new-tokens", 8, "--html", page
    )  # fmt: skip
    text = page.read_text()
    for word in ("Win rate", "Length-controlled", "KL to the reference", "self-BLEU", "answers that refuse",
                 "Loss on the data", "largest gains", "score 0.00", "Distributions over answers"):  # fmt: skip
        assert word in text, word
    assert text.count("<svg ") == 8 and not [word for word in ("<script", "https:", "src=") if word in text]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind", "words", "message"),
    [
        ("sft", "prompt", [], "prompts without answers cannot measure"),
        ("sft", "prompt", ["--against", "sft"], "prompts without answers cannot measure"),
        ("sft", "demonstration", ["--against", "reward"], "gives no answers"),
        ("sft", "demonstration", ["--reward", "sft"], "not a reward model"),
        ("sft", "demonstration", ["--split", "test"], "no records in the split 'test'"),
        ("reward", "demonstration", [], "measured on rankings"),
        ("reward", "ranking", ["--against", "sft"], "--against: is for policies"),
        ("reward", "ranking", ["--reward", "reward"], "--reward: is for policies"),
        ("reward", "ranking", ["--benchmark", "rewardbench"], "unknown benchmark 'rewardbench'"),
        ("sft", "demonstration", ["--perturb"], "is a policy"),
        ("sft", "prompt", ["--reference", "reward"], "gives no answers"),
        ("sft", "prompt", ["--reference", "chatml"], "tokenizer is not that of"),
        ("sft", "prompt", ["--reference", "other", "--temperature", "0"], "greedy answers"),
        ("reward", "ranking", ["--reference", "sft"], "--reference: is for policies"),
        ("sft", "ranking", ["--judge", "rankings"], "wrote none of the"),
        ("sft", "demonstration", ["--judge", "rankings"], "needs human rankings"),
        ("sft", "ranking", ["--judge", "rankings", "--reward", "reward"], "loads no model"),
        (
            "sft",
            "ranking",
            ["--judge", "rankings", "--n", "2"],
            "--n: is not for --judge rankings, which",
        ),
        ("sft", "ranking", ["--temperature", "0.5"], "--temperature: is for sampled answers, which need"),
        ("sft", "ranking", ["--perturb-rankings", "9"], "--perturb-rankings: is for reward models"),
        ("reward", "ranking", ["--perturb-rankings", "9"], "--perturb-rankings: is for --perturb"),
        ("reward", "ranking", ["--system", "Hi"], "--system: is for policies"),
        ("reward", "ranking", ["--benchmark", "rm-bench"], "no ranking has the form of rm-bench"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: str, kind: str, words: list[str], message: str, runs: dict[str, str], data: dict[str, str]
) -> None:
    given = [runs.get(word, word) for word in words]
    with pytest.raises(UserError, match=message):
        metrics_of(runs[model], "--dataset", data[kind], *given)


def test_the_loss_counts_every_assistant_turn(runs: dict[str, str], tmp_path: Path) -> None:
    chat = load_tokenizer(ModelConfig(path=runs["sft"]), resolve_model_path(runs["sft"]))
    messages = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    row = {"messages": [{"role": role, "content": text} for role, text in messages], "answer": "No."}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    (record,) = open_dataset(tmp_path / "data.jsonl").records()
    encoded = encode_demonstration(record, chat, 128, EncodingCounts())
    assert encoded is not None
    found = metrics_of(runs["sft"], "--dataset", tmp_path / "data.jsonl")["policy"]
    assert found["tokens"] == sum(label != -100 for label in encoded["labels"]) > len(chat.response("No."))
