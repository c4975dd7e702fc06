"""The PPO stage on a tiny model: invariants of one update, options, failures, and exact resume."""

from __future__ import annotations

import json
import math
import re

import pytest
import tiny
import torch
from logged import TIMINGS, updates
from logged import lines as metrics
from ppo_runs import REWARD, SMALL, config
from transformers import AutoModelForCausalLM

from rlhf.config.base import DataConfig
from rlhf.core.errors import UserError
from rlhf.data.tables import tokenize
from rlhf.ppo.kl import RunningMeanStd
from stages.ppo import PPO, run

NAME = re.compile(r"`([^`]+)`")


def test_the_first_minibatch_has_a_ratio_of_exactly_one(tmp_path, prompts):
    run(config(tmp_path / "run", prompts, rollout__temperature=0.7, rollout__top_p=0.9))
    for line in updates(tmp_path / "run"):
        assert line["policy/first_ratio_min"] == line["policy/first_ratio_max"] == 1.0
        assert line["policy/ratio_max"] > 1.0


@pytest.fixture(scope="module")
def done(tmp_path_factory, prompts):
    """The folder of a run as `config` has it."""
    folder = tmp_path_factory.mktemp("done") / "run"
    run(config(folder, prompts))
    return folder


def test_the_kl_is_exactly_zero_before_anything_was_learned(done):
    first, second = updates(done)
    assert first["objective/kl"] == first["objective/kl_k3"] == 0.0
    assert second["objective/kl_k3"] > 0


