"""The training loop of SFT and the reward model: batches, rates, what decays, checkpoints of other versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logged import lines
from sft_runs import run, settings
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer

from rlhf.config.base import BatchConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.models.load import load_policy
from rlhf.runs.run import Run
from rlhf.sft.config import SFTConfig
from rlhf.training.loop import Loop, supervised_engine
from stages import sft


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "demos", 40)


def config(tmp_path: Path, **values: Any) -> SFTConfig:
    values = {"run": str(tmp_path), "model": {"path": "m"}, "data": {"train": "d"}, **values}
    return check_config(SFTConfig, values, "the test")


def test_a_batch_is_micro_batch_times_processes_times_accumulation() -> None:
    assert BatchConfig(batch_size=48, micro_batch_size=8).micro_batches(1) == (8, 6)
    assert BatchConfig(batch_size=48, micro_batch_size=8).micro_batches(3) == (8, 2)
    assert BatchConfig(batch_size=4, micro_batch_size=8).micro_batches(1) == (4, 1)
    with pytest.raises(UserError, match=r"batch\.batch_size: 32 does not divide by 3(?s:.)*batch_size=30"):
        BatchConfig(batch_size=32).micro_batches(3)
    with pytest.raises(UserError, match="does not divide by 3"):
        BatchConfig(batch_size=2).micro_batches(3)
    with pytest.raises(UserError, match=r"11 records per process and step are no multiple of 4"):
        BatchConfig(batch_size=33, micro_batch_size=4).micro_batches(3)


class Rows(list):
    column_names = ("length",)

    def __getitem__(self, key: Any) -> Any:
        return list(self) if key == "length" else super().__getitem__(key)


def test_the_ranks_share_out_the_rows_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(tmp_path, batch={"batch_size": 12, "micro_batch_size": 2})
    module = nn.Linear(2, 2)
    engine = supervised_engine(c, module)
    objective = type("Nothing", (), {"means": ()})()
    micro = []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        loop = Loop(c, Run(tmp_path, "sft"), engine, objective, Rows(range(40)), held_out=False)
        micro.append(loop._micro_batches())
    assert [len(batches) for batches in micro] == [2, 2, 2]
    order = [row for pair in zip(*micro) for rows in pair for row in rows]
    assert order == loop.rows[0]
    assert loop.steps == 4


@pytest.mark.parametrize("schedule, after", [("constant", [1, 1]), ("linear", [1, 6 / 7])])
def test_the_rate_climbs_during_the_warmup(schedule: str, after: list[float], demos: str, tmp_path: Path) -> None:
    optimizer = {"lr": 0.25, "schedule": schedule, "warmup": 0.3}
    done = run(settings(demos, tmp_path / "run", optimizer=optimizer, eval={"every": 100, "samples": 0}))
    rates = [row["optimizer/lr"] for row in lines(done) if "optimizer/lr" in row]
    assert rates[:5] == pytest.approx([0.25 * scale for scale in (0, 1 / 3, 2 / 3, *after)])


SMALL = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, hidden_size=8, intermediate_size=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2)),
    "bert": lambda: BertModel(BertConfig(**SMALL, hidden_size=8, intermediate_size=8)),
}


@pytest.mark.parametrize("family", MODELS)
def test_what_decays_is_what_transformers_lets_decay(family: str, tmp_path: Path) -> None:
    model = MODELS[family]()
    c = config(
        tmp_path, precision="float32", optimizer={"weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "lr": 0.5}
    )
    groups = supervised_engine(c, model).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-6)


def test_a_deepspeed_file_must_leave_the_batch_to_the_config(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"train_batch_size": 7}))
    with pytest.raises(UserError, match="train_batch_size is 7"):
        supervised_engine(config(tmp_path, deepspeed=str(file)), nn.Linear(2, 2))


def test_a_checkpoint_of_an_earlier_version_is_refused_and_the_run_kept(demos: str, tmp_path: Path) -> None:
    done = run(settings(demos, tmp_path / "run"))
    before = lines(done)
    for folder in (done / "checkpoints").iterdir():
        (folder / "loop.json").rename(folder / "trainer_state.json")
        seal = folder / "complete.json"
        seal.write_text(seal.read_text().replace("loop.json", "trainer_state.json"))
    with pytest.raises(UserError, match="written by an earlier version"):
        run(settings(demos, tmp_path / "run"), resume=True)
    assert lines(done) == before


def test_activations_are_recomputed_where_the_config_says_so(demos: str, tmp_path: Path) -> None:
    calls = []
    for recompute in (False, True):
        c = check_config(SFTConfig, settings(demos, tmp_path / "run", gradient_checkpointing=recompute), "the test")
        module = sft.TokenPredictor(load_policy(c.model, tiny.llama()))
        engine, seen = supervised_engine(c, module), []
        module.train()
        layer = module.model.model.layers[0]
        layer.self_attn.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        chat = load_tokenizer(c.model, tiny.llama())
        batch = sft.token_batch([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}], chat, False)
        engine.backward(-engine.forward(batch, 1)[0].sum(), last=True)
        calls.append(sum(seen))
    assert calls[1] == calls[0] + 1
