"""Configs: reading, overrides, faults, and the reference that is generated from them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from rlhf.cli import config_docs
from rlhf.cli.compare_config import CompareConfig, ComparedTask, WayConfig
from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.cli.stage_configs import STAGES, TRAINING
from rlhf.config.load import RENAMED, check_config, dump_config, load_stage_config, override_values
from rlhf.core.errors import UserError
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.sft.config import SFTConfig

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))

SFT = {"run": "runs/a", "model": {"path": "base"}, "data": {"train": "demos"}}
REWARD = {"run": "runs/b", "model": {"path": "runs/a"}, "data": {"train": ["rankings"]}}
PPO = {
    "run": "runs/c",
    "model": {"path": "runs/a"},
    "data": {"prompts": "prompts"},
    "reward": {"name": "model", "path": "runs/b"},
}


def write(folder: Path, values: object) -> Path:
    file = folder / "config.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values), "utf-8")
    return file


def faults(kind: type, values: dict) -> str:
    with pytest.raises(UserError) as error:
        check_config(kind, values, "x.yaml")
    return str(error.value)


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "values"), [(SFTConfig, SFT), (RewardConfig, REWARD), (PPOConfig, PPO)])
def test_a_dumped_config_reads_back_as_the_same_config(tmp_path, kind, values):
    config = check_config(kind, values, "x")
    assert load_stage_config(kind, write(tmp_path, dump_config(config))) == config


def test_one_path_stands_for_a_list_of_one():
    assert check_config(SFTConfig, SFT, "x").data.train == ["demos"]


def test_all_faults_of_a_file_come_in_one_error():
    text = faults(SFTConfig, {"model": {"path": ""}, "data": {"trian": "a"}, "batch": {"batch_size": 0}, "seed": -1})
    assert text.startswith("x.yaml: 6 problems in the config")
    for key in ("run: missing", "model.path: ", "data.train: missing", "data.trian: unknown key", "batch.batch_size: "):
        assert f"- {key}" in text
    assert "did you mean 'train'?" in text


def test_faults_of_several_keys_together_come_in_one_error():
    text = faults(SFTConfig, SFT | {"optimizer": {"algorithm": "adafactor", "eps": 1e-6, "betas": (0.5, 0.9)}})
    assert "betas: 'adafactor' has no such setting" in text and "eps: 'adafactor' has no such setting" in text
    model, more = {"path": "m", "resize_embeddings": True}, {"tuning": "prefix-tuning", "gradient_checkpointing": True}
    text = faults(SFTConfig, SFT | {"model": model} | more)
    assert "model.resize_embeddings: prefix-tuning" in text and "gradient_checkpointing: does not work" in text


def test_a_fault_shows_the_value_that_stood_there():
    assert "got 1.5" in faults(SFTConfig, SFT | {"optimizer": {"warmup": 1.5}})


def test_an_unknown_key_is_refused_with_the_nearest_match_at_any_depth():
    assert "optimizer.lrr: unknown key; did you mean 'lr'?" in faults(SFTConfig, SFT | {"optimizer": {"lrr": 1}})


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_refused_with_its_new_name(old):
    kind, base = (PPOConfig, PPO) if old.startswith("update") else (SFTConfig, SFT)
    values = copy.deepcopy(base)
    override_values(values, [f"{old}=1"])
    where = "update" if kind is PPOConfig else old
    assert f"{where}: this key was renamed; write `{RENAMED[old]}` for `{old}`" in faults(kind, values)


def test_an_unknown_row_or_option_of_a_table_is_refused_with_the_valid_ones():
    assert "did you mean 'lora'?" in faults(SFTConfig, SFT | {"tuning": "lorra"})
    text = faults(PPOConfig, PPO | {"advantage": {"name": "gae", "lamb": 0.9}})
    assert "advantage: advantage estimator 'gae' has no option 'lamb'; did you mean 'lam'?" in text


@pytest.mark.parametrize("value", [".inf", ".nan", "-1", "0"])
def test_a_learning_rate_is_a_finite_number_above_zero(tmp_path, value):
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        load_stage_config(SFTConfig, write(tmp_path, SFT), [f"optimizer.lr={value}"])


def test_yaml_numbers_like_1e_5_are_numbers(tmp_path):
    assert load_stage_config(SFTConfig, write(tmp_path, SFT), ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "not valid YAML"),
        ("- a\n- b", "expected a mapping of keys, got list"),
        ("run: a\nseed: 1\nrun: b", "duplicate key 'run'"),
        ("1: 2", "a key that is not text"),
        ("", "missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused_readably(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_stage_config(SFTConfig, write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nope\.yaml: no such config file"):
        load_stage_config(SFTConfig, tmp_path / "nope.yaml")


# ---- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_take_the_place_of_values_and_reach_into_groups_that_the_file_leaves_out(tmp_path):
    words = ["seed=3", "batch.max_steps=7", "data.train=[a, b]", "data.max_eval_records=null"]
    config = load_stage_config(SFTConfig, write(tmp_path, SFT), words)
    assert (config.seed, config.batch.max_steps, config.data.train) == (3, 7, ["a", "b"])


def test_an_option_may_be_added_to_a_row_that_was_named_without_options(tmp_path):
    config = load_stage_config(SFTConfig, write(tmp_path, SFT | {"tuning": "lora"}), ["tuning.rank=3"])
    assert config.tuning.name == "lora" and config.tuning.options["rank"] == 3
    config = load_stage_config(SFTConfig, write(tmp_path, SFT), ["tuning=lora", "tuning.rank=4"])
    assert config.tuning.options["rank"] == 4


@pytest.mark.parametrize("word", ["seed", "=3", "batch..max_steps=3", "run.name=x=y", "seed=[", "data.train.0=a"])
def test_a_malformed_override_is_refused(tmp_path, word):
    with pytest.raises(UserError, match="override"):
        load_stage_config(SFTConfig, write(tmp_path, SFT | {"run": ["no group"], "data": {"train": ["a"]}}), [word])


# ---- what must fit together --------------------------------------------------------------------------------------


def test_ppo_names_every_contradiction_at_once():
    text = faults(
        PPOConfig,
        PPO
        | {
            "reward": {"name": "function", "function": "math:sqrt"},
            "rollout": {"prompts_per_update": 2},
            "batch": {"minibatches": 4},
            "loss": {"ptx_coef": 1.0},
        },
    )
    assert "batch.minibatches 4 is more than the 2 episodes" in text
    assert "critic.init: `reward` needs a reward model in the reward source" in text
    assert "loss.ptx_coef and data.ptx: set both or neither" in text


def test_a_group_baseline_needs_several_answers_to_a_prompt():
    assert "needs rollout.samples_per_prompt >= 2" in faults(PPOConfig, PPO | {"advantage": "rloo"})


@pytest.mark.parametrize(("kind", "values"), [(SFTConfig, SFT), (RewardConfig, REWARD), (PPOConfig, PPO)])
def test_virtual_tokens_are_for_every_stage_of_the_chain(kind, values):
    assert check_config(kind, values | {"tuning": "prompt-tuning"}, "x").tuning.name == "prompt-tuning"


def test_the_reward_model_is_found_inside_a_sum():
    terms = [{"name": "function", "function": "math:sqrt"}, {"name": "model", "path": "runs/b", "weight": 2}]
    assert check_config(PPOConfig, PPO | {"reward": {"name": "sum", "terms": terms}}, "x").reward_model == "runs/b"


def test_a_pipeline_has_something_to_do():
    assert "at least one of" in faults(PipelineConfig, {"name": "p"})
    assert "no policy to export" in faults(PipelineConfig, {"name": "p", "reward": "r.yaml", "export": "e"})
    assert check_config(PipelineConfig, {"name": "p", "dpo": "d.yaml", "export": "e"}, "x").dpo == "d.yaml"


def test_rounds_refuse_dpo():
    values = {"name": "p", "sft": "s.yaml", "reward": "r.yaml", "dpo": "d.yaml"}
    rounds = {"count": 1, "folder": "rounds/{round}", "prompts": "prompts"}
    assert "leave out dpo" in faults(PipelineConfig, values | {"rounds": rounds})


# ---- the files that come with the project, and the reference -----------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_every_config_that_comes_with_the_project_reads(file):
    stage = file.stem.partition("-")[0]  # ppo-shared.yaml; pipelines: pipeline.yaml, rounds.yaml
    kind = CompareConfig if file.parent.name == "compare" else STAGES.get(stage, PipelineConfig)
    load_stage_config(kind, file)


def test_the_config_reference_is_current():
    written = (REPOSITORY / "docs" / "config.md").read_text("utf-8")
    assert written == config_docs.document(), "run: python -m rlhf.cli.config_docs > docs/config.md"


@pytest.mark.parametrize("kind", [*TRAINING.values(), PipelineConfig, CompareConfig, ComparedTask, WayConfig])
def test_every_key_has_a_meaning(kind):
    assert [key for key, _, _, meaning in config_docs._keys(kind, {}) if not meaning] == []
