"""Ensembles of reward models: how scores are combined, one base for several adapters, PPO, score and sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from logged import lines, updates
from ppo_processes import complete
from ppo_processes import write_config as processes_config
from ppo_runs import config
from shared_base_runs import LORA, values_of

from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.ppo.config import PPOConfig
from rlhf.reward.combining import COMBINATIONS, disagreement
from rlhf.reward.members import load_members
from rlhf.reward.sources import REWARDS, RewardContext, RewardInputs, own_chats, scores_with_disagreement
from rlhf.reward.spec import read_reward
from stages import sample, score
from stages.ppo import run

MEMBERS = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
MESSAGES = [[{"role": "user", "content": "What does the red cat do?"}], [{"role": "user", "content": "And the owl?"}]]
ANSWERS = ["It goes to the house.", "It sleeps."]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("members")
    base = finished.sft(folder / "sft")
    made = {"sft": base}
    for seed in (1, 2, 3):
        made[f"full{seed}"] = finished.reward(folder / f"full{seed}", base, scale=(0.1 * seed, 2.0), seed=seed)
        made[f"lora{seed}"] = finished.reward(folder / f"lora{seed}", base, LORA, (0.1 * seed, 1.0 + seed), seed)
    made["other-lora"] = finished.reward(folder / "other-lora", tiny.llama(), LORA)
    made["raw"] = finished.reward(folder / "raw", base, scale=(0.0, 1.0), seed=5)
    made["chatml"] = finished.reward(folder / "chatml", finished.chatml(), seed=6)
    return made


def inputs(chat: Any) -> RewardInputs:
    ids, mask = chat.pad([chat.whole(messages, answer) for messages, answer in zip(MESSAGES, ANSWERS)])
    return RewardInputs(MESSAGES, ANSWERS, ids, mask)


def scored(reward: dict[str, Any], policy: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores and disagreement of a source for the two answers, in the tokens of a policy."""
    model, pick = ModelConfig(path=policy), REWARDS.pick(reward)
    chat = load_tokenizer(model, f"{policy}/model")
    context = RewardContext(model, chat, lambda module: module.eval(), own_chats=own_chats(pick, model))
    return scores_with_disagreement(pick(context), inputs(chat))


def alone(policy: str, *paths: str) -> torch.Tensor:
    """[answers, models]: what each reward model gives by itself."""
    return torch.stack([scored({"name": "model", "path": path}, policy)[0] for path in paths], 1)


# ---- combining -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "expected"),
    [  # the first answer has mean 3, variance 8/3; members agree on the second
        ("mean", [3.0, 2.0]),
        ("min", [1.0, 2.0]),
        ({"name": "mean-minus-std", "coef": 0.5}, [3.0 - 0.5 * (8 / 3) ** 0.5, 2.0]),
        ({"name": "mean-minus-variance", "coef": 0.75}, [1.0, 2.0]),
    ],
)
def test_scores_of_members_are_combined_as_worked_by_hand(combine: Any, expected: list[float]) -> None:
    assert COMBINATIONS.pick(combine)(MEMBERS).tolist() == pytest.approx(expected)


