"""Preflight: every fault that can be found without weights, and what `--dry-run` prints."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from rlhf.cli.preflight import check
from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import check_config, dump_config
from rlhf.core.errors import UserError
from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.schema import SCHEMA_VERSION
from rlhf.distributed.deepspeed_json import read_deepspeed
from rlhf.runs.checkpoint import Checkpoints

REPOSITORY = Path(__file__).resolve().parents[1]


def make_run(folder: Path, stage: str, **values: object) -> str:
    """What a run leaves for its children to check: run.json, and the model's config."""
    (folder / "model").mkdir(parents=True)
    info = {"stage": stage, "status": "complete", "schema_version": SCHEMA_VERSION, "model_fingerprint": "f"}
    info |= {"tokenizer": "t", "chat_template": "c", **values}
    (folder / "run.json").write_text(json.dumps(info), "utf-8")
    (folder / "model" / "config.json").write_text('{"max_position_embeddings": 256}', "utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets of 40 and 8 held-out records."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "demonstrations": tiny.write_demonstrations(folder / "demonstrations", 40),
        "rankings": tiny.write_rankings(folder / "rankings", 40),
    }


@pytest.fixture
def world(tmp_path, data):
    """Datasets, a base model, and finished runs of the first two stages."""
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 256}', "utf-8")
    return data | {
        "base": str(model),
        "sft": make_run(tmp_path / "sft", "sft"),
        "reward": make_run(tmp_path / "reward", "reward"),
        "run": str(tmp_path / "run"),
    }


def config(stage: str, world: dict, **changes: object):
    values: dict = {"run": world["run"]}
    if stage == "sft":
        values |= {"model": {"path": world["base"]}, "data": {"train": world["demonstrations"]}}
    elif stage == "reward":
        values |= {"model": {"path": world["sft"]}, "data": {"train": world["rankings"]}}
    else:
        values |= {"model": {"path": world["sft"]}, "data": {"prompts": world["rankings"]}}
        values |= {"reward": {"name": "model", "path": world["reward"]}}
    return check_config(STAGES[stage], values | changes, "test")


def checks(stage: str, world: dict, processes: int | None = None, **changes: object) -> dict[str, str]:
    return dict(check(stage, config(stage, world, **changes), False, False, processes))


def refusal(stage: str, world: dict, processes: int | None = None, **changes: object) -> str:
    with pytest.raises(UserError) as error:
        checks(stage, world, processes, **changes)
    return str(error.value)


# ---- rows of the preflight table ---------------------------------------------------------------------------------


def test_the_plan_of_sft_counts_records_and_steps_from_the_manifest(world):
    rows = checks("sft", world, 2, batch={"batch_size": 8, "micro_batch_size": 2, "epochs": 3})
    assert rows["data.train"].endswith("demonstrations: 40 train, 8 eval")
    assert rows["held out"].startswith("8 records")
    assert rows["steps"].startswith("about 15")
    assert rows["batch"].startswith("8 records a step = 2 x 2 x 2")
    assert rows["processes"] == "2, ZeRO stage 0"


def test_the_plan_of_ppo_names_parents_episodes_and_optimizer_steps(world):
    rows = checks("ppo", world, updates=5, rollout={"prompts_per_update": 8, "samples_per_prompt": 2})
    assert rows["policy"] == f"{world['sft']} (finished sft run)"
    assert rows["reward"] == f"{world['reward']} (finished reward run)"
    assert rows["critic"] == "from the reward model, full"
    assert rows["episodes per update"] == "16 = 8 prompts x 2 answers"
    assert rows["optimizer steps"].startswith("80 (16 an update")


def test_what_only_looks_on_is_planned_and_checked_as_the_reward_is(world, tmp_path):
    judge = {"name": "function", "function": "ppo_rewards:letters"}
    gold, watch = {"reward": judge}, {"watch": {"name": "model", "path": world["reward"]}}
    rows = checks("ppo", world, gold=gold, guard=watch)
    assert rows["gold.reward"] == "function ppo_rewards:letters"
    assert rows["guard.watch"] == f"{world['reward']} (finished reward run)"
    other = make_run(tmp_path / "other", "reward", tokenizer="other")
    assert "tokenizer" in refusal("ppo", world, guard={"watch": {"name": "model", "path": other}})
    assert "gold.reward" in refusal("ppo", world, gold={"reward": {"name": "model", "path": str(tmp_path / "none")}})