def test_every_metric_of_the_docs_is_logged_under_its_name_and_no_other(done):
    text = (tiny.REPOSITORY / "docs" / "metrics.md").read_text("utf-8").split("## PPO")[1]
    listed = {name for line in text.splitlines() if line.startswith("| `") for name in NAME.findall(line.split("|")[1])}
    others = ("rollout/sampler_gap", "rollout/importance", "objective/disagreement", "eval/disagreement")
    others += (
        "guard/watch",
        "guard/disagreement",
        "guard/outside",
        "guard/perturbation",
        "objective/gold",
        "eval/gold",
    )
    elsewhere = {name for name in listed if name.startswith(others)}  # other samplers, ensembles, what only looks on
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert {name for line in lines for name in line} == listed - elsewhere | {"step"}
    assert all(math.isfinite(value) for line in lines for value in line.values())
    timed = lines[1]
    for phase in ("rollout", "score", "learn"):
        assert timed[f"time/{phase}"] > 0 and timed[f"throughput/{phase}"] > 0
    assert timed["memory/peak_gb"] > 0
    samples = [json.loads(line) for line in (done / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 3 + [2] * 3
    assert {"messages", "answer", "score", "ended"} <= set(samples[0])


def test_the_result_is_the_policy_and_plain_transformers_loads_it(tmp_path, prompts):
    stage = PPO(config(tmp_path / "run", prompts), resume=False, overwrite=False)
    stage.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for (name, mine), (other, theirs) in zip(
        stage.models.engine.module.policy.named_parameters(), saved.named_parameters()
    ):
        assert name == other and torch.equal(mine, theirs)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


def test_metrics_go_to_tensorboard_where_the_config_says_so(tmp_path, prompts):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(config(tmp_path / "run", prompts, **SMALL, log__report_to=["tensorboard"]))
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents*")}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("objective/scores")]
    assert seen == [(line["step"], pytest.approx(line["objective/scores"])) for line in updates(tmp_path / "run")]


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_an_estimator_without_a_critic_allocates_none(estimator, tmp_path, prompts):
    c = config(tmp_path / "run", prompts, advantage=estimator, rollout__samples_per_prompt=2)
    stage = PPO(c, resume=False, overwrite=False)
    assert stage.models.engine.module.critic is None
    figures = stage.update(0)
    assert "val/explained_variance" not in figures
    assert figures["loss/value"] == 0
    assert figures["optimizer/grad_norm"] > 0


def test_with_adapters_the_policy_without_them_is_the_reference(tmp_path, prompts):
    c = config(tmp_path / "run", prompts, tuning={"name": "lora", "rank": 4}, updates=2)
    stage = PPO(c, resume=False, overwrite=False)
    assert not stage.models.frozen
    before = {n: p.clone() for n, p in stage.models.engine.module.policy.named_parameters() if "lora" not in n}
    stage.train()
    first, second = updates(tmp_path / "run")
    assert first["objective/kl_k3"] == 0 and second["objective/kl_k3"] > 0
    after = dict(stage.models.engine.module.policy.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, stage.models.engine.module.policy(ids).logits, atol=1e-5, rtol=1e-4)


def test_while_the_critic_warms_up_only_it_learns(tmp_path, prompts):
    stage = PPO(config(tmp_path / "run", prompts, critic__warmup_updates=1), resume=False, overwrite=False)
    policy = [p.clone() for p in stage.models.engine.module.policy.parameters()]
    critic = [p.clone() for p in stage.models.engine.module.critic.parameters()]
    stage.update(0)
    assert all(torch.equal(a, b) for a, b in zip(policy, stage.models.engine.module.policy.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(critic, stage.models.engine.module.critic.parameters()))
    stage.update(1)
    assert not all(torch.equal(a, b) for a, b in zip(policy, stage.models.engine.module.policy.parameters()))


def test_the_ptx_term_adds_ptx_coef_times_the_mean_loss_on_demonstrations(tmp_path, prompts):
    """Equal rewards leave RLOO no advantage, so the gradient is that of the ptx term alone."""
    changes = {"advantage": "rloo", "rollout__samples_per_prompt": 2, "batch__epochs": 1, "batch__minibatches": 1}
    changes |= {"reward": {"name": "function", "function": "ppo_rewards:nothing"}}
    changes |= {"data__ptx": prompts, "loss__ptx_coef": 3.0, "loss__ptx_batch_size": 24}  # all of them
    c = config(tmp_path / "run", prompts, **changes)
    stage = PPO(c, resume=False, overwrite=False)
    model = AutoModelForCausalLM.from_pretrained(tiny.llama())
    total, count = torch.zeros(()), 0
    for row in tokenize(tmp_path, stage.chat, 128, DataConfig(train=[prompts]), "demonstration").train:
        logprobs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        answered = torch.tensor(row["labels"])[1:] != -100
        total = total - logprobs.gather(-1, torch.tensor(row["input_ids"])[1:, None])[answered].sum()
        count += int(answered.sum())
    (3 * total / count).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    found = stage.update(0)
    assert found["loss/ptx"] == pytest.approx(float(total) / count, rel=1e-4)
    assert found["optimizer/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_epochs_stop_after_the_first_whose_kl_is_above_the_target(tmp_path, prompts):
    def update(epochs, **more):
        folder = tmp_path / f"{epochs}-{more}"
        c = config(folder, prompts, batch__epochs=epochs, batch__minibatches=1, **more)
        return PPO(c, resume=False, overwrite=False).update(0)

    free = update(2)
    assert free["optimizer/epochs"] == free["optimizer/steps"] == 2
    second = 2 * free["policy/approx_kl"]  # a mean over two epochs, of which the first has a KL of 0
    assert second > 0
    assert update(3, loss__target_kl=0.99 * second)["optimizer/epochs"] == 2
    assert update(3, loss__target_kl=1.01 * second)["optimizer/epochs"] == 3
    assert update(3, loss__target_kl=1e-9)["optimizer/epochs"] == 2


def test_the_adaptive_controller_moves_the_coefficient(tmp_path, prompts):
    controller = {"name": "adaptive", "init_coef": 0.1, "target": 0.001, "horizon": 100}
    run(
        config(
            tmp_path / "run", prompts, kl__controller=controller, updates=3, rollout__max_new_tokens=6, eval__prompts=0
        )
    )
    lines = updates(tmp_path / "run")
    assert lines[0]["objective/kl_coef"] == 0.1
    for before, after in zip(lines, lines[1:]):  # Ziegler 2019: the error is cut at +- 0.2, 8 episodes of 100
        error = max(-0.2, min(0.2, before["objective/kl"] / 0.001 - 1))
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * (1 + error * 8 / 100))


def test_micro_batches_do_not_change_what_is_learned(tmp_path, prompts):
    results = []
    for tokens, packing in ((64, False), (10_000, False), (100, True), (10_000, True)):
        folder = tmp_path / f"{tokens}-{packing}"
        changes = {"batch__micro_batch_tokens": tokens, "batch__packing": packing, "optimizer__eps": 1e-3}
        c = config(folder, prompts, **changes)
        stage = PPO(c, resume=False, overwrite=False)
        stage.update(0)
        results.append([p.detach().clone() for p in stage.models.engine.module.parameters()])
    for first, *others in zip(*results):
        for other in others:
            torch.testing.assert_close(first, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # compiling takes most of the time
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tuning": "lora", "rollout__sampler": "transformers"},
        {"gradient_checkpointing": True, "advantage": "rloo", "rollout__samples_per_prompt": 2},
    ],
    ids=["full", "lora", "checkpointing"],
)
def test_compiled_layers_learn_the_same_under_the_same_names(changes, tmp_path, prompts):
    shaped = {"optimizer__policy_lr": 1e-4, "optimizer__critic_lr": 1e-4, "optimizer__eps": 1e-3, **changes}
    stages = {}
    for name, options in {"plain": shaped, "compiled": {"compile": True} | shaped}.items():
        stage = PPO(config(tmp_path / name, prompts, **options), False, False)
        figures = [stage.update(number) for number in range(2)]
        stages[name] = ([{k: v for k, v in f.items() if not k.startswith(TIMINGS)} for f in figures], stage)
    (plain, first), (compiled, second) = stages["plain"], stages["compiled"]
    for mine, theirs in zip(compiled, plain):
        noise = ("rollout/sampler_gap_mean", "rollout/sampler_gap_max")
        assert {k: v for k, v in mine.items() if k not in noise} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in noise}, rel=1e-4, abs=1e-5
        )
    weights = second.models.engine.module.state_dict()
    for name, weight in first.models.engine.module.state_dict().items():
        torch.testing.assert_close(weights.pop(name), weight, atol=1e-5, rtol=1e-5)
    assert not weights


