"""Exports: what plain transformers makes of them, formats and options, the folder's all-or-nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.runs.parents import resolve_model_path
from stages.export import command

CHAT = [{"role": "user", "content": "What does the owl do?"}]


IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])


PLAIN = """
import json, sys

class Nothing:  # of this project can be imported, although it is installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rlhf", "stages", "data_tools", "finished", "tiny"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

given = torch.load(sys.argv[1])
found = {}
for name, (path, base, ids) in given["policies"].items():
    model = AutoModelForCausalLM.from_pretrained(base or path)
    model = PeftModel.from_pretrained(model, path).eval() if base else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(given["chat"], add_generation_prompt=True, tokenize=False)
    inputs = tokenizer.apply_chat_template(
        [given["chat"]] * 8, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        answers = model.generate(**inputs, max_new_tokens=100, do_sample=True, top_k=50)
        answers = answers[:, inputs["input_ids"].shape[1]:]
    found[name] = {"logits": logits, "text": text, "answers": answers}
for name, (path, texts) in given["rewards"].items():
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        found[name] = {"logits": model(**inputs).logits[:, 0], "config": model.config.to_dict()}
for name, code in given["snippets"].items():
    import contextlib, io
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    found[name] = said.getvalue()
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Finished runs of every kind, by name."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    sft, chatml = finished.sft(folder / "sft"), finished.sft(folder / "chatml", model=finished.chatml())
    reward = finished.reward(folder / "reward", sft)
    return {
        "sft": sft,
        "chatml": chatml,
        "lora": finished.sft(folder / "lora", "lora"),
        "prompt-tuning": finished.sft(folder / "prompt-tuning", "prompt-tuning"),
        "reward": reward,
        "reward-lora": finished.reward(folder / "reward-lora", sft, "lora"),
        "reward-chatml": finished.reward(folder / "reward-chatml", chatml),
        "reward-phi": finished.reward(folder / "reward-phi", finished.chatml(AS_PHI)),
        "reward-text": finished.reward(folder / "reward-text", as_text()),
        "reward-bert": finished.reward(folder / "reward-bert", tiny.bert()),
        "ppo": finished.ppo(folder / "ppo", sft, reward, temperature=0.7),
    }


AS_PHI = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
"""Phi's template writes EOS after a conversation, behind the end of the last turn."""


AS_TEXT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|Ask|>{{ m.content }}{% else %}Say{{ m.content }} Over.\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Say{% endif %}"
)
"""A template with a control token that is not a special one, an answer that continues a word, and text behind it."""


def as_text() -> str:
    """The tiny Llama with AS_TEXT."""
    folder = Path(tiny.llama()).with_name("as-text")
    model, tokenizer = (kind.from_pretrained(tiny.llama()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens(["<|Ask|>", "yOn"])  # the second would join the prompt's end with "Once upon a time"
    tokenizer.chat_template = AS_TEXT
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def exported(run: str, out: Path, name: str = "hf", **options: Any) -> dict[str, Any]:
    return export(run, out, EXPORTERS.pick({"name": name}), **options)


@pytest.fixture(scope="module")
def folders(runs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of all runs, by name; adapters under NAME-adapter."""
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for name, run in runs.items():
        for row in ("hf", "adapter"):
            if (row == "adapter") == (name == "prompt-tuning") or (row == "adapter" and "lora" in name):
                found[name + "-adapter" * (row == "adapter")] = folder / name / row
                exported(run, folder / name / row, row)
    return found


@pytest.fixture(scope="module")
def plain(runs: dict[str, str], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds in the exports that cannot import this project."""
    folder = tmp_path_factory.mktemp("plain")
    base = {name: json.loads((folders[name] / "adapter_config.json").read_text())["base_model_name_or_path"]
            for name in folders if name.endswith("-adapter")}  # fmt: skip
    given = {
        "chat": CHAT,
        "policies": {
            name: (str(path), base.get(name), IDS) for name, path in folders.items() if not name.startswith("reward")
        },
        "rewards": {
            name: (str(folders[name]), texts(runs[name])) for name in ("reward", "reward-chatml", "reward-bert")
        },
        "snippets": {
            f"snippet of {name}": finished.python_block((path / "README.md").read_text())
            for name, path in folders.items()
        },
    }
    torch.save(given, folder / "given.pt")
    (folder / "plain.py").write_text(PLAIN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "plain.py", "given.pt", "found.pt"],
        cwd=folder, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


def texts(run: str) -> list[list[int]]:
    """Two conversations of unequal length in the run's tokens."""
    chat = load_tokenizer(ModelConfig(path=run), resolve_model_path(run))
    return [chat.whole(CHAT, answer) for answer in ("It sleeps.", "It goes to the barn and then it meets a fox.")]


# ---- loaded elsewhere --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "chatml", "lora", "ppo"])
def test_plain_transformers_gives_exactly_the_logits_of_the_runs_policy(
    name: str, runs: dict[str, str], plain: dict[str, Any]
) -> None:
    assert torch.equal(plain[name]["logits"], finished.policy_logits(runs[name], IDS))


@pytest.mark.slow
def test_an_adapter_on_its_base_gives_the_merged_logits(runs: dict[str, str], plain: dict[str, Any]) -> None:
    merged = finished.policy_logits(runs["lora"], IDS)
    assert not torch.allclose(merged, finished.policy_logits(tiny.llama(), IDS), atol=1e-2)
    torch.testing.assert_close(plain["lora-adapter"]["logits"], merged, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "chatml"])
def test_the_chat_template_renders_as_in_training(name: str, runs: dict[str, str], plain: dict[str, Any]) -> None:
    chat = load_tokenizer(ModelConfig(path=runs[name]), resolve_model_path(runs[name]))
    assert plain[name]["text"] == chat.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "end"), [("sft", "</s>"), ("chatml", "<|im_end|>")])
