"""What each process privately holds while a model of 187 million parameters is loaded, built and saved divided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = pytest.mark.slow

SHARD = 100_000_000
"""Bytes of a file of weights, read or written."""
PROGRAM = "import sys; sys.path.append('benchmarks'); import loading_side; loading_side.main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[str, int]:
    """Folder of a Llama in bfloat16 and the number of its parameters. Loading does not depend on their values."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=16_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return written(tmp_path_factory.mktemp("model"), config)


def written(folder: Path, config) -> tuple[str, int]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    weights = {name: torch.full(value.shape, 0.01, dtype=torch.bfloat16) for name, value in made.state_dict().items()}
    made.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder), made.num_parameters()


def measured(folder: Path, processes: int, stage: str, config: dict, resume: bool = False) -> list[dict[str, int]]:
    """Highest private bytes by phase of each rank: `weights` (until an engine), `engine`, `save`, ... and `built`."""
    name = f"{stage}{'-resumed' * resume}"
    spec = {"stage": stage, "config": config, "resume": resume, "shard_bytes": SHARD, "result": str(folder / name)}
    (folder / "spec.json").write_text(json.dumps(spec))
    done = tiny.launch(processes, PROGRAM, str(folder / "spec.json"))
    assert done.returncode == 0, done.stdout
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


def predicted(stage: str, config: dict, processes: int) -> float:
    """What `rlhf plan` predicts for the phase `load` on a CPU, where the host's memory is all there is; bytes."""
    from rlhf.cli.stage_configs import STAGES
    from rlhf.config.load import check_config
    from rlhf.memory.cpu_range import predicted as predict

    checked = check_config(STAGES[stage], config, "test")
    return predict(checked, checked.precision == "bfloat16", processes, 64, 2).phases["load"].total


def highest(ranks: list[dict[str, int]]) -> int:
    """Highest private bytes of a rank until the last engine is built."""
    return max(max(rank["weights"], rank["engine"]) for rank in ranks)


def values(folder: Path, model: str, zero: int, **more) -> dict:
    file = tiny.REPOSITORY / "configs" / "deepspeed" / f"zero{zero}.json"
    chosen = {"path": model, "chat_template": "plain"}
    return {"run": str(folder / "run"), "model": chosen, "deepspeed": str(file)} | more


def share(parameters: int, trained: int, width: int, processes: int) -> float:
    """A rank's bytes of an engine under ZeRO-3: weights, float32 masters and gradients."""
    return (width * parameters + (4 + width) * trained) / processes


def test_sft_divides_from_the_first_byte_and_so_does_its_resume_and_save(tmp_path, model):
    folder, count = model
    demonstrations = tiny.write_demonstrations(tmp_path / "demos", 12)
    batch = {"batch_size": 4, "micro_batch_size": 1, "max_steps": 1}
    config = values(tmp_path, folder, 3, data={"train": demonstrations}, batch=batch, precision="bfloat16")
    mine = share(count, count, 2, processes=4)
    for resume in (False, True):
        ranks = measured(tmp_path, 4, "sft", config, resume)
        if not resume:
            assert predicted("sft", config, 4) == pytest.approx(highest(ranks), rel=0.25)
        for rank in ranks:
            assert rank["built"] <= 1.1 * mine + 20e6
            assert max(rank["weights"], rank["engine"]) <= 1.1 * (mine + SHARD)
            assert rank["save"] <= 1.1 * (mine + 2 * SHARD)
            if resume:  # the optimizer's moments come with the checkpoint
                assert rank["resume"] <= 1.1 * (mine + 8 * count / 4 + SHARD)


def test_ppo_divides_all_of_its_models(tmp_path, model, monkeypatch):
    monkeypatch.syspath_prepend(tiny.REPOSITORY / "benchmarks")  # where the reward function is
    folder, count = model
    config = values(
        tmp_path, folder, 3, precision="float32", tuning={"name": "lora", "rank": 4}, updates=1,
        data={"prompts": tiny.write_demonstrations(tmp_path / "demos", 12), "max_prompt_tokens": 32},
        reward={"name": "function", "function": "loading_side:reward"},
        critic={"init": "policy", "tuning": {"name": "last-layers", "layers": 1}},
        rollout={"prompts_per_update": 4, "max_new_tokens": 8},
    )  # fmt: skip
    trained = 15e6
    ranks = measured(tmp_path, 2, "ppo", config)
    assert predicted("ppo", config, 2) == pytest.approx(highest(ranks), rel=0.25)
    for rank in ranks:
        mine = share(2 * count, trained, 4, processes=2)
        assert max(rank["weights"], rank["engine"]) <= 1.1 * (mine + SHARD)
        assert rank["save"] <= 1.1 * (mine + 2 * SHARD)


@pytest.mark.parametrize("tuning", ["full", {"name": "lora", "rank": 4}], ids=["full", "lora"])
def test_experts_that_transformers_puts_together_are_divided_and_saved_layer_by_layer(tuning, tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=8_000, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, num_experts=16, num_experts_per_tok=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder, count = written(tmp_path / "experts", config)
    demonstrations = tiny.write_demonstrations(tmp_path / "demos", 12)
    config = values(
        tmp_path, folder, 3, data={"train": demonstrations}, tuning=tuning, precision="float32",
        batch={"batch_size": 2, "micro_batch_size": 1, "max_steps": 1},
    )  # fmt: skip
    assert 2 * count > 2e8, "bytes of the file, far more than the limit leaves for a copy"
    trained = count if tuning == "full" else 3.2e6
    limit = 1.1 * (share(count, trained, 4, processes=2) + SHARD)
    layer = 4 * 16 * 3 * 512 * 256  # bytes of its experts
    for rank in measured(tmp_path, 2, "sft", config):
        assert max(rank["weights"], rank["engine"]) <= limit - 1.1 * SHARD / 2
        # DeepSpeed gathers the trained weights one by one: the largest, two thirds of a layer, and the transport's copy
        assert rank["engine"] <= rank["built"] + 2 * layer
        # an adapter is merged into copies of a layer's experts, on the device, which is the host here
        assert rank["save"] <= limit + (0 if tuning == "full" else 5 * layer)
    files = [file.stat().st_size for file in (tmp_path / "run" / "model").glob("*.safetensors")]
    assert len(files) > 3 and max(files) <= 1.05 * SHARD and sum(files) > 4 * count


@pytest.mark.parametrize(("tuning", "processes"), [("full", 4), ({"name": "lora", "rank": 4}, 2)], ids=["full", "lora"])
def test_below_stage_3_a_process_holds_one_copy_of_the_weights(tuning, processes, tmp_path, model):
    folder, count = model
    demonstrations = tiny.write_demonstrations(tmp_path / "demos", 12)
    config = values(
        tmp_path, folder, 2, data={"train": demonstrations}, tuning=tuning, precision="float32",
        batch={"batch_size": processes, "micro_batch_size": 1, "max_steps": 1},
    )  # fmt: skip
    divided = 8 * count / processes if tuning == "full" else 0  # float32 masters and their gradients
    for rank in measured(tmp_path, processes, "sft", config):
        assert 4 * count <= max(rank["weights"], rank["engine"]) <= 1.1 * (4 * count + divided + SHARD)
