"""`rlhf evaluate` of reward models, and of other sources of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
from chat_servers import Response, chat_server, completion
from evaluated import letters, metrics_of

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.store import open_dataset
from rlhf.evaluation.scored import open_answer_scorer
from rlhf.runs.parents import resolve_model_path
from stages.evaluate import command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    sft = finished.sft(folder / "sft")
    return {"sft": sft, "reward": finished.reward(folder / "reward", sft)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"ranking": tiny.write_rankings(tmp_path_factory.mktemp("data") / "rankings", 2, held_out=10)}


def test_a_reward_run_is_measured_on_rankings(runs: dict[str, str], data: dict[str, str]) -> None:
    said, _ = finished.invoke(command, runs["reward"], "--dataset", data["ranking"], "--json")
    found = finished.last_json(said)
    config = ModelConfig(path=runs["reward"])
    chat = load_tokenizer(config, resolve_model_path(runs["reward"]))
    right = pairs = 0.0
    for record in open_dataset(data["ranking"]).records("eval"):
        texts = [chat.prompt(record.messages) + chat.response(c.text) for c in record.candidates]
        scores = finished.scores(runs["reward"], texts).tolist()
        for i, better in enumerate(record.ranks):
            for j, worse in enumerate(record.ranks):
                if better < worse:
                    pairs, right = pairs + 1, right + (scores[i] > scores[j])
    (card,) = found["datasets"]
    assert card["pairs"]["accuracy"]["count"] == pairs
    assert card["pairs"]["accuracy"]["value"] == pytest.approx(right / pairs)
    assert "longer answer" in said and "By rank distance" in said and "By annotator" in said


def test_two_datasets_a_battery_and_a_page_in_one_command(
    runs: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    words = (data["ranking"], data["ranking"], "--perturb", "--perturb-rankings", 3)
    said, _ = finished.invoke(
        command, runs["reward"], *words, "--html", tmp_path / "new" / "page.html", "--out", tmp_path / "out.json"
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert [card["perturbations"]["rankings"] for card in found["datasets"]] == [3, 3]
    assert found["datasets"][0] == found["datasets"][1]
    page = (tmp_path / "new" / "page.html").read_text()
    for row in found["datasets"][0]["perturbations"]["perturbations"]:
        assert row["name"] in said and row["name"].replace("'", "&#39;") in page
    assert not [word for word in ("<script", "https:", "src=", "@import") if word in page]


def test_an_ensemble_is_measured_by_the_mean_of_its_members(
    runs: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    other = finished.reward(tmp_path / "other", runs["sft"], seed=5)
    found = metrics_of(f"{{name: ensemble, models: [{runs['reward']}, {other}]}}", data["ranking"])
    (card,) = found["datasets"]
    right = []
    chat = load_tokenizer(ModelConfig(path=other), resolve_model_path(other))
    for record in open_dataset(data["ranking"]).records("eval"):
        texts = [chat.whole(record.chat, one.text) for one in record.candidates]
        mean = sum(finished.scores(run, texts) for run in (runs["reward"], other)) / 2
        pairs = [(i, j) for i, a in enumerate(record.ranks) for j, b in enumerate(record.ranks) if a < b]
        right += [bool(mean[i] > mean[j]) for i, j in pairs]
    assert card["pairs"]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))


def test_a_sum_with_a_judge_is_measured_by_the_weighted_scores(
    runs: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    def answer(body: dict[str, Any], number: int) -> Response:
        return completion(f"[[{1 + len(body['messages'][0]['content']) % 10}]]")

    with chat_server(answer) as server:
        judge = {"name": "judge", "url": server.url, "cache": str(tmp_path / "replies")}
        parts = [{"name": "model", "path": runs["reward"], "weight": 0.5}, {**judge, "unmeasured": True, "weight": -1}]
        whole = {"name": "sum", "terms": [*parts, {"name": "function", "function": "evaluated:letters"}]}
        scorer = open_answer_scorer(json.dumps(whole))
        record = next(iter(open_dataset(data["ranking"]).records("eval")))
        texts = [one.text for one in record.candidates]
        found = scorer.answers([record] * len(texts), texts)
        ratings = open_answer_scorer(json.dumps(judge | {"unmeasured": True})).answers([record] * len(texts), texts)
        by_hand = [
            0.5 * finished.score_of_answer(runs["reward"], record.chat, text) - float(rating or 0) + letters([], text)
            for text, rating in zip(texts, ratings)
        ]
        assert found == pytest.approx(by_hand, abs=1e-4) and len(set(ratings)) > 1
        measured = metrics_of(json.dumps(whole), data["ranking"])
        with pytest.raises(UserError, match="was not measured"):
            metrics_of(json.dumps(judge), data["ranking"])
    assert measured["datasets"][0]["pairs"]["accuracy"]["count"] > 0


def test_a_reward_function_is_measured_as_a_reward_model_is(data: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = metrics_of("evaluated:letters", data["ranking"], "--html", tmp_path / "page.html")
    assert found["datasets"][0]["perturbations"] is None
    assert "<h3>Calibration</h3>" in (tmp_path / "page.html").read_text()
    facts = found["datasets"][0]["pairs"]
    assert facts["accuracy"]["value"] == facts["baselines"][0]["value"], "it is the rule that the longer answer wins"
    with pytest.raises(UserError, match="the same score"):
        metrics_of("evaluated:constant", data["ranking"], "--perturb")