def test_generation_stops_at_the_end_of_the_turn(
    name: str, end: str, folders: dict[str, Path], plain: dict[str, Any]
) -> None:
    chat = load_tokenizer(ModelConfig(path=str(folders[name])), str(folders[name]))
    stops = json.loads((folders[name] / "generation_config.json").read_text())["eos_token_id"]
    assert stops[0] == chat.end_id == chat.tokenizer.convert_tokens_to_ids(end)
    assert chat.tokenizer.eos_token_id in stops
    lengths = set()
    for answer in plain[name]["answers"].tolist():
        first = next(i for i, token in enumerate(answer) if token in stops)
        assert set(answer[first + 1 :]) <= {chat.pad_id}
        lengths.add(first)
    assert len(lengths) > 1 and max(lengths) < 99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "reward-chatml"])
def test_a_reward_model_without_a_bias_states_its_scale(
    name: str, runs: dict[str, str], folders: dict[str, Path], plain: dict[str, Any]
) -> None:
    expected = finished.scores(runs[name], texts(runs[name]))
    config = plain[name]["config"]
    assert (config["reward_mean"], config["reward_std"]) == (0.5, 2.0)
    torch.testing.assert_close((plain[name]["logits"] - 0.5) / 2.0, expected, atol=1e-6, rtol=1e-5)
    assert "score = (logit - 0.5) / 2.0" in (folders[name] / "README.md").read_text()


@pytest.mark.slow
def test_logits_of_a_reward_model_are_exactly_the_runs(runs: dict[str, str], plain: dict[str, Any]) -> None:
    assert torch.equal(plain["reward"]["logits"], finished.reward_logits(runs["reward"], texts(runs["reward"])))


@pytest.mark.slow
def test_a_scale_is_folded_into_a_head_with_a_bias(
    runs: dict[str, str], folders: dict[str, Path], plain: dict[str, Any]
) -> None:
    expected = finished.scores(runs["reward-bert"], texts(runs["reward-bert"]))
    torch.testing.assert_close(plain["reward-bert"]["logits"], expected, atol=1e-6, rtol=1e-5)
    assert plain["reward-bert"]["config"]["reward_std"] == 1.0
    assert "The weights include the normalisation" in (folders["reward-bert"] / "README.md").read_text()


def test_padding_of_a_reward_model_is_never_the_end_of_an_answer(folders: dict[str, Path]) -> None:
    folder = folders["reward-chatml"]
    chat = load_tokenizer(ModelConfig(path=str(folder)), str(folder))
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == chat.pad_id != chat.end_id


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["reward", "reward-lora-adapter", "reward-chatml", "reward-phi", "reward-text", "reward-bert"]
)
def test_the_cards_snippet_prints_the_score(name: str, runs: dict[str, str], plain: dict[str, Any]) -> None:
    run = runs[name.removesuffix("-adapter")]
    chat = load_tokenizer(ModelConfig(path=run), resolve_model_path(run))
    story = [{"role": "user", "content": "Tell me a story."}]
    expected = finished.scores(run, [chat.whole(story, "Once upon a time there was an owl.")])
    assert float(plain[f"snippet of {name}"]) == pytest.approx(float(expected), abs=1e-4)


def test_the_cards_snippet_refuses_messages_that_spell_a_control_token(folders: dict[str, Path]) -> None:
    code = finished.python_block((folders["reward-text"] / "README.md").read_text())
    for token in ("<|Ask|>", "</s>"):
        with pytest.raises(ValueError, match="spells a control token"):
            exec(code.replace("there was an owl", f"there was {token}"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "chatml", "lora", "lora-adapter", "prompt-tuning-adapter", "ppo"])
