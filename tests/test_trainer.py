"""From a stage's config to the Trainer's arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.reward.config import RewardConfig
from rlhf.runs.run import Run
from rlhf.sft.config import SFTConfig
from rlhf.training.trainer import training_arguments


def arguments(tmp_path: Path, kind: Any = SFTConfig, **values: Any) -> Any:
    values = {"run": str(tmp_path), "model": {"path": "m"}, "data": {"train": "d"}, **values}
    return training_arguments(check_config(kind, values, "the test"), Run(tmp_path, "sft"))


@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig])
def test_a_batch_is_micro_batch_times_processes_times_accumulation(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, kind, batch={"batch_size": 48, "micro_batch_size": 8})
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 6)
    args = arguments(tmp_path, kind, batch={"batch_size": 4, "micro_batch_size": 8})
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for batch in ({"batch_size": 32, "micro_batch_size": 4}, {"batch_size": 33, "micro_batch_size": 4}):
        with pytest.raises(UserError, match=r"no multiple of 3 processes x batch\.micro_batch_size 4"):
            arguments(tmp_path, kind, batch=batch)
    with pytest.raises(UserError, match="no multiple"):
        arguments(tmp_path, kind, batch={"batch_size": 2, "micro_batch_size": 4})


def test_the_optimizer_is_the_configs(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        seed=7,
        precision="bfloat16",
        optimizer={"lr": 0.5, "schedule": "constant", "weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6},
    )
    assert (args.seed, args.data_seed, args.bf16) == (7, 7, True)
    assert (args.learning_rate, args.lr_scheduler_type) == (0.5, "constant_with_warmup")
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.1, 0.8, 0.9, 1e-6)
    assert args.max_grad_norm == 1.0 and args.report_to == []
    assert not arguments(tmp_path, precision="float32").bf16


def test_deepspeed_settings_follow_from_the_config(tmp_path: Path) -> None:
    assert arguments(tmp_path).deepspeed is None
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}))
    settings = arguments(tmp_path, deepspeed=str(file)).deepspeed
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_clipping"] == "auto"
    file.write_text(json.dumps({"train_batch_size": 7}))
    with pytest.raises(UserError, match="train_batch_size is 7"):
        arguments(tmp_path, deepspeed=str(file))
