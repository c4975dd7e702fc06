"""The reward stage: what a batch and its loss are, what is held out and measured, and what the result is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from logged import lines as metrics_of
from reward_runs import config, encoded, steps
from stopped import stopped_after
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.reward.collator import RankingCollator
from rlhf.reward.losses import RANKING_LOSSES
from rlhf.reward.metrics import reward_metrics
from rlhf.reward.scoring import score_rankings
from rlhf.runs.run import read_run
from stages import reward


def write(path: Path, rankings: list[Ranking]) -> str:
    with DatasetWriter(path, "ranking", overwrite=True) as writer:
        for ranking in rankings:
            writer.write(ranking)
    return str(path)


def ranking(number: int, ranks: tuple[int, ...], split: str = "train", **more: Any) -> Ranking:
    """Answers of falling length with these ranks."""
    texts = [tiny.answer(number, len(ranks) - place) for place in range(len(ranks))]
    candidates = tuple(Candidate(text, **more) for text in texts)
    return Ranking((Message("user", tiny.question(number)),), split=split, candidates=candidates, ranks=ranks)


ALL_AT_ONCE = {"batch_size": 12, "micro_batch_size": 12, "max_steps": 5}
"""Each step takes all of `few_rankings`: a loss that falls says that the model learns, whatever the order of rows."""


def assert_loss_fell(run: str | Path) -> None:
    losses = [row["train/loss"] for row in metrics_of(run) if "train/loss" in row]
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, rankings: str) -> Path:
    """The folder of a finished run."""
    made = config(tmp_path_factory.mktemp("done"), rankings, eval={"every": 2})
    reward.run(made)
    return Path(made.run)


# ---- a batch -------------------------------------------------------------------------------------------------------


def test_a_batch_holds_every_candidate_once_and_says_whose_it_is(chat: ChatTokenizer) -> None:
    rows = [
        {"prompt": [1, 9], "candidates": [[5], [6, 7, 2]], "ranks": [2, 1], "ratings": [0.5, None], "weight": 0.5},
        {"prompt": [1], "candidates": [[3, 2], [4], [8]], "ranks": [1, 2, 2], "ratings": [None] * 3, "weight": 1.0},
    ]
    batch = RankingCollator(chat)(rows)
    judged = batch.rankings
    assert batch.input_ids.tolist() == [
        [1, 9, 5, 0, 0], [1, 9, 6, 7, 2], [1, 3, 2, 0, 0], [1, 4, 0, 0, 0], [1, 8, 0, 0, 0]
    ]  # fmt: skip
    assert batch.attention_mask.sum(1).tolist() == [3, 5, 3, 2, 2]
    assert judged.ranks.tolist() == [2, 1, 1, 2, 2]
    assert judged.ranking.tolist() == [0, 0, 1, 1, 1]
    assert judged.ratings[0] == 0.5 and judged.ratings[1:].isnan().all()
    assert judged.ratings.dtype == torch.float32 and judged.ranks.dtype == torch.int64


def test_the_first_loss_is_the_mean_over_rankings_of_the_mean_over_pairs_by_plain_transformers(
    tmp_path: Path, rankings: str, chat: ChatTokenizer
) -> None:
    """One step over all rankings, so that the order does not matter; the new head is drawn from the seed."""
    rows = encoded(rankings, chat, "train")
    made = config(tmp_path, rankings, batch={"batch_size": 36, "micro_batch_size": 4, "max_steps": 1}, seed=5)
    reward.run(made)
    torch.manual_seed(5)
    model = load_scalar(made.model, tiny.llama()).model.eval()
    means = []
    with torch.no_grad():
        for row in rows:
            scores = [model(torch.tensor([row["prompt"] + answer])).logits[0, 0] for answer in row["candidates"]]
            pairs = [
                -F.logsigmoid(better - worse)
                for better, i in zip(scores, row["ranks"])
                for worse, j in zip(scores, row["ranks"])
                if i < j
            ]
            means.append(sum(pairs) / len(pairs))
    expected = float(sum(means) / len(means))
    assert metrics_of(made.run)[0]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(tmp_path: Path, rankings: str) -> None:
    rows = {}
    for micro in (8, 2):
        batch = {"batch_size": 8, "micro_batch_size": micro, "max_steps": 5}
        made = config(tmp_path / str(micro), rankings, batch=batch)
        reward.run(made)
        rows[micro] = metrics_of(made.run)
    names = ("train/loss", "optimizer/grad_norm", "optimizer/lr", "train/tokens")
    torch.testing.assert_close(steps(rows[8], *names), steps(rows[2], *names), rtol=2e-4, atol=1e-5)


def test_no_candidate_is_encoded_twice_and_a_prompt_once_for_each_row(
    tmp_path: Path, rankings: str, chat: ChatTokenizer
) -> None:
    rows = encoded(rankings, chat, "train")
    made = config(tmp_path, rankings, batch={"batch_size": 36, "micro_batch_size": 4, "max_steps": 1})
    reward.run(made)
    sharing = load_scalar(made.model, tiny.llama()).shared_prompts
    tokens = 0
    for row in rows:
        answers = [len(answer) for answer in row["candidates"]]
        tokens += len(sharing.rows(len(row["prompt"]), answers)) * len(row["prompt"]) + sum(answers)
    assert metrics_of(made.run)[0]["train/tokens"] == tokens


# ---- ties ----------------------------------------------------------------------------------------------------------


def test_rankings_of_ties_alone_are_skipped_and_counted_where_the_loss_ignores_ties(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [ranking(i, (1, 1) if i % 3 == 0 else (1, 2)) for i in range(12)]
    data = write(tmp_path / "data", some)
    seen = {}
    for loss in ("bradley-terry", "rao-kupper"):
        batch = {"batch_size": 8, "micro_batch_size": 4, "epochs": 1}
        made = config(tmp_path / loss, data, batch=batch, loss=loss, normalize="none")
        reward.run(made)
        seen[loss] = len(metrics_of(made.run)), capsys.readouterr().out
    assert "4 rankings skipped: all their candidates are tied" in seen["bradley-terry"][1]
    assert "skipped" not in seen["rao-kupper"][1]
    assert seen["bradley-terry"][0] == 1 and seen["rao-kupper"][0] == 2  # batches of 8 rankings, or of 12


def test_rankings_that_are_all_ties_are_refused_with_the_losses_that_take_them(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [ranking(i, (1, 1)) for i in range(4)])
    with pytest.raises(UserError, match=r"all candidates are tied in each of the 4(?s:.)*rao-kupper"):
        reward.run(config(tmp_path, data))


def test_held_out_rankings_that_cannot_be_compared_are_no_measure(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [ranking(i, (1, 2) if i else (1, 1), "train" if i else "eval") for i in range(9)])
    made = config(tmp_path, data, batch={"batch_size": 8, "micro_batch_size": 8, "max_steps": 2})
    reward.run(made)
    assert not any("eval/loss" in row for row in metrics_of(made.run))
    assert read_run(made.run)["step"] == 2


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name not in ("bradley-terry", "davidson")))
        for row in RANKING_LOSSES
    ],
)
def test_every_ranking_loss_trains(row: Any, tmp_path: Path, few_rankings: str) -> None:
    made = config(tmp_path, few_rankings, loss=row.name, center_rewards_coefficient=0.01, batch=ALL_AT_ONCE)
    reward.run(made)
    assert_loss_fell(made.run)


def test_margins_from_ratings_and_the_centring_penalty_reach_the_loss(tmp_path: Path) -> None:
    data = [ranking(i, (1, 2, 3)) for i in range(8)]
    rated = []
    for item in data:
        scores = [Candidate(c.text, score=float(3 - place)) for place, c in enumerate(item.candidates)]
        rated.append(Ranking(item.messages, split="train", candidates=tuple(scores), ranks=item.ranks))
    first = {}
    for name, values in {
        "plain": {},
        "margin": {"loss": {"name": "bradley-terry", "margin": "rating"}},
        "centred": {"center_rewards_coefficient": 1.0},
    }.items():
        folder = tmp_path / name
        made = config(folder, write(folder / "data", rated), batch={"batch_size": 8, "max_steps": 1}, **values)
        reward.run(made)
        first[name] = metrics_of(made.run)[0]["train/loss"]
    assert first["margin"] > first["plain"] + 0.1 and first["centred"] > first["plain"]


# ---- held-out figures and the scale --------------------------------------------------------------------------------


def test_the_result_is_the_checkpoint_with_the_lowest_held_out_loss_and_its_figures(done: Path) -> None:
    rows = [row for row in metrics_of(done) if "eval/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    best = min(rows, key=lambda row: row["eval/loss"])
    written, info = json.loads((done / "reward_metrics.json").read_text()), read_run(done)
    assert written["step"] == info["step"] == best["step"]
    assert written["accuracy"] == info["metrics"]["accuracy"] == best["eval/accuracy"]
    assert written["log_loss"] == best["eval/log_loss"]
    assert written["macro_log_loss"] == pytest.approx(best["eval/loss"], rel=1e-5)  # the loss of this run
    assert written["longer_accuracy"] == 0  # in this data the shorter answer is better
    assert set(written["by_annotator"]) == {"annotator 0", "annotator 1", "annotator 2"}


def test_the_figures_are_printed_as_tables(tmp_path: Path, rankings: str, capsys: pytest.CaptureFixture[str]) -> None:
    reward.run(config(tmp_path, rankings))
    printed = capsys.readouterr().out
    for words in ("Held-out rankings", "longer answer wins", "By rank distance", "By annotator", "Tuning: full"):
        assert words in printed


def test_a_held_out_answer_is_scored_once_for_all_figures(
    tmp_path: Path, rankings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    score = reward.score_rankings
    monkeypatch.setattr(reward, "score_rankings", lambda *words: calls.append(1) or score(*words))
    made = config(tmp_path, rankings, eval={"every": 2})
    reward.run(made)
    assert len(calls) == sum("eval/loss" in row for row in metrics_of(made.run)) == 3


def test_plain_transformers_loads_the_result_and_its_scores_give_the_figures(
    done: Path, rankings: str, chat: ChatTokenizer
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(done / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    assert model.config.reward_std == read_run(done)["scale"]["std"] > 0
    scalar = ScalarModel(model)
    total = count = 0.0
    all_scores = []
    for record in open_dataset(rankings).records("eval"):
        prompt = tokenizer.apply_chat_template(record.chat, tokenize=False, add_generation_prompt=True)
        texts = [f"{prompt} {c.text}{tokenizer.eos_token}" for c in record.candidates]
        # The template's text, token for token what training saw, padded by the tokenizer and by nothing of ours.
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        with torch.no_grad():
            raw = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
            normalised = scalar(inputs["input_ids"], inputs["attention_mask"])
        torch.testing.assert_close(normalised, (raw - scalar.mean) / scalar.std)
        all_scores += normalised.tolist()
        for i, better in enumerate(record.ranks):
            for j, worse in enumerate(record.ranks):
                if better < worse:
                    total, count = total + float(raw[i] > raw[j]), count + 1
    written = json.loads((done / "reward_metrics.json").read_text())
    assert written["pairs"] == count and written["accuracy"] == pytest.approx(total / count)
    scores = torch.tensor(all_scores)
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_demonstrations_are_put_at_zero_and_nothing_is_scaled(tmp_path: Path, rankings: str) -> None:
    demonstrations = tiny.write_demonstrations(tmp_path / "demonstrations", 12)
    made = config(tmp_path, {"train": rankings, "demonstrations": demonstrations}, normalize="demonstrations")
    reward.run(made)
    chat = load_tokenizer(made.model, f"{made.run}/model")
    records = list(open_dataset(demonstrations).records("train"))
    scores = finished.scores(made.run, [chat.whole(r.chat, r.answer) for r in records])
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert read_run(made.run)["scale"]["std"] == 1


def test_without_held_out_rankings_the_training_answers_set_the_scale(tmp_path: Path, chat: ChatTokenizer) -> None:
    data = tiny.write_rankings(tmp_path / "data", 16, held_out=0)
    made = config(tmp_path, data)
    reward.run(made)
    rows = encoded(data, chat, "train")
    scores = finished.scores(made.run, [row["prompt"] + answer for row in rows for answer in row["candidates"]])
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert not (Path(made.run) / "reward_metrics.json").exists()


def test_normalize_none_leaves_the_scores_alone(tmp_path: Path, rankings: str) -> None:
    made = config(tmp_path, rankings, normalize="none")
    reward.run(made)
    assert read_run(made.run)["scale"] == {"mean": 0.0, "std": 1.0}


def test_a_resumed_run_reports_the_best_weights_although_it_has_not_seen_them_evaluated(
    tmp_path: Path, rankings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = 2
    evaluate = reward.RewardObjective.evaluate

    def away(self: Any, engine: Any, step: int) -> dict[str, float]:
        monkeypatch.setattr(self, "held_out_loss", lambda scored: 1.0 + abs(step - best))
        return evaluate(self, engine, step)

    monkeypatch.setattr(reward.RewardObjective, "evaluate", away)
    made = config(tmp_path, rankings, eval={"every": 1}, checkpoints={"every": 1})
    with stopped_after(4):
        reward.run(made)
    reward.run(made, resume=True)
    row = next(row for row in metrics_of(made.run) if "eval/loss" in row and row["step"] == best)
    written = json.loads((Path(made.run) / "reward_metrics.json").read_text())
    assert written["step"] == best and written["log_loss"] == row["eval/log_loss"]


# ---- where it starts, what is trained ------------------------------------------------------------------------------


def test_a_reward_run_goes_on_from_its_raw_scores(
    done: Path, tmp_path: Path, rankings: str, chat: ChatTokenizer
) -> None:
    batch, still = {"batch_size": 36, "micro_batch_size": 12, "max_steps": 1}, {"lr": 1e-12}
    made = config(tmp_path, rankings, model={"path": str(done)}, batch=batch, optimizer=still)
    reward.run(made)
    raw = reward_metrics(score_rankings(_loaded(done), chat, encoded(rankings, chat, "train"), 4096))
    assert metrics_of(made.run)[0]["train/loss"] == pytest.approx(raw["macro_log_loss"], rel=1e-4)
    old, new = (json.loads((Path(run) / "reward_metrics.json").read_text()) for run in (done, made.run))
    assert new["log_loss"] == pytest.approx(old["log_loss"], rel=1e-4)
    assert read_run(made.run)["parents"] == [
        {"path": str(done), "stage": "reward", "fingerprint": read_run(done)["model_fingerprint"]}
    ]


def test_it_starts_from_an_sft_run(tmp_path: Path, rankings: str) -> None:
    made = config(tmp_path, rankings, model={"path": finished.sft(tmp_path / "sft")})
    reward.run(made)
    assert read_run(made.run)["parents"][0]["stage"] == "sft"


@pytest.mark.parametrize("tuning", [{"name": "lora", "rank": 4}, {"name": "last-layers", "layers": 1}])
def test_adapters_and_parts_leave_a_whole_model(tuning: dict[str, Any], tmp_path: Path, few_rankings: str) -> None:
    made = config(tmp_path, few_rankings, tuning=tuning, optimizer={"lr": 2e-2}, batch=ALL_AT_ONCE)
    reward.run(made)
    assert_loss_fell(made.run)
    chat = load_tokenizer(made.model, f"{made.run}/model")
    scored = score_rankings(_loaded(made.run), chat, encoded(few_rankings, chat), 2048)
    assert reward_metrics(scored)["log_loss"] == pytest.approx(read_run(made.run)["metrics"]["log_loss"], rel=1e-4)
    assert (Path(made.run) / "adapter").exists() == (tuning["name"] == "lora")


def _loaded(run: str | Path) -> ScalarModel:
    return load_scalar(ModelConfig(path=str(run)), f"{run}/model", head="trained")


def test_an_encoder_with_wordpiece_tokens_is_trained_and_loads_in_plain_transformers(
    tmp_path: Path, few_rankings: str
) -> None:
    made = config(
        tmp_path, few_rankings, model={"path": _bert(tmp_path / "bert")}, optimizer={"lr": 1e-2}, batch=ALL_AT_ONCE
    )
    reward.run(made)
    assert_loss_fell(made.run)
    model = AutoModelForSequenceClassification.from_pretrained(f"{made.run}/model").eval()
    chat = load_tokenizer(made.model, f"{made.run}/model")
    texts = [row["prompt"] + row["candidates"][0] for row in encoded(few_rankings, chat)]
    assert all(ids[0] == chat.tokenizer.cls_token_id and ids[-1] == chat.tokenizer.sep_token_id for ids in texts)
    ids, mask = chat.pad(texts)
    scalar = _loaded(made.run).eval()
    with torch.no_grad():
        raw = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(scalar(ids, mask), (raw - scalar.mean) / scalar.std)


def _bert(folder: Path) -> str:
    """A random BERT encoder with a WordPiece vocabulary of the tiny data's words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = sorted({w for i in range(60) for w in (tiny.question(i) + " " + tiny.answer(i, 3)).lower().split()})
    letters = [chr(c) for c in range(97, 123)] + list("0123456789.,?!:'")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary += ["user", "assistant", *(w.strip(".,?") for w in words)]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(vocabulary))})
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_where_padding_also_ends_answers_plain_transformers_scores_singly_and_refuses_batches(
    tmp_path: Path, rankings: str
) -> None:
    made = config(tmp_path, rankings, model={"path": finished.chatml()})
    reward.run(made)
    chat = load_tokenizer(made.model, f"{made.run}/model")
    assert chat.pad_id == chat.end_id
    model = AutoModelForSequenceClassification.from_pretrained(f"{made.run}/model").eval()
    row = encoded(rankings, chat)[0]
    texts = [row["prompt"] + answer for answer in row["candidates"]]
    scalar = _loaded(made.run).eval()
    expected = [score * scalar.std + scalar.mean for score in finished.scores(made.run, texts).tolist()]
    with torch.no_grad():
        singly = [float(model(torch.tensor([text])).logits) for text in texts]
        assert singly == pytest.approx(expected, abs=1e-5)
        with pytest.raises(ValueError, match="padding token"):
            model(chat.pad(texts)[0])
