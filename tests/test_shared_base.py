"""One base for four roles: the same numbers as four separate models with the same adapters, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from logged import lines as metrics
from peft import PeftModel
from ppo_runs import REWARD as FUNCTION
from shared_base_runs import LAST, LORA, adapters_of, parents, values_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import stages.ppo
from rlhf.cli.preflight import check
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.export.export import ROLES, export
from rlhf.export.formats import EXPORTERS
from rlhf.models.forward import hidden_states
from rlhf.models.scalar import ScalarModel
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.models import ActorCritic, SeparateModels
from rlhf.ppo.shared_roles import recognise
from rlhf.runs.parents import resolve_model_path
from rlhf.training.engine import make_engine
from stages.ppo import PPO


@pytest.fixture(scope="module")
def runs():
    return parents()


def config(*args, **changes) -> PPOConfig:
    return check_config(PPOConfig, values_of(*args, **changes), "test")


def train(made: PPOConfig, **how: Any) -> PPO:
    stage = PPO(made, resume=how.get("resume", False), overwrite=False)
    stage.train()
    return stage


# ---- four separate models ------------------------------------------------------------------------------------------


def four_models(base: str, policy: dict[str, torch.Tensor], sft: str | None, reward: str):
    """What `load_separate` gives: policy, critic and reference as models of their own, with the given adapters."""

    def load_separate(config, chat):
        lm = config.tuning(AutoModelForCausalLM.from_pretrained(base), chat, "causal")
        missing = lm.load_state_dict(policy, strict=False)
        assert not missing.unexpected_keys
        body = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        critic = ScalarModel(PeftModel.from_pretrained(body, f"{reward}/adapter", is_trainable=True))
        settings = json.loads((Path(resolve_model_path(reward)) / "config.json").read_text())
        critic.set_scale(settings["reward_mean"], settings["reward_std"])
        reference = AutoModelForCausalLM.from_pretrained(base)
        if sft is not None:
            reference = PeftModel.from_pretrained(reference, f"{sft}/adapter").merge_and_unload()
        rates = ((lm, config.optimizer.policy_lr), (critic, config.optimizer.critic_lr))
        groups = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": lr} for m, lr in rates]
        engine = make_engine(ActorCritic(lm, critic), groups, config.optimizer, config.precision, config.deepspeed)
        return SeparateModels(engine, engine.freeze(ActorCritic(reference, None)))

    return load_separate


def train_separately(monkeypatch, shared: PPO, folder, base, sft, reward) -> PPO:
    """The same run with four models; the policy's adapter begins as that of `shared`, which is not trained yet."""
    begin = {
        n: p.detach().clone() for n, p in shared.models.engine.module.policy.named_parameters() if ".default." in n
    }
    monkeypatch.setattr(stages.ppo, "load_separate", four_models(base, begin, sft, reward))
    changes = {"run": str(folder), "model": shared.config.model.model_copy(update={"sharing": "separate"})}
    return train(shared.config.model_copy(update=changes))


def assert_alike(shared: PPO, separate: PPO) -> None:
    """Metrics, adapters and value head of the two agree."""
    for mine, theirs in zip(metrics(shared.run.path), metrics(separate.run.path), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    module = separate.models.engine.module
    found = adapters_of(shared.run.path)
    expected = {f"adapter.{n}": p for n, p in module.policy.named_parameters() if p.requires_grad}
    expected |= {f"critic.{n}": p for n, p in module.critic.model.named_parameters() if p.requires_grad}
    expected = {n.replace(".default.", ".").replace("modules_to_save.", ""): p.detach() for n, p in expected.items()}
    assert {n.replace(".default", "") for n in expected} == set(found)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name.replace(".default", "")], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case", [pytest.param("reward over SFT", marks=pytest.mark.slow), "last layer", "both over the base"]
)
def test_one_base_gives_what_four_models_give(case, tmp_path, runs, prompts, monkeypatch):
    model, reward, sft, tuning = {
        "reward over SFT": (runs["sft"], runs["over-sft"], None, LORA),
        "last layer": (runs["sft"], runs["last"], None, LAST),
        "both over the base": (runs["sft-lora"], runs["over-base"], runs["sft-lora"], LORA),
    }[case]
    base = tiny.llama() if sft else resolve_model_path(model)
    shared = PPO(config(tmp_path / "shared", prompts, model, reward, tuning=tuning), resume=False, overwrite=False)
    begin = {n: p.detach().clone() for n, p in shared.models.engine.module.policy.named_parameters()}
    separate = train_separately(monkeypatch, shared, tmp_path / "separate", base, sft, reward)
    shared.train()
    assert_alike(shared, separate)
    for name, weight in shared.models.engine.module.policy.named_parameters():
        trained = ".default." in name or ".critic." in name
        assert torch.equal(weight, begin[name]) != trained, name


