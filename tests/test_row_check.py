"""`--dry-run` and `rlhf data check --model` find the records that a chat template refuses; stages reject them."""

from __future__ import annotations

import json
from pathlib import Path

import finished
import ppo_runs
import pytest
import tiny
from transformers import AutoTokenizer

from data_tools.commands.check import check_command
from rlhf.cli import entry
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.row_check import row_check
from rlhf.data.schema import Demonstration, Message
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.inference.policy import open_policy
from rlhf.inference.sampling import accepted
from rlhf.inference.scorer import open_scorer
from rlhf.models.scalar import load_scalar
from rlhf.runs.run import read_run
from rlhf.sft.config import SFTConfig
from stages import ppo, sft

REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
OK = Demonstration((Message("user", "Name a fruit."),), answer="A pear.", split="train")
SPELLED = Demonstration((Message("user", "Strike it out."),), answer="<s>it</s>", split="train")
SYSTEM = Demonstration((Message("system", "Be brief."), Message("user", "Hello.")), answer="Hi.", split="train")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The tiny model with a template that refuses system turns."""
    folder = tmp_path / "gemma"
    _copy(tiny.llama(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = REFUSING + finished.CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def _copy(source: str, folder: Path) -> None:
    folder.mkdir()
    for file in Path(source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    lines = [{"messages": [m._asdict() for m in r.messages], "answer": r.answer} for r in (OK, SPELLED, SYSTEM)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_refused_records_are_counted_with_their_place(model: str) -> None:
    check = row_check(model)
    check.add([OK, SPELLED, SYSTEM, SYSTEM], "rows")
    assert (check.records, check.spelled, len(check.counts.refused)) == (4, 1, 2)
    said = check.describe()
    assert "accepts 2 of 4" in said and SYSTEM.prompt_id in said and "System role not supported" in said
    strict = row_check(model, control_tokens_in_text="reject")
    strict.add([OK, SPELLED], "rows")
    assert strict.counts.refused[0]["prompt_id"] == SPELLED.prompt_id


def test_a_dry_run_finds_the_records_that_training_rejects(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"run": str(tmp_path / "run"), "model": {"path": model}, "data": {"train": rows}}
    values |= {"batch": {"max_steps": 1, "batch_size": 1, "micro_batch_size": 1}}
    (tmp_path / "sft.yaml").write_text(json.dumps(values))
    assert entry.prepare("sft", tmp_path / "sft.yaml", dry_run=True) is None
    assert "accepts 2 of 3 records" in " ".join(capsys.readouterr().out.split())
    sft.run(SFTConfig.model_validate(values))
    warned = capsys.readouterr().err
    assert "1 demonstrations rejected" in warned and SYSTEM.prompt_id in warned
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert SYSTEM.prompt_id in [row.get("prompt_id") for row in rejected]
    assert read_run(tmp_path / "run")["status"] == "complete"


def test_a_refused_record_is_named_by_its_line_or_its_row(model: str, rows: str, tmp_path: Path) -> None:
    check = row_check(model)
    check.add(open_dataset(rows).records(), "rows")
    assert f"the first at {rows}:3, record {SYSTEM.id}, prompt {SYSTEM.prompt_id}: " in check.describe()
    with DatasetWriter(tmp_path / "data", "demonstration") as writer:
        for record in (OK, SYSTEM):
            writer.write(record)
    whole = row_check(model)
    whole.add(open_dataset(tmp_path / "data").records("train"), "rows")
    assert whole.counts.refused[0]["place"].endswith(".parquet:2")
    assert whole.counts.refused[0]["id"] == SYSTEM.id


def test_prompts_that_a_retokenizing_reward_models_template_refuses_are_rejected_before_the_training(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scalar = load_scalar(ModelConfig(path=model), model)
    scalar.set_scale(0.0, 1.0)
    scalar.model.save_pretrained(tmp_path / "scorer")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "scorer")
    prompts = tmp_path / "prompts.jsonl"
    records = [OK, SYSTEM, *(Demonstration((Message("user", f"Name {i} fruits."),), answer="No.") for i in range(3))]
    prompts.write_text("".join(json.dumps({"messages": r.chat, "split": "train"}) + "\n" for r in records))
    scorer = {"name": "model", "path": str(tmp_path / "scorer"), "retokenize": True}
    reward = {"name": "sum", "terms": [scorer, ppo_runs.REWARD]}
    made = ppo_runs.config(tmp_path / "ppo", str(prompts), reward=reward, rollout__prompts_per_update=4, updates=1)
    (tmp_path / "ppo.yaml").write_text(json.dumps(made.model_dump(mode="json")))
    assert entry.prepare("ppo", tmp_path / "ppo.yaml", dry_run=True) is None
    said = " ".join(capsys.readouterr().out.split())
    assert "accepts 5 of 5 records" in said and "accepts 4 of 5 records" in said
    ppo.run(made)
    assert f"1 prompts rejected, the first at {prompts}:2, record {SYSTEM.prompt_id}: " in capsys.readouterr().err
    rejected = [json.loads(line) for line in (tmp_path / "ppo" / "rejected.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rejected if "place" in row] == [f"{prompts}:2"]
    policy = open_policy(tiny.llama())
    assert accepted(policy, [OK, SYSTEM], open_scorer(scorer["path"], policy).own_chats) == [OK]


def test_prompts_that_the_template_refuses_are_left_out_of_sampling(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = open_policy(model)
    assert accepted(policy, [OK, SYSTEM]) == [OK]
    assert SYSTEM.prompt_id in capsys.readouterr().err
    with pytest.raises(UserError, match="System role not supported"):
        accepted(policy, [SYSTEM])


def test_data_check_names_the_records_that_the_template_of_a_model_refuses(
    model: str, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_command(Path(rows), no_near=True, model=model, as_json=True)
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])["chat_template"]
    assert (found["records"], found["spelled"]) == (3, 1)
    assert [row["prompt_id"] for row in found["refused"]] == [SYSTEM.prompt_id]
    assert "accepts 2 of 3 records" in said
