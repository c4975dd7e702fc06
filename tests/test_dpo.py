"""The DPO stage: log-probs of answers, the loss against TRL and the naive formula, the reference, what a run leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from dpo_runs import config
from families import FAMILIES, RECURRENT
from logged import lines as metrics_of
from reward_runs import encoded
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.writer import DatasetWriter
from rlhf.dpo.batches import PreferenceBatch, preference_batch
from rlhf.dpo.losses import METRICS, implicit_rewards, pair_metrics, sft_loss
from rlhf.dpo.policy import PreferencePolicy, sharing_of
from rlhf.inference.policy import open_policy
from rlhf.models.load import load_policy
from rlhf.models.shared_prompt import SharedPrompts
from rlhf.reward.collator import RankingCollator
from rlhf.reward.losses import RANKING_LOSSES, RankingBatch
from rlhf.runs.run import read_run
from rlhf.training.loop import supervised_engine
from rlhf.tuning.methods import TUNING
from stages import dpo

EVERYTHING = SharedPrompts(max_length=10**6, linear_cost=10**6)


def ranked(*ranks: list[int], weights: list[float] | None = None) -> RankingBatch:
    """Rankings with these ranks."""
    flat = torch.tensor([rank for row in ranks for rank in row])
    index = torch.tensor([number for number, row in enumerate(ranks) for _ in row])
    return RankingBatch(flat, index, weights=torch.tensor(weights or [1.0] * len(ranks)))


def rows_of(chat: ChatTokenizer, data: str, count: int = 5) -> list[dict[str, Any]]:
    """Training rows, each with log-probs by a made-up reference."""
    draw = torch.Generator().manual_seed(1)
    rows = encoded(data, chat, "train")[:count]
    return [row | {"reference": (-100 - torch.rand(len(row["ranks"]), generator=draw)).tolist()} for row in rows]


def naive_logprob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Summed log-prob of an answer by plain transformers, one text at a time."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(answer)[:, None]).sum()


# ---- log-probs of answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_answers_have_the_log_probs_of_plain_transformers_on_shared_prompts_too(
    family: str, chat: ChatTokenizer
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((FAMILIES | RECURRENT)[family]).eval()
    draw = torch.Generator().manual_seed(2)
    tokens = lambda count: torch.randint(3, 64, (count,), generator=draw).tolist()  # noqa: E731
    rows = [
        {"prompt": tokens(5), "candidates": [tokens(3), tokens(1), tokens(4)], "ranks": [1, 2, 3]},
        {"prompt": tokens(2), "candidates": [tokens(6), tokens(2)], "ranks": [2, 1]},
    ]
    rows = [row | {"ratings": [None] * len(row["ranks"]), "weight": 1.0} for row in rows]
    expected = torch.stack([naive_logprob(model, row["prompt"], a) for row in rows for a in row["candidates"]])
    sharing = sharing_of(model)
    assert (sharing.max_length > 0) == (family not in RECURRENT)
    for collator in (RankingCollator(chat), RankingCollator(chat, sharing=sharing)):
        batch = preference_batch(rows, collator)
        torch.testing.assert_close(PreferencePolicy(model)(batch, chunks=2), expected, rtol=1e-5, atol=1e-4)
        assert batch.tokens == [3, 1, 4, 6, 2]


def test_shared_prompts_give_the_gradients_of_separate_texts(chat: ChatTokenizer, rankings: str) -> None:
    model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama())
    rows, gradients = rows_of(chat, rankings), []
    for sharing in (EVERYTHING, SharedPrompts(0)):
        batch = preference_batch(rows, RankingCollator(chat, sharing=sharing))
        assert (batch.branches is not None) == (sharing is EVERYTHING)
        model.zero_grad()
        logprobs = PreferencePolicy(model)(batch, chunks=1)
        losses, _ = RANKING_LOSSES.pick("plackett-luce")(logprobs - batch.reference, batch.rankings)
        losses.sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_first_token_behind_an_empty_prompt_is_not_counted(chat: ChatTokenizer) -> None:
    model = load_policy(ModelConfig(path=tiny.llama()), tiny.llama())
    row = {"prompt": [], "candidates": [[1, 5, 6], [1, 7]], "ranks": [1, 2], "ratings": [None] * 2, "weight": 1.0}
    batch = preference_batch([row], RankingCollator(chat))
    expected = [naive_logprob(model, [1], answer[1:]) for answer in row["candidates"]]
    torch.testing.assert_close(PreferencePolicy(model)(batch, chunks=1), torch.stack(expected))
    assert batch.tokens == [2, 1]


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_plackett_luce_of_implicit_rewards_worked_by_hand() -> None:
    rewards = implicit_rewards(torch.tensor([-10.0, -12.0, -11.0]), torch.tensor([-11.0, -11.0, -11.0]), beta=0.5)
    assert rewards.tolist() == [0.5, -0.5, 0.0]
    # best of three: log(e^0.5 + e^0 + e^-0.5) - 0.5 = 0.680270; second of two: log(e^-0.5 + e^0) - 0 = 0.474077
    loss, _ = RANKING_LOSSES.pick("plackett-luce")(rewards, ranked([1, 3, 2]))
    assert float(loss) == pytest.approx((0.680270 + 0.474077) / 2, abs=1e-6)


def test_plackett_luce_of_two_is_the_pair_loss() -> None:
    rewards = torch.tensor([0.3, -0.2, 1.5, 2.0])
    pairs = ranked([1, 2], [2, 1])
    one, other = (RANKING_LOSSES.pick(name)(rewards, pairs).loss for name in ("plackett-luce", "bradley-terry"))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, -F.logsigmoid(torch.tensor([0.5, 0.5])))


@pytest.mark.parametrize("loss", ["bradley-terry", "plackett-luce"])
def test_the_gradient_is_that_of_the_naive_formula(
    loss: str, chat: ChatTokenizer, rankings: str, tmp_path: Path
) -> None:
    """Every answer by itself through plain transformers, and the formula of the paper in loops."""
    beta, coef = 0.3, 0.2
    made = config(tmp_path, rankings, loss=loss, beta=beta, sft_coef=coef)
    model = load_policy(made.model, tiny.llama())
    rows = [row for row in rows_of(chat, rankings, 8) if len(set(row["ranks"])) == 4][:3]
    collator = RankingCollator(chat, sharing=EVERYTHING)
    engine = supervised_engine(made, PreferencePolicy(model))
    objective = dpo.DPOObjective(made, model, collator)
    total, _ = objective.loss(engine, objective.batch(rows))
    total.backward()
    found = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    expected = torch.zeros(())
    for row in rows:
        logprobs = [naive_logprob(model, row["prompt"], answer) for answer in row["candidates"]]
        rewards = [beta * (mine - base) for mine, base in zip(logprobs, row["reference"])]
        order = sorted(range(4), key=row["ranks"].__getitem__)
        if loss == "bradley-terry":
            pairs = [(order[i], order[j]) for i in range(4) for j in range(i + 1, 4)]
            terms = [-F.logsigmoid(rewards[i] - rewards[j]) for i, j in pairs]
        else:
            terms = [
                torch.stack([rewards[j] for j in order[place:]]).logsumexp(0) - rewards[order[place]]
                for place in range(3)
            ]
        best = order[0]
        expected = expected + sum(terms) / len(terms) - coef * logprobs[best] / len(row["candidates"][best])
    expected.backward()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    for mine, weight in zip(found, model.parameters()):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss", "theirs"), [("bradley-terry", "sigmoid"), ("hinge", "hinge")])
def test_pairs_have_the_loss_gradient_and_metrics_of_trl(
    loss: str, theirs: str, chat: ChatTokenizer, rankings: str, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [row for row in rows_of(chat, rankings, 12) if 1 in row["ranks"] and 2 in row["ranks"]]
    for row in rows:  # the best and the worst answer
        places = [row["ranks"].index(1), row["ranks"].index(max(row["ranks"]))]
        row |= {"candidates": [row["candidates"][i] for i in places], "ranks": [1, 2], "ratings": [None, None]}
        row["reference"] = [row["reference"][i] for i in places]
    made = config(tmp_path, rankings, loss=loss, beta=0.1)
    model = load_policy(made.model, tiny.llama())
    engine = supervised_engine(made, PreferencePolicy(model))
    objective = dpo.DPOObjective(made, model, RankingCollator(chat, sharing=EVERYTHING))
    total, sums = objective.loss(engine, objective.batch(rows))
    (total / len(rows)).backward()
    gradients = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()

    args = DPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type=theirs, beta=0.1, precompute_ref_log_probs=True, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=args, processing_class=chat.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
    )  # fmt: skip
    examples = [
        {"prompt_ids": row["prompt"], "chosen_ids": row["candidates"][0], "rejected_ids": row["candidates"][1]}
        | {"ref_chosen_logps": row["reference"][0], "ref_rejected_logps": row["reference"][1]}
        for row in rows
    ]
    expected = trainer.compute_loss(model, DataCollatorForPreference(pad_token_id=0)(examples))
    expected.backward()
    assert float(total) / len(rows) == pytest.approx(float(expected), rel=1e-5)
    for mine, weight in zip(gradients, model.parameters()):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-6)
    for name, found in zip(METRICS, sums):
        assert float(found) / len(rows) == pytest.approx(trainer._metrics["eval"][name][-1], rel=1e-4), name


def test_the_sft_term_is_the_mean_over_the_tokens_of_the_best_answers() -> None:
    logprobs, tokens = torch.tensor([-4.0, -6.0, -1.0, -9.0, -2.0]), torch.tensor([2, 3, 1, 3, 1])
    found = sft_loss(logprobs, tokens, ranked([1, 1, 2], [2, 1]))
    assert found.tolist() == [2.0, 2.0]  # (4 / 2 + 6 / 3) / 2, and 2 / 1


def test_metrics_are_means_over_the_pairs_of_a_ranking() -> None:
    rewards, logprobs = torch.tensor([1.0, 0.0, 2.0, 3.0, 3.0]), torch.tensor([-1.0, -2.0, -3.0, -4.0, -6.0])
    found = dict(zip(METRICS, pair_metrics(rewards, logprobs, ranked([1, 2, 2], [1, 1]))))
    # first ranking: pairs (1, 0) and (1, 2); second: all tied, so every answer is on both sides
    assert found["rewards/chosen"].tolist() == [1.0, 3.0]
    assert found["rewards/rejected"].tolist() == [1.0, 3.0]
    assert found["rewards/accuracies"].tolist() == [0.5, 0.5]
    assert found["rewards/margins"].tolist() == [0.0, 0.0]
    assert found["logps/chosen"].tolist() == [-1.0, -5.0]
    assert found["logps/rejected"].tolist() == [-2.5, -5.0]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, rankings: str) -> Path:
    """The folder of a finished run of 10 steps."""
    batch = {"batch_size": 18, "micro_batch_size": 18, "max_steps": 10}
    made = config(tmp_path_factory.mktemp("done"), rankings, batch=batch, beta=0.5)
    dpo.run(made)
    return Path(made.run)


def test_held_out_accuracy_rises_above_that_of_the_untrained_policy(done: Path) -> None:
    first = metrics_of(done)[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/accuracies"] == pytest.approx(0.5, abs=0.2) and abs(first["rewards/margins"]) < 1e-4
    evaluations = [row for row in metrics_of(done) if "eval/accuracy" in row]
    assert evaluations[-1]["eval/accuracy"] > 0.9
    assert evaluations[-1]["eval/kendall_tau_b"] > 0.8
    assert evaluations[-1]["eval/rewards/margins"] > 1
    assert read_run(done)["metrics"]["accuracy"] > 0.9
    assert read_run(done)["stage"] == "dpo" and (done / "reward_metrics.json").is_file()


def test_the_result_is_a_policy_that_plain_transformers_loads_and_whose_log_probs_are_the_metrics(
    done: Path, chat: ChatTokenizer, rankings: str
) -> None:
    model, base = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (done / "model", tiny.llama()))
    right = total = 0
    with torch.no_grad():
        for row in encoded(rankings, chat):
            rewards = [
                float(naive_logprob(model, row["prompt"], answer) - naive_logprob(base, row["prompt"], answer))
                for answer in row["candidates"]
            ]
            pairs = [(i, j) for i, a in enumerate(row["ranks"]) for j, b in enumerate(row["ranks"]) if a < b]
            right, total = right + sum(rewards[i] > rewards[j] for i, j in pairs), total + len(pairs)
    assert right / total == pytest.approx(read_run(done)["metrics"]["accuracy"])
    assert total == read_run(done)["metrics"]["pairs"]


def test_the_reference_is_computed_once_and_read_when_the_run_is_made_longer(
    rankings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = {"batch_size": 8, "micro_batch_size": 8}
    dpo.run(config(tmp_path, rankings, batch=batch | {"max_steps": 2}))
    file = tmp_path / "run" / "cache" / "reference-train.arrow"
    before = file.stat().st_mtime_ns
    assert "read from" not in capsys.readouterr().out
    dpo.run(config(tmp_path, rankings, batch=batch | {"max_steps": 4}), resume=True)
    assert file.stat().st_mtime_ns == before
    assert "Reference: log-probs of 36 rankings read from" in capsys.readouterr().out


def test_a_damaged_reference_is_computed_again(done: Path, rankings: str, tmp_path: Path) -> None:
    batch = {"batch_size": 8, "micro_batch_size": 8}
    dpo.run(config(tmp_path, rankings, batch=batch | {"max_steps": 2}))
    file = tmp_path / "run" / "cache" / "reference-train.arrow"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3])
    dpo.run(config(tmp_path, rankings, batch=batch | {"max_steps": 4}), resume=True)
    assert file.read_bytes() == content


METHODS = [
    row.name if row.name != "modules" else {"name": "modules", "names": ["mlp"]}
    for row in TUNING if not row.traits["quantized"]
]  # fmt: skip


FAST = ("full", "lora", "prompt-tuning")


@pytest.mark.parametrize(
    "tuning",
    [pytest.param(method, marks=[pytest.mark.slow] * (method not in FAST)) for method in METHODS],
    ids=lambda spec: spec if isinstance(spec, str) else spec["name"],
)
def test_every_tuning_method_trains_against_the_untouched_model(
    tuning: Any, chat: ChatTokenizer, rankings: str, tmp_path: Path
) -> None:
    tuning = {"name": tuning, "layers": 1} if tuning == "last-layers" else tuning
    values = {"batch": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 2}, "optimizer": {"lr": 0.01}}
    made = config(tmp_path, rankings, tuning=tuning, **values)
    dpo.run(made)
    base = AutoModelForCausalLM.from_pretrained(tiny.llama()).eval()
    kept = Dataset.from_file(str(tmp_path / "run" / "cache" / "reference-eval.arrow"))
    rows = encoded(rankings, chat)
    with torch.no_grad():
        expected = [float(naive_logprob(base, rows[0]["prompt"], answer)) for answer in rows[0]["candidates"]]
    assert kept[0]["reference"] == pytest.approx(expected, rel=1e-5)
    if made.tuning.row.traits["merges"]:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    else:
        assert open_policy(tmp_path / "run").model.peft_config


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name not in ("bradley-terry", "davidson")))
        for row in RANKING_LOSSES
    ],
)
def test_every_ranking_loss_trains(row: Any, tmp_path: Path, few_rankings: str) -> None:
    batch = {"batch_size": 12, "micro_batch_size": 12, "max_steps": 4}
    made = config(tmp_path, few_rankings, loss=row.name, sft_coef=0.1, beta=0.5, batch=batch)
    dpo.run(made)
    losses = [line["train/loss"] for line in metrics_of(made.run) if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_the_weights_of_rankings_multiply_their_losses(tmp_path: Path, chat: ChatTokenizer) -> None:
    found = []
    for weights in ([3.0, 1.0], [1.0, 1.0]):
        with DatasetWriter(tmp_path / str(weights), "ranking") as writer:
            for number, weight in enumerate(weights):
                candidates = tuple(Candidate(tiny.answer(number, length)) for length in (0, 2))
                messages = (Message("user", tiny.question(number)),)
                writer.write(Ranking(messages, split="train", candidates=candidates, ranks=(1, 2), weight=weight))
        batch = {"batch_size": 2, "micro_batch_size": 2, "max_steps": 2}
        made = config(tmp_path / f"run-{weights}", str(tmp_path / str(weights)), batch=batch, optimizer={"lr": 1e-2})
        dpo.run(made)
        found.append(metrics_of(made.run)[0]["logps/chosen"])
    first, second = (naive_best(chat, number) for number in range(2))
    assert found == pytest.approx([(3 * first + second) / 4, (first + second) / 2], rel=1e-5)


def naive_best(chat: ChatTokenizer, number: int) -> float:
    """The untrained policy's log-prob of the short answer to a question."""
    model = AutoModelForCausalLM.from_pretrained(tiny.llama()).eval()
    prompt, answer = chat.prompt([Message("user", tiny.question(number))]), chat.response(tiny.answer(number, 0))
    with torch.no_grad():
        return float(naive_logprob(model, prompt, answer))