def test_disagreement_is_the_standard_deviation_over_the_members() -> None:
    assert disagreement(MEMBERS).tolist() == pytest.approx([(8 / 3) ** 0.5, 0.0])


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"models": ["a"]}, "at least two"),
        ({"models": ["a", "a"]}, "named once"),
        ({"models": ["a", "b"], "combine": "max"}, "unknown combination of scores 'max'"),
        ({"models": ["a", "b"], "combine": {"name": "mean", "coef": 1}}, "has no option 'coef'"),
    ],
)
def test_a_wrong_ensemble_is_refused_with_the_config(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        REWARDS.pick({"name": "ensemble", **values})


# ---- the source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["mean", "min", {"name": "mean-minus-std", "coef": 2.0}])
def test_an_ensemble_combines_the_normalised_scores_of_its_members(runs: dict[str, str], combine: Any) -> None:
    paths = [runs["full1"], runs["full2"], runs["full3"]]
    scores, spread = scored({"name": "ensemble", "models": paths, "combine": combine}, runs["sft"])
    expected = alone(runs["sft"], *paths)
    torch.testing.assert_close(scores, COMBINATIONS.pick(combine)(expected))
    torch.testing.assert_close(spread, expected.std(1, correction=0))
    assert spread is not None and spread.min() > 0


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_adapters_on_one_base_load_it_once_and_give_the_scores_of_the_runs(
    runs: dict[str, str], method: str, tmp_path: Path
) -> None:
    paths = [runs["lora1"], runs["lora2"], runs["lora3"]]
    if method == "bottleneck":
        paths = [finished.reward(tmp_path / str(seed), runs["sft"], method, (0.2, seed), seed) for seed in (1, 2)]
    members = load_members(ModelConfig(path="x"), paths, lambda _: None)
    weights = {id(p): p.numel() for member in members for p in member.parameters()}
    whole = load_members(ModelConfig(path="x"), [runs["full1"]], lambda _: None)[0]
    base = sum(p.numel() for p in whole.parameters())
    assert base < sum(weights.values()) < 2 * base
    found = scored({"name": "ensemble", "models": paths}, runs["sft"])[0]
    torch.testing.assert_close(found, alone(runs["sft"], *paths).mean(1), atol=1e-5, rtol=1e-4)
    assert len({round(float(x), 3) for x in alone(runs["sft"], *paths)[0]}) == len(paths), "the members differ"


def test_members_of_different_kinds_and_bases_keep_their_order(runs: dict[str, str]) -> None:
    paths = [runs["lora1"], runs["other-lora"], runs["full1"], runs["lora2"]]
    members = load_members(ModelConfig(path="x"), paths, lambda _: None)
    assert [member.std for member in members] == [2.0, 2.0, 2.0, 3.0]
    found = scored({"name": "ensemble", "models": paths, "combine": "min"}, runs["sft"])[0]
    torch.testing.assert_close(found, alone(runs["sft"], *paths).amin(1), atol=1e-5, rtol=1e-4)


def test_a_base_that_has_changed_since_is_not_shared(runs: dict[str, str], tmp_path: Path) -> None:
    base = finished.sft(tmp_path / "base")
    paths = [finished.reward(tmp_path / str(seed), base, LORA, seed=seed) for seed in (1, 2)]
    before = scored({"name": "ensemble", "models": paths}, runs["sft"])[0]
    finished.sft(tmp_path / "new", seed=9)
    info = json.loads((tmp_path / "base" / "run.json").read_text())
    for place in ("model/model.safetensors", "run.json"):
        (tmp_path / "base" / place).write_bytes((tmp_path / "new" / place).read_bytes())
    assert json.loads((tmp_path / "base" / "run.json").read_text())["model_fingerprint"] != info["model_fingerprint"]
    torch.testing.assert_close(scored({"name": "ensemble", "models": paths}, runs["sft"])[0], before)


def test_members_may_read_text_in_their_own_tokens(runs: dict[str, str]) -> None:
    paths = [runs["full1"], runs["chatml"]]
    found = scored({"name": "ensemble", "models": paths, "retokenize": True}, runs["sft"])[0]
    single = [
        finished.score_of_answer(path, messages, answer)
        for path in paths
        for messages, answer in zip(MESSAGES, ANSWERS)
    ]
    assert found.tolist() == pytest.approx([(single[0] + single[2]) / 2, (single[1] + single[3]) / 2], rel=1e-5)


def test_members_without_stored_normalisation_are_named(runs: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    load_members(ModelConfig(path="x"), [runs["full1"], runs["full2"]], lambda _: None)
    assert "normalised" not in capsys.readouterr().err
    load_members(ModelConfig(path="x"), [runs["full1"], runs["raw"]], lambda _: None)
    said = " ".join(capsys.readouterr().err.split())
    assert "were not normalised after training" in said and "full1" not in said


def test_the_disagreement_of_an_ensemble_in_a_sum_has_the_terms_weight(runs: dict[str, str]) -> None:
    ensemble = {"name": "ensemble", "models": [runs["full1"], runs["full2"]]}
    constant = {"name": "function", "function": "ppo_rewards:one"}
    scores, spread = scored(ensemble, runs["sft"])
    total, of_sum = scored({"name": "sum", "terms": [ensemble | {"weight": -2.0}, constant]}, runs["sft"])
    torch.testing.assert_close(total, -2 * scores + 1)
    assert spread is not None
    torch.testing.assert_close(of_sum, 2 * spread)
    assert scored({"name": "sum", "terms": [constant]}, runs["sft"])[1] is None


# ---- PPO -------------------------------------------------------------------------------------------------------------


def test_ppo_logs_the_mean_disagreement_and_writes_that_of_each_answer(
    runs: dict[str, str], tmp_path: Path, prompts: str
) -> None:
    reward = {"name": "ensemble", "models": [runs["lora1"], runs["lora2"]], "combine": "min"}
    run(config(tmp_path / "run", prompts, reward=reward, model__path=runs["sft"], critic={"init": "reward"}))
    found = updates(tmp_path / "run")
    assert all(line["objective/disagreement"] > 0 for line in found)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    last = [one["disagreement"] for one in samples if one["step"] == 2]
    evaluations = [line for line in lines(tmp_path / "run") if "eval/disagreement" in line]
    assert evaluations[-1]["eval/disagreement"] == pytest.approx(sum(last) / len(last))
    parents = json.loads((tmp_path / "run" / "run.json").read_text())["parents"]
    assert [one["path"] for one in parents] == [runs["sft"], runs["lora1"], runs["lora2"]]


def test_ppo_on_a_shared_base_scores_by_an_ensemble_as_with_separate_models(
    runs: dict[str, str], tmp_path: Path, prompts: str
) -> None:
    reward = {"name": "ensemble", "models": [runs["lora1"], runs["lora2"]]}
    found = []
    for sharing in ("shared", "separate"):
        values = values_of(tmp_path / sharing, prompts, runs["sft"], reward, sharing, updates=1)
        run(check_config(PPOConfig, values, "test"))
        found.append(updates(tmp_path / sharing)[0])
    for name in ("objective/scores", "objective/disagreement"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_single_process_metrics_of_an_ensemble(
    runs: dict[str, str], tmp_path: Path, prompts: str
) -> None:
    models = [runs["lora1"], runs["full1"], runs["lora2"]]
    reward = {"name": "ensemble", "models": models, "combine": {"name": "mean-minus-std", "coef": 0.5}}
    more = {"reward": reward, "model": {"path": runs["sft"]}, "updates": 1}
    complete(1, processes_config(tmp_path / "one", prompts, runs["full1"], **more))
    settings = str(tiny.REPOSITORY / "configs" / "deepspeed" / "zero3.json")
    complete(2, processes_config(tmp_path / "two", prompts, runs["full1"], deepspeed=settings, **more))
    one, two = lines(tmp_path / "one" / "run"), lines(tmp_path / "two" / "run")
    assert any("objective/disagreement" in line for line in one)
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_score_gives_each_answer_its_score_disagreement_and_members(runs: dict[str, str]) -> None:
    spec = f"{{name: ensemble, models: [{runs['lora1']}, {runs['lora2']}], combine: min}}"
    said, _ = finished.invoke(score.command, spec, "-p", "Hi", "-a", ANSWERS[0], "--json")
    row = json.loads(said)
    expected = [
        finished.score_of_answer(runs[name], [{"role": "user", "content": "Hi"}], ANSWERS[0])
        for name in ("lora1", "lora2")
    ]
    assert list(row["members"].values()) == pytest.approx(expected, abs=1e-4)
    assert row["score"] == pytest.approx(min(expected), abs=1e-4)
    assert row["disagreement"] == pytest.approx(abs(expected[0] - expected[1]) / 2, abs=1e-4)
    said, _ = finished.invoke(score.command, spec, "-p", "Hi", "-a", ANSWERS[0])
    assert "+-" in said
    data = tiny.write_rankings(Path(runs["sft"]).parent / "rankings", 2, held_out=2)
    said, _ = finished.invoke(score.command, spec, "--dataset", data)
    assert "disagreement" in said


def test_score_refuses_a_source_that_is_no_reward_model(runs: dict[str, str]) -> None:
    with pytest.raises(UserError, match="is not a reward model"):
        finished.invoke(score.command, "ppo_rewards:one", "-p", "Hi", "-a", "x")
    with pytest.raises(UserError, match="is not a reward model"):
        finished.invoke(score.command, f"{{name: ensemble, models: [{runs['sft']}, x]}}", "-p", "Hi", "-a", "x")


def test_the_best_of_n_is_chosen_by_an_ensemble_that_a_file_describes(runs: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "ensemble.yaml"
    file.write_text(json.dumps({"name": "ensemble", "models": [runs["full1"], runs["chatml"]], "combine": "mean"}))
    words = (runs["sft"], "-p", "Hi", "--reward", file, "--max-new-tokens", 8, "--json")
    said, _ = finished.invoke(sample.command, *words, "--n", 4)
    rows = [json.loads(line) for line in said.splitlines()]
    for row in rows:
        one = [finished.score_of_answer(runs[name], row["messages"], row["answer"]) for name in ("full1", "chatml")]
        assert row["disagreement"] == pytest.approx(abs(one[0] - one[1]) / 2, abs=1e-4)
    said, _ = finished.invoke(sample.command, *words, "--best-of", 4)
    assert json.loads(said)["score"] == max(row["score"] for row in rows)


@pytest.mark.parametrize("spec", ["{name: ensemble, models: [a]}", "{name: nothing}", "{name: [}"])
def test_a_wrong_reward_source_on_the_command_line_is_a_value_error(spec: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_reward(spec)