def test_without_a_reward_model_policy_critic_and_reference_share(tmp_path, prompts):
    """The same as a policy and a critic of their own, whose adapters are new."""
    shared = PPO(config(tmp_path / "shared", prompts, tiny.llama(), FUNCTION), resume=False, overwrite=False)
    plain = config(tmp_path / "plain", prompts, tiny.llama(), FUNCTION, sharing="separate")
    separate = PPO(plain, resume=False, overwrite=False)
    theirs = separate.models.engine.module
    with torch.no_grad():
        begin = dict(shared.models.engine.module.policy.named_parameters())
        for name, weight in theirs.policy.named_parameters():
            weight.copy_(begin[name])
        for name, weight in theirs.critic.model.named_parameters():
            if "lora_" in name:
                weight.copy_(begin[name.replace(".default.", ".critic.")])
        score = theirs.critic.model.get_base_model().score
        score.modules_to_save["default"].weight.copy_(shared.models.engine.module.heads["critic"].weight)
    separate.train()
    shared.train()
    assert_alike(shared, separate)


def test_an_estimator_without_a_critic_shares_the_rest(tmp_path, runs, prompts):
    changes = {"advantage": "rloo", "rollout__samples_per_prompt": 2, "updates": 1}
    stage = train(config(tmp_path / "run", prompts, runs["sft"], runs["over-sft"], **changes))
    assert stage.models.engine.module.critic is None and set(stage.models.engine.module.heads) == {"reward"}
    assert not (tmp_path / "run" / "critic").exists()


def test_the_reward_is_a_term_of_a_sum_too(tmp_path, runs, prompts):
    terms = [{"name": "model", "path": runs["over-sft"], "weight": 2.0}, {**FUNCTION, "weight": -1.0}]
    rewards = [{"name": "sum", "terms": terms}, runs["over-sft"], FUNCTION]
    one_pass = {"batch__epochs": 1, "batch__minibatches": 1}
    both, model, function = (
        PPO(config(tmp_path / str(i), prompts, runs["sft"], one, **one_pass), resume=False, overwrite=False).update(0)[
            "objective/scores"
        ]
        for i, one in enumerate(rewards)
    )
    assert both == pytest.approx(2 * model - function, abs=1e-5)


def test_the_base_is_there_once(tmp_path, runs, prompts):
    stage = PPO(config(tmp_path / "run", prompts, runs["sft"], runs["over-sft"]), resume=False, overwrite=False)
    base = AutoModelForCausalLM.from_pretrained(resolve_model_path(runs["sft"])).num_parameters()
    total = sum(p.numel() for p in stage.models.engine.module.parameters())
    adapter = sum(p.numel() for p in stage.models.engine.module.adapter("policy"))
    assert total == base + 3 * adapter + 2 * 32  # policy, critic and reward; the reference is the base alone


