"""`from rlhf import ...`, `rlhf score`, and the page that shows them."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import finished
import pytest
import tiny
from documentation import DOCS, blocks

import rlhf
from rlhf import Candidate, Message, Prompt, Proposal, Ranking, UserError
from rlhf.data.schema import Record
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from stages.library import train_ppo, train_sft
from stages.score import command


def written(path: Path, *records: Record) -> Path:
    with DatasetWriter(path, None) as writer:
        for record in records:
            writer.write(record)
    return path


CONFIG = {"batch": {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2}}


def test_importing_the_package_imports_no_torch_and_every_name_is_there():
    code = "import sys, rlhf; assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules; print(rlhf.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tiny.REPOSITORY)
    for name in eval(done.stdout):
        assert getattr(rlhf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'train_all'"):
        rlhf.train_all  # noqa: B018


@pytest.mark.parametrize(("importing", "found"), [(True, False), (False, True)])
def test_peft_imports_no_bitsandbytes_before_a_quantized_model_does(importing, found, tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    helpers = SimpleNamespace(__spec__=SimpleNamespace(_initializing=importing))
    monkeypatch.setitem(sys.modules, "peft.helpers", helpers)
    if found:
        assert importlib.util.find_spec("bitsandbytes") is not None
    else:
        with pytest.raises(ModuleNotFoundError):
            importlib.util.find_spec("bitsandbytes")


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(DOCS / "library.md", "python")).replace("Qwen/Qwen2.5-0.5B", tiny.llama())
    (tmp_path / "notebook.py").write_text(code)
    environment = {"PYTHONPATH": str(tiny.REPOSITORY), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "notebook.py"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "objective/scores" in done.stdout
    assert {file.name for file in (tmp_path / "runs").iterdir()} >= {"my-sft", "my-sft-data", "my-ppo", "my-reward"}


# ---- training from objects -----------------------------------------------------------------------------------------


def test_records_are_saved_next_to_the_run_which_goes_on_with_them(tmp_path, demonstrations):
    config = CONFIG | {"run": str(tmp_path / "run"), "model": {"path": tiny.llama()}}
    run = train_sft(config, demonstrations)
    assert sys.float_info.min / 2 > 0  # a stage flushes denormal numbers to zero while it runs
    saved = open_dataset(f"{run}-data/train")
    assert list(saved.records()) == demonstrations
    with pytest.raises(UserError, match="already holds a run"):
        train_sft(config, demonstrations[:2])
    assert list(open_dataset(f"{run}-data/train").records()) == demonstrations
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert train_sft(config, demonstrations, resume=True) == run
    assert open_dataset(f"{run}-data/train").fingerprint == saved.fingerprint
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="started with other records"):
        train_sft(config, demonstrations[:2], resume=True)
    assert open_dataset(f"{run}-data/train").fingerprint == saved.fingerprint
    assert [path.name for path in Path(f"{run}-data").iterdir()] == ["train"]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return list(open_dataset(tiny.write_demonstrations(tmp_path_factory.mktemp("demos"), 8)).records())


def test_a_reward_without_a_name_is_refused_before_anything_is_loaded(tmp_path, demonstrations):
    with pytest.raises(UserError, match="cannot be imported by its name"):
        train_ppo({"run": str(tmp_path / "run")}, demonstrations, reward=lambda messages, text: 0.0)


def test_without_a_run_folder_nothing_is_written(tmp_path, demonstrations, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run: missing"):
        train_sft({"model": {"path": tiny.llama()}}, demonstrations)
    assert not list(tmp_path.iterdir())


def test_a_typo_in_a_config_names_the_function(tmp_path, demonstrations):
    with pytest.raises(UserError, match=r"train_sft: 1 problem in the config\n.*did you mean 'max_length'"):
        train_sft({"run": str(tmp_path / "run"), "model": {"path": tiny.llama(), "max_lenth": 8}}, demonstrations)


# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return finished.reward(tmp_path_factory.mktemp("reward") / "run")


def test_scores_are_those_of_the_model_alone_normalised_and_in_order(reward_model):
    model = rlhf.open_reward_model(reward_model)
    prompts = ["What colour is the cat?", [{"role": "user", "content": "Who lives in the tree?"}]]
    answers = ["The cat is red.", "An owl."]
    model.scalar.set_scale(0.5, 2.0)
    scores = model.score_answers(prompts, answers)
    for prompt, answer, score in zip([Prompt((Message("user", prompts[0]),)).chat, prompts[1]], answers, scores):
        ids, mask = model.chat.pad([model.chat.whole(prompt, answer)])
        assert float(model.scalar(ids, mask)) == pytest.approx(score, abs=1e-5)


def test_an_answer_that_does_not_fit_has_no_score(reward_model):
    model = rlhf.open_reward_model(reward_model)
    one, none, other = model.score_answers(["Hi"] * 3, ["Yes.", "no " * 500, "Yes."])
    assert none is None and one == pytest.approx(other, abs=1e-6)
    with pytest.raises(UserError, match="2 prompts for 1 answers"):
        model.score_answers(["a", "b"], ["c"])
    with pytest.raises(UserError, match="not a prompt"):
        model.score_answers([[{"role": "user"}]], ["c"])


def test_score_writes_a_line_for_each_answer_of_a_dataset(reward_model, tmp_path):
    question = (Message("user", "Who lives in the tree?"),)
    texts = ("An owl.", "A fish.", "no " * 500)
    data = written(tmp_path / "rankings", Ranking(question, candidates=tuple(map(Candidate, texts)), ranks=(1, 2, 2)))
    said, warned = finished.invoke(command, reward_model, "--dataset", data, "--out", tmp_path / "scores.jsonl")
    assert "1 answers do not fit" in warned and "standard deviation" in said
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(row["answer"], row["rank"], row["score"] is None) for row in rows] == [
        (texts[0], 1, False), (texts[1], 2, False), (texts[2], 2, True),
    ]  # fmt: skip
    model = rlhf.open_reward_model(reward_model)
    assert rows[0]["score"] == pytest.approx(model.score_answers(["Who lives in the tree?"], ["An owl."])[0], abs=1e-5)


def test_proposals_have_scores_without_ranks(reward_model, tmp_path):
    candidates = (Candidate("Ho."), Candidate("He."))
    data = written(tmp_path / "proposals", Proposal((Message("user", "Hi"),), candidates=candidates))
    said, _ = finished.invoke(command, reward_model, "--dataset", data, "--json")
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["answer"] for row in rows] == ["Ho.", "He."] and not any("rank" in row for row in rows)


def test_score_prints_answers_verbatim_behind_their_scores(reward_model):
    said, _ = finished.invoke(command, reward_model, "-p", "Hi", "-a", "a [b] c", "-a", "\x1b[31mred")
    assert "  a [b] c" in said and "\x1b" not in said and len(said.splitlines()) == 2


@pytest.mark.parametrize(
    "words", [[], ["--prompt", "a"], ["--answer", "b"], ["--prompt", "a", "--answer", "b", "--dataset", "c"]]
)
def test_score_says_which_options_it_needs(words, reward_model):
    with pytest.raises(UserError, match="no answers to score"):
        finished.invoke(command, reward_model, *words)


def test_score_refuses_a_policy_and_prompts_without_answers(tmp_path):
    with pytest.raises(UserError, match="is not a reward model"):
        finished.invoke(command, tiny.llama(), "-p", "a", "-a", "b")
    data = written(tmp_path / "prompts", Prompt((Message("user", "Hi"),)))
    with pytest.raises(UserError, match="prompts without answers"):
        finished.invoke(command, tiny.llama(), "--dataset", data)


# ---- sampling and metrics ------------------------------------------------------------------------------------------


def test_completions_follow_from_the_seed_and_are_what_the_model_says():
    policy = rlhf.open_policy(tiny.llama())
    once, again = (rlhf.complete(policy, ["A cat", "A dog"], n=2, seed=3, max_new_tokens=6) for _ in range(2))
    assert once == again and [len(row) for row in once] == [2, 2]
    assert rlhf.complete(policy, "A dog", n=2, seed=3, max_new_tokens=6) == once[1:]
    (greedy,) = rlhf.complete(policy, ["A cat"], n=2, seed=3, max_new_tokens=6, temperature=0)
    assert greedy[0] == greedy[1]
    with pytest.raises(UserError, match="top-p"):
        rlhf.complete(policy, ["A cat"], top_p=2.0)


def test_metrics_are_a_table_with_training_and_evaluation_of_a_step_in_one_row(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps({"stage": "sft", "status": "running"}))
    lines = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}, {"step": 2, "eval/loss": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "trai')
    table = rlhf.read_metrics(tmp_path)
    assert list(table.index) == [1, 2] and list(table.columns) == ["train/loss", "eval/loss"]
    assert table.loc[2].tolist() == [1.0, 1.5] and math.isnan(table.loc[1, "eval/loss"])
    (tmp_path / "metrics.jsonl").write_text("nonsense\n" + text)
    with pytest.raises(UserError, match="line 1 cannot be read"):
        rlhf.read_metrics(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        rlhf.read_metrics(tmp_path / "missing")


def test_a_metric_of_the_wrong_type_is_refused_and_a_torn_last_line_of_a_complete_run_is_said(tmp_path: Path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"stage": "sft", "status": "complete"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "trai')
    assert list(rlhf.read_metrics(tmp_path).index) == [1]
    assert "metrics.jsonl line 2 is cut off, although the run is complete" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": "2.0"}\n')
    with pytest.raises(UserError, match=r'line 1: train/loss is "2.0", not a number'):
        rlhf.read_metrics(tmp_path)