def test_a_critic_free_estimator_plans_no_critic(world):
    assert checks("ppo", world, advantage="rloo", rollout={"samples_per_prompt": 2})["critic"] == "none"


def test_a_hub_name_is_said_to_be_unchecked(world):
    assert checks("sft", world, model={"path": "org/name"})["model"] == "org/name (not checked: hub)"


def test_the_parameters_of_a_local_model_are_counted_from_its_file_headers(world):
    assert "320 parameters" not in checks("sft", world)["model"]
    rows = checks("sft", world, model={"path": tiny.llama()})
    # embeddings 320 x 32, two layers of attention, feed-forward and two norms, the last norm
    assert f"{320 * 32 + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32) + 32:,} parameters" in rows["model"]


def test_a_jsonl_dataset_is_taken_without_being_counted(world, tmp_path):
    file = tmp_path / "demos.jsonl"
    file.write_text('{"prompt": "Hello", "answer": "Good day."}\n', "utf-8")
    rows = checks("sft", world, data={"train": str(file)})
    assert "counted when it is read" in rows["data.train"] and rows["steps"] == "1 epochs"


def test_rankings_serve_sft_as_their_best_answers(world):
    assert "rankings: 40 train" in checks("sft", world, data={"train": world["rankings"]})["data.train"]


# ---- run folder --------------------------------------------------------------------------------------------------


def interrupted(world: dict, step: int | None = None) -> None:
    """A run folder as a killed run leaves it."""
    folder = Path(world["run"])
    make_run(folder, "sft", status="running")
    (folder / "config.yaml").write_text(dump_config(config("sft", world)), "utf-8")
    if step is not None:
        with Checkpoints(folder / "checkpoints", 2).write(step) as place:
            (place / "weights").write_bytes(b"x")


def test_a_taken_run_folder_is_refused_and_both_ways_on_are_named(world):
    interrupted(world)
    text = refusal("sft", world)
    assert "already holds a run" in text and "--resume" in text and "--overwrite" in text


@pytest.mark.parametrize(("step", "expected"), [(None, "starts from the beginning"), (30, "continues after step 30")])
def test_resume_says_from_where_it_continues(world, step, expected):
    interrupted(world, step)
    assert expected in dict(check("sft", config("sft", world), True, False))["run"]


def test_resume_with_another_config_is_refused_with_the_keys_that_differ(world):
    interrupted(world)
    with pytest.raises(UserError, match="seed: was 0, now 7"):
        check("sft", config("sft", world, seed=7), True, False)


def test_a_run_is_continued_by_another_number_of_processes(world):
    interrupted(world, 30)
    found = dict(check("sft", config("sft", world), True, False, processes=2))
    assert "continues after step 30" in found["run"] and found["processes"].startswith("2")


def test_a_folder_that_is_no_run_is_never_overwritten(world):
    Path(world["run"]).mkdir()
    (Path(world["run"]) / "thesis.tex").write_text("x", "utf-8")
    with pytest.raises(UserError, match="is not a run"):
        check("sft", config("sft", world), False, True)


# ---- parents -----------------------------------------------------------------------------------------------------


def test_an_unfinished_parent_is_refused(world, tmp_path):
    parent = make_run(tmp_path / "half", "sft", status="running")
    text = refusal("reward", world, model={"path": parent})
    assert "model.path" in text and "not finished" in text and "--resume" in text


def test_a_parent_of_the_wrong_stage_is_refused(world):
    assert "is a run of the reward stage" in refusal("ppo", world, model={"path": world["reward"]})
    text = refusal("ppo", world, reward={"name": "model", "path": world["sft"]})
    assert "reward.path" in text and "is a run of the sft stage" in text