def test_gradient_checkpointing_changes_nothing(tmp_path, runs, prompts):
    found = []
    for on in (False, True):
        changes = {"gradient_checkpointing": on, "seed": 5, "updates": 1, "eval__prompts": 0}
        train(config(tmp_path / str(on), prompts, runs["sft"], runs["over-sft"], **changes))
        found.append(adapters_of(tmp_path / str(on)))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("tuning, reward", [(LORA, "over-sft"), (LAST, "last")])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tuning, reward, tmp_path, runs, prompts):
    def made(name):
        return config(tmp_path / name, prompts, runs["sft"], runs[reward], tuning=tuning, updates=3)

    train(made("whole"))
    cut = PPO(made("cut"), resume=False, overwrite=False)
    cut.evaluate()
    for number in range(2):  # stops after update 2, with the checkpoint of update 1
        cut.reporter.update(number + 1, cut.update(number))
        cut.done = number + 1
        if number == 0:
            cut.save()
    train(made("cut"), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    whole, again = (adapters_of(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_merging_for_the_rollout_samples_the_same_and_leaves_the_weights_as_they_were(tmp_path, runs, prompts):
    answers, weights = [], []
    for merge in (False, True):
        changes = {"rollout__merge_adapters": merge, "rollout__stop": [], "batch__epochs": 1, "batch__minibatches": 1}
        made = config(tmp_path / str(merge), prompts, runs["sft-lora"], runs["over-base"], **changes)
        stage = PPO(made, resume=False, overwrite=False)
        policy = stage.models.engine.module.policy
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        answers.append([answer.ids for answer in stage.rollout(stage.draw_prompts(0)).completions])
        assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
        assert stage.update(0)["policy/first_ratio_min"] == 1.0
        weights.append(before)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)
    assert answers[0] == answers[1]


# ---- recognition ---------------------------------------------------------------------------------------------------


def planned(made: PPOConfig) -> str:
    return dict(check("ppo", made, False, False))["sharing"]


def test_the_plan_says_which_base_is_shared(tmp_path, runs, prompts):
    over_sft = planned(config(tmp_path, prompts, runs["sft"], runs["over-sft"]))
    assert f"one base {resolve_model_path(runs['sft'])} (fingerprint " in over_sft
    assert "policy new" in over_sft and f"critic from {runs['over-sft']}" in over_sft
    assert "reference without adapter" in over_sft
    both = planned(config(tmp_path, prompts, runs["sft-lora"], runs["over-base"]))
    assert f"one base {tiny.llama()} " in both
    assert f"policy from {runs['sft-lora']}" in both and f"reference from {runs['sft-lora']}" in both
    assert "reward" not in planned(config(tmp_path, prompts, runs["sft"], FUNCTION))


def test_the_base_is_known_by_its_weights_and_not_by_its_path(tmp_path, runs, prompts):
    made = config(tmp_path, prompts, str(Path(resolve_model_path(runs["sft"]))), runs["over-sft"])
    assert recognise(made).weights == recognise(config(tmp_path, prompts, runs["sft"], runs["over-sft"])).weights


@pytest.mark.parametrize(
    "model, reward, words",
    [
        ("sft", "over-base", r"(?s)no base in common.*fingerprint.*is fingerprint.*not an SFT LoRA run.*tuning: lora"),
        ("sft-lora", "over-sft", r"(?s)no base in common.*fingerprint.*an adapter on.*model.sharing=separate"),
        ("sft", "full", r"(?s)reward.path.*tuning: full.*needs an adapter.*Train it with `tuning: lora`"),
    ],
)
def test_models_without_a_base_in_common_are_refused_before_anything_is_loaded(
    model, reward, words, tmp_path, runs, prompts
):
    with pytest.raises(UserError) as caught:
        check("ppo", config(tmp_path, prompts, runs[model], runs[reward]), False, False)
    assert re.search(words, str(caught.value)), str(caught.value)


def test_a_base_that_has_changed_since_is_refused(tmp_path, prompts):
    sft = finished.sft(tmp_path / "sft")
    reward = finished.reward(tmp_path / "reward", sft, LORA)
    check("ppo", config(tmp_path / "run", prompts, sft, reward), False, False)
    shutil.rmtree(sft)
    finished.sft(tmp_path / "sft", seed=9)
    with pytest.raises(UserError, match="no base in common"):
        check("ppo", config(tmp_path / "run", prompts, sft, reward), False, False)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"critic__tuning": {**LORA, "rank": 8}}, r"critic.tuning: differs.*rank: 4"),
        ({"critic__init": "policy", "critic__tuning": {**LORA, "rank": 8}}, None),
        ({"tuning": {**LORA, "rank": 8}}, None),
        ({"tuning": "full"}, r"tuning: model.sharing .* got 'full'"),
        ({"critic__tuning": "full"}, r"critic.tuning: model.sharing .* got 'full'"),
        ({"compile": True}, r"compile: not supported with"),
        ({"rollout__merge_adapters": True, "tuning": "full"}, r"merge_adapters: tuning 'full' has no adapter"),
        ({"tuning": {**LORA, "dropout": 0.1}}, r"tuning.dropout: PPO's ratio needs the same log-probs"),
        (
            {"tuning": {"name": "qlora", "rank": 4, "alpha": 8}},
            r"critic.tuning: .* same method as tuning, 'qlora'",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(changes, words, tmp_path, runs, prompts):
    def plan():
        values = values_of(tmp_path, prompts, runs["sft"], runs["over-sft"], **{"critic__tuning": LORA, **changes})
        return check("ppo", check_config(PPOConfig, values, "test"), False, False)

    if words is None:
        plan()
    else:
        with pytest.raises(UserError, match=f"(?s){words}"):
            plan()


# ---- the frozen trunk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reusing_the_trunk_changes_nothing(checkpointing, tmp_path, runs, prompts):
    found = []
    for reuse in (True, False):
        changes = {"gradient_checkpointing": checkpointing}
        made = config(tmp_path / str(reuse), prompts, runs["sft"], runs["last"], tuning=LAST, **changes)
        stage = PPO(made, resume=False, overwrite=False)
        if reuse:
            assert stage.models.engine.module.frozen_layers.depth == 1
        else:
            stage.models.engine.module.frozen_layers.depth = 0
        stage.train()
        assert all(
            line["policy/first_ratio_min"] == line["policy/first_ratio_max"] == 1.0 for line in metrics(made.run)[1:3]
        )
        found.append((metrics(made.run), adapters_of(made.run)))
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, atol=1e-5, rtol=0)