def test_models_that_cannot_share_a_prompt_train_too(
    few_rankings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.of_family("mamba", {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8})
    batch = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 1}
    made = config(tmp_path, few_rankings, model={"path": path, "max_length": 128}, batch=batch)
    dpo.run(made)
    assert "Prompts: encoded once for each answer, since MambaForCausalLM" in capsys.readouterr().out
    assert metrics_of(made.run)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_batch_says_how_many_tokens_the_head_sees(chat: ChatTokenizer, rankings: str) -> None:
    rows = rows_of(chat, rankings, 3)
    batch: PreferenceBatch = preference_batch(rows, RankingCollator(chat))
    assert sum(batch.tokens) == sum(len(answer) for row in rows for answer in row["candidates"])


@pytest.mark.parametrize(
    ("family", "tuning"), [("t5", "full"), pytest.param("bart", "prompt-tuning", marks=pytest.mark.slow)]
)
def test_encoder_decoders_train_on_the_log_probs_of_plain_transformers(
    family: str, tuning: str, few_rankings: str, tmp_path: Path
) -> None:
    path = tiny.encoder_decoder(family)
    batch = {"batch_size": 12, "micro_batch_size": 12, "max_steps": 4}
    made = config(tmp_path, few_rankings, model={"path": path}, tuning=tuning, batch=batch, optimizer={"lr": 0.01})
    dpo.run(made)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    chat = load_tokenizer(made.model, path)
    row = encoded(few_rankings, chat)[0]
    kept = Dataset.from_file(str(tmp_path / "run" / "cache" / "reference-eval.arrow"))[0]["reference"]
    for answer, found in zip(row["candidates"], kept):
        with torch.no_grad():
            output = base(input_ids=torch.tensor([row["prompt"]]), labels=torch.tensor([answer]))
        assert found == pytest.approx(-float(output.loss) * len(answer), rel=1e-4)
    losses = [line["train/loss"] for line in metrics_of(made.run) if "train/loss" in line]
    assert losses[-1] < losses[0]