def test_a_parent_of_another_schema_version_is_refused(world, tmp_path):
    parent = make_run(tmp_path / "old", "sft", schema_version=SCHEMA_VERSION + 1)
    assert "schema version" in refusal("reward", world, model={"path": parent})


def test_a_parent_that_holds_only_an_adapter_is_refused(world):
    config_file = Path(world["sft"]) / "model" / "config.json"
    config_file.rename(config_file.with_name("adapter_config.json"))
    assert "adapter" in refusal("reward", world)


def test_a_missing_model_folder_is_refused(world):
    assert "no such run, model or file" in refusal("sft", world, model={"path": "./nowhere"})


@pytest.mark.parametrize("key", ["tokenizer", "chat_template"])
def test_a_reward_run_of_another_tokenizer_or_template_is_refused(world, tmp_path, key):
    other = make_run(tmp_path / "other", "reward", **{key: "other"})
    text = refusal("ppo", world, reward={"name": "model", "path": other})
    assert key.replace("_", " ") in text and "retokenize" in text


def test_a_reward_run_of_another_tokenizer_may_retokenize_but_not_start_the_critic(world, tmp_path):
    other = make_run(tmp_path / "other", "reward", tokenizer="other")
    reward = {"name": "model", "path": other, "retokenize": True}
    assert "tokenizer" in refusal("ppo", world, reward=reward)
    checks("ppo", world, reward=reward, critic={"init": "policy"})


def test_a_template_that_the_config_changes_is_compared_too(world, tmp_path):
    text = TEMPLATES["plain"]
    same = make_run(tmp_path / "same", "reward", chat_template=hashlib.sha256(text.encode()).hexdigest()[:16])
    model = {"path": world["sft"], "chat_template": "plain"}
    checks("ppo", world, model=model, reward={"name": "model", "path": same})
    assert "chat template" in refusal("ppo", world, model=model)


def test_parents_that_a_pipeline_is_going_to_make_need_not_exist(world):
    pending = {"runs/one": "sft", "./runs/two": "reward"}
    ppo = config("ppo", world, model={"path": "runs/one/"}, reward={"name": "model", "path": "runs/two"})
    rows = dict(check("ppo", ppo, False, False, pending_runs=pending))
    assert rows["policy"] == "runs/one/ (to come: sft run)" and rows["reward"] == "runs/two (to come: reward run)"
    with pytest.raises(UserError, match="run of the sft stage"):
        check("ppo", ppo, False, False, pending_runs=pending | {"runs/two": "sft"})


# ---- data, batches, lengths, DeepSpeed ---------------------------------------------------------------------------


def test_a_dataset_of_the_wrong_kind_is_refused(world):
    text = refusal("reward", world, data={"train": world["demonstrations"]})
    assert text.startswith("data.train: ") and "contains demonstrations, but rankings are needed" in text


def test_a_missing_dataset_is_refused_with_its_key(world):
    assert refusal("sft", world, data={"train": "datasets/nope"}).startswith("data.train: datasets/nope")
    text = refusal("sft", world, data={"train": world["demonstrations"], "eval": "datasets/nope"})
    assert text.startswith("data.eval: datasets/nope")


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_dataset_with_a_flipped_bit_is_refused(world, tmp_path, key):
    shard = Path(tiny.write_demonstrations(tmp_path / "flipped", 8)) / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    text = refusal("sft", world, data={"train": world["demonstrations"], key: str(shard.parent)})
    assert text.startswith(f"data.{key}: {shard}: damaged: its SHA-256 differs")


def test_a_dataset_with_nothing_to_train_on_is_refused(world, tmp_path):
    empty = tiny.write_demonstrations(tmp_path / "held-out", 0)
    assert "no record to train on" in refusal("sft", world, data={"train": empty})


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(world):
    assert "batch.batch_size=30" in refusal("sft", world, 3)
    assert "batch.micro_batch_size=4" in refusal("sft", world, 1, batch={"batch_size": 32, "micro_batch_size": 12})