def test_the_cards_snippet_prints_an_answer(name: str, plain: dict[str, Any]) -> None:
    assert plain[f"snippet of {name}"].strip()


@pytest.mark.parametrize(
    "given", [{"repetition_penalty": 5.0, "temperature": 0.01, "top_k": 1}, {"do_sample": False, "temperature": 0.3}]
)
def test_an_exports_generation_config_has_the_runs_sampling_and_nothing_of_the_bases(
    given: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"  # the second config is one that transformers loads but refuses to save
    shutil.copytree(tiny.llama(), base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], **given}))
    sft = finished.sft(tmp_path / "sft", model=str(base))
    ppo = finished.ppo(tmp_path / "ppo", sft, finished.reward(tmp_path / "reward"), temperature=0.7, top_k=5)
    export(ppo, tmp_path / "out", EXPORTERS.pick("hf"))
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 1.0}
    ids = {"eos_token_id": [2, 7], "pad_token_id": 0, "bos_token_id": 1}
    assert {
        key: value for key, value in found.items() if key not in ("transformers_version", "_from_model_config")
    } == sampling | ids


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", EXPORTERS, ids=lambda row: row.name)
def test_every_format_makes_a_folder_with_tokenizer_template_and_card(
    row: Any, runs: dict[str, str], tmp_path: Path
) -> None:
    facts = exported(runs["lora"], tmp_path / "out", row.name)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "tokenizer.json", "chat_template.jinja"} <= names
    assert facts["parameters"] > 0 and len(facts["fingerprint"]) == 64
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_whether_the_hub_could_be_reached_is_in_no_file_of_a_run_or_export(
    runs: dict[str, str], folders: dict[str, Path]
) -> None:
    saved = [*(Path(run) / "model" for run in runs.values()), *folders.values()]
    assert not [folder for folder in saved if "local_files_only" in (folder / "tokenizer_config.json").read_text()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_come_in_the_dtype_that_is_asked_for(dtype: str, runs: dict[str, str], tmp_path: Path) -> None:
    for name in ("sft", "reward"):
        said, _ = finished.invoke(command, runs[name], "--out", tmp_path / name, "--dtype", dtype, "--json")
        assert finished.last_json(said)["dtype"] == dtype
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype


def test_caches_are_on_in_an_export(folders: dict[str, Path]) -> None:
    for name in ("sft", "reward"):
        assert json.loads((folders[name] / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hff"], "did you mean 'hf'"),
        (["--dtype", "int8"], "dtype"),
        (["--format", "adapter", "--dtype", "float32"], "has no option 'dtype'"),
        (["--private"], "--push-to-hub"),
        (["--push-to-hub", "a/b/c"], "not a hub name"),
    ],
)
def test_a_bad_option_is_refused(words: list[str], message: str, runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        finished.invoke(command, runs["sft"], "--out", tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def test_the_commands_import_without_torch() -> None:
    code = "import sys\nfrom stages import chat, evaluate, export, sample\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tiny.REPOSITORY)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_only_a_finished_run_is_exported(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        exported(tiny.llama(), tmp_path / "out")
    unfinished = finished.sft(tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    write_json(tmp_path / "run" / "run.json", info | {"status": "running"})
    with pytest.raises(UserError, match="not finished"):
        exported(unfinished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_only_with_overwrite(runs: dict[str, str], tmp_path: Path) -> None:
    exported(runs["sft"], tmp_path / "out")
    with pytest.raises(UserError, match="holds an export already"):
        exported(runs["ppo"], tmp_path / "out")
    exported(runs["ppo"], tmp_path / "out", overwrite=True)
    assert "ppo" in (tmp_path / "out" / "README.md").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_nothing_but_an_export_is_ever_replaced(runs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").write_text("Dear")
    for name in ("config.json", "README.md", "model.safetensors"):
        (tmp_path / "a-model").mkdir(exist_ok=True)
        (tmp_path / "a-model" / name).write_text("of somebody else")
    for out in (tmp_path / "letters", tmp_path / "a-model", Path(runs["sft"]), Path(runs["sft"]) / "model", tmp_path):
        with pytest.raises(UserError, match="not an export"):
            exported(runs["sft"], out, overwrite=True)
    assert (tmp_path / "letters" / "to-mother.txt").is_file()


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    run = finished.sft(tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    write_json(tmp_path / "run" / "run.json", {key: value for key, value in info.items() if key != "packages"})
    with pytest.raises(KeyError):
        exported(run, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_run_without_adapter_has_none_to_export(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapter"):
        exported(runs["sft"], tmp_path / "out", "adapter")


def test_virtual_tokens_are_exported_only_as_an_adapter(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format adapter"):
        exported(runs["prompt-tuning"], tmp_path / "out")