def test_scores_can_be_normalised_over_the_run(tmp_path, prompts):
    stage = PPO(config(tmp_path / "run", prompts, shaping__normalize_scores=True), resume=False, overwrite=False)
    assert abs(stage.update(0)["objective/shaped_scores"]) < 1e-5
    assert stage.score_stats.count == 8


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tmp_path, prompts):
    stage = PPO(config(tmp_path / "run", prompts), resume=False, overwrite=False)
    stage.update(0)
    stage.models.engine.module.critic.model.score.weight.data.fill_(1e30)  # its squared error overflows
    before = [p.clone() for p in stage.models.engine.module.policy.parameters()]
    with pytest.raises(UserError, match=r"(?s)update 2, epoch 1, minibatch 1.*episodes"):
        stage.update(1)
    assert all(torch.equal(a, b) for a, b in zip(before, stage.models.engine.module.policy.parameters()))


def test_a_sum_of_rewards_is_weighted(tmp_path, prompts):
    terms = [{**REWARD, "weight": 2.0}, {"name": "function", "function": "ppo_rewards:one", "weight": -1.0}]
    plain = PPO(config(tmp_path / "a", prompts), resume=False, overwrite=False).update(0)
    both = config(tmp_path / "b", prompts, reward={"name": "sum", "terms": terms})
    assert PPO(both, resume=False, overwrite=False).update(0)["objective/scores"] == pytest.approx(
        2 * plain["objective/scores"] - 1, abs=1e-5
    )


def test_options_that_contradict_each_other_are_all_named(tmp_path, prompts):
    with pytest.raises(UserError) as caught:
        config(tmp_path, prompts, advantage="rloo", batch__minibatches=99, loss__ptx_coef=1.0)
    for words in ("samples_per_prompt", "minibatches", "ptx"):
        assert words in str(caught.value)


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"tuning": {"name": "lora", "rank": 2}}, marks=pytest.mark.slow),
        pytest.param({"advantage": "rloo", "rollout__samples_per_prompt": 2}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "rloo"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(changes, tmp_path, prompts):
    changes = {**changes, "kl__controller": {"name": "adaptive", "init_coef": 0.1, "target": 0.01, "horizon": 100}}
    changes |= {"shaping__normalize_scores": True, "updates": 4}
    run(config(tmp_path / "whole", prompts, **changes))
    broken = PPO(config(tmp_path / "cut", prompts, **changes), resume=False, overwrite=False)
    broken.evaluate()
    for number in range(3):  # stops after update 3, with the checkpoint of update 2
        broken.reporter.update(number + 1, broken.update(number))
        broken.done = number + 1
        if number == 1:
            broken.evaluate()
            broken.save()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "sco')  # the crash came in the middle of a line
    run(config(tmp_path / "cut", prompts, **changes), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "cut" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path, prompts, capsys):
    changes = {**SMALL, "updates": 3}
    run(config(tmp_path / "run", prompts, **changes))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    newest = tmp_path / "run" / "checkpoints" / "step-00000003" / "state-000-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    before = metrics(tmp_path / "run")
    run(config(tmp_path / "run", prompts, **changes), resume=True)
    assert "state-000-0.safetensors has 100 bytes" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == before


# ---- small parts ---------------------------------------------------------------------------------------------------


def test_moments_equal_those_of_all_values():
    a, b = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 8.0])
    found = RunningMeanStd().add(a).add(b)
    both = torch.cat([a, b])
    assert (found.count, found.mean) == (5, pytest.approx(4.2))
    assert found.std == pytest.approx(float(both.std(correction=0)))


def test_scores_without_spread_count_as_such_once_others_follow():
    first, second = torch.full((16,), 0.1), torch.tensor([0.0, 1.0] * 8)
    found = RunningMeanStd().add(first).add(first)
    assert (found.std, found.scale) == (0.0, 1.0)
    every = torch.cat([first, first, second])
    found = found.add(second)
    assert found.mean == pytest.approx(float(every.mean()))
    assert found.std == found.scale == pytest.approx(float(every.std(correction=0)))
    assert RunningMeanStd().scale == 1.0