def test_lengths_beyond_the_models_positions_are_refused(world):
    assert "256 positions" in refusal("sft", world, model={"path": world["base"], "max_length": 257})
    assert "leaves no room for a prompt" in refusal("ppo", world, rollout={"max_new_tokens": 256})


def test_a_tuning_method_whose_package_is_not_installed_is_refused(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "needs bitsandbytes" in refusal("sft", world, tuning="qlora")


def test_compiled_layers_are_refused_under_zero_3_alone(world, monkeypatch):
    files = {stage: str(tiny.REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json") for stage in (2, 3)}
    checks("ppo", world, 2, compile=True, deepspeed=files[2])
    assert "ZeRO stage 3" in refusal("ppo", world, 2, compile=True, deepspeed=files[3])
    steps = {"sampler": {"name": "hf", "step": "cuda_graph"}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as on a machine with a GPU
    assert checks("ppo", world, 2, rollout=steps, deepspeed=files[2])["sampler"] == "hf, step cuda_graph"
    assert "step `cuda_graph`: compiled or recorded" in refusal("ppo", world, 2, rollout=steps, deepspeed=files[3])


def test_a_sampler_whose_package_or_device_is_missing_is_refused(world):
    assert checks("ppo", world)["sampler"] == "hf"
    assert checks("ppo", world, rollout={"sampler": "transformers"})["sampler"] == "transformers"
    recorded = {"sampler": {"name": "hf", "step": "cuda_graph"}}
    if not torch.cuda.is_available():
        assert "step `cuda_graph` needs a CUDA device" in refusal("ppo", world, rollout=recorded)
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    text = refusal("ppo", world, rollout={"sampler": "vllm"})
    assert text.startswith("rollout.sampler: vllm") and "hf" in text


def test_a_sampler_server_that_cannot_work_is_refused(world, monkeypatch):
    server = {"name": "vllm-server", "url": "http://127.0.0.1:9"}
    assert "tensor_parallel cannot be set with url" in refusal(
        "ppo", world, rollout={"sampler": server | {"tensor_parallel": 2}}
    )
    monkeypatch.delenv("RLHF_SAMPLER_TOKEN", raising=False)
    assert "RLHF_SAMPLER_TOKEN is not set" in refusal("ppo", world, rollout={"sampler": server})
    monkeypatch.setenv("RLHF_SAMPLER_TOKEN", "secret")
    assert "http://127.0.0.1:9 does not answer" in refusal("ppo", world, rollout={"sampler": server})
    elsewhere = {"name": "vllm-server", "python": "/nowhere/python"}
    assert "/nowhere/python has no vLLM" in refusal("ppo", world, rollout={"sampler": elsewhere})


def test_a_chat_template_that_is_neither_a_name_nor_a_file_is_refused(world):
    assert "neither auto" in refusal("sft", world, model={"path": world["base"], "chat_template": "chatml"})


def test_a_tracker_that_is_not_installed_is_refused(world):
    assert "trackio is not installed" in refusal("sft", world, log={"report_to": ["trackio"]})


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json")), ids=lambda f: f.stem)
def test_every_deepspeed_file_that_comes_with_the_project_is_accepted(world, file):
    assert checks("sft", world, 2, deepspeed=str(file))["processes"] == f"2, ZeRO stage {file.stem[4]} ({file})"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "deepspeed: "),
        ([], "expected a JSON object"),
        ({"zero_optimization": {"stage": 4}}, "`stage` of 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "`stage` of 0, 1, 2 or 3"),
        ({"train_batch_size": 8}, "train_batch_size is 8"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is"),
        ({"bf16": {"enabled": True}}, "set `precision`"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_config_is_refused(tmp_path, settings, message):
    file = tmp_path / "zero.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings), "utf-8")
    with pytest.raises(UserError, match=message):
        read_deepspeed(file)


def test_a_deepspeed_file_that_is_missing_is_refused(world):
    assert "deepspeed: nope.json" in refusal("sft", world, deepspeed="nope.json")