def test_the_trunk_runs_once_per_micro_batch_of_scoring_and_not_in_learning(tmp_path, runs, prompts):
    made = config(tmp_path / "run", prompts, runs["sft"], runs["last"], tuning=LAST)
    stage = PPO(made, resume=False, overwrite=False)
    rollout = stage.rollout(stage.draw_prompts(0))
    stage.rollout = lambda prompts: rollout
    ran = {0: 0, 1: 0}
    for number, layer in enumerate(stage.models.engine.module.frozen_layers.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.update({number: ran[number] + 1}))
    minibatches = stage.minibatches(rollout, 0)
    first, second = (sum(len(part.per_rank[0]) for part in minibatches.epochs[epoch]) for epoch in range(2))
    stage.update(0)
    assert ran[0] == first
    assert ran[1] == 4 * first + 2 * (first + second)  # four roles; then policy and critic in two epochs


def test_demonstrations_of_the_ptx_term_pass_through_all_layers(tmp_path, runs, prompts):
    changes = {"data__ptx": prompts, "loss__ptx_coef": 1.0, "updates": 1}
    losses = []
    for reuse in (True, False):
        made = config(tmp_path / str(reuse), prompts, runs["sft"], runs["last"], tuning=LAST, **changes)
        stage = PPO(made, resume=False, overwrite=False)
        stage.models.engine.module.frozen_layers.depth *= reuse
        losses.append(stage.update(0)["loss/ptx"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, runs, prompts) -> PPO:
    """Case `both over the base`: every role has an adapter."""
    folder = tmp_path_factory.mktemp("trained")
    return train(config(folder / "run", prompts, runs["sft-lora"], runs["over-base"], updates=1, eval__prompts=0))


IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])
MASK = torch.ones_like(IDS)


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_exported_for_plain_transformers(role, trained, tmp_path):
    export(trained.run.path, tmp_path / "out", EXPORTERS.pick("hf"), role=role)
    module = trained.models.engine.module
    with torch.no_grad(), module.acting(role):
        if role in ("policy", "reference"):
            expected = module.policy(IDS).logits
            found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        else:
            expected = module.scalars[role].token_values(IDS, MASK)[:, -1]
            classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
            settings = classifier.config
            found = (classifier(IDS).logits[:, 0] - settings.reward_mean) / settings.reward_std
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert f"{role}" in (tmp_path / "out" / "README.md").read_text() or role in ("policy", "reference")


def test_the_critic_is_exported_as_an_adapter_too(trained, tmp_path):
    export(trained.run.path, tmp_path / "out", EXPORTERS.pick("adapter"), role="critic")
    base = AutoModelForSequenceClassification.from_pretrained(tiny.llama(), num_labels=1)
    base.config.pad_token_id = None
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    module = trained.models.engine.module
    with torch.no_grad(), module.acting("critic"):
        expected = module.heads["critic"](hidden_states(module.policy, IDS, MASK))[:, -1, 0]
        torch.testing.assert_close(model(IDS).logits[:, 0], expected, atol=1e-5, rtol=0)


def test_roles_that_a_run_does_not_have_are_refused(tmp_path, trained, runs):
    plain = finished.ppo(tmp_path / "plain", runs["sft"], runs["full"])
    with pytest.raises(UserError, match="has no critic"):
        export(plain, tmp_path / "a", EXPORTERS.pick("hf"), role="critic")
    with pytest.raises(UserError, match="has no reward model"):
        export(runs["sft"], tmp_path / "a", EXPORTERS.pick("hf"), role="reward")
    alone = finished.ppo(tmp_path / "alone", tiny.llama(), runs["full"])
    with pytest.raises(UserError, match="is not a run"):
        export(alone, tmp_path / "a", EXPORTERS.pick("hf"), role="reference")
    finished.sft(tmp_path / "sft")
    child = finished.ppo(tmp_path / "child", str(tmp_path / "sft"), runs["full"])
    shutil.rmtree(tmp_path / "sft")
    finished.sft(tmp_path / "sft", seed=9)
    with pytest.raises(UserError, match="trained again"):
        export(child, tmp_path / "a", EXPORTERS.pick("hf"), role="reference")
    assert not (tmp_path / "a").exists()
