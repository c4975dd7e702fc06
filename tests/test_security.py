"""The threats of docs/security.md: the page names only tests that exist, and threats without a test elsewhere."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import documentation
import finished
import pytest
import sft_runs
import tiny
import torch
from chat_servers import chat_server, completion, fault

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Message
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.inference.policy import open_policy
from rlhf.runs.random_state import load_rng
from stages import judge

PAGE = documentation.DOCS / "security.md"
FAULTS = tiny.REPOSITORY / "tests" / "faults" / "README.md"
NAMED = [pair for page in (PAGE, FAULTS) for pair in re.findall(r"`(\w+\.py)::(\w+)`", page.read_text("utf-8"))]
SECRETS = {
    "HF_TOKEN": "hf_" + "q" * 34, "OPENAI_API_KEY": "sk-" + "w" * 40, "WANDB_API_KEY": "e" * 40,
    "LABEL_STUDIO_API_KEY": "r" * 40,
}  # fmt: skip


def functions_in(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_the_pages_name_exists(file: str) -> None:
    missing = {test for name, test in NAMED if name == file} - functions_in(Path(__file__).with_name(file))
    assert not missing, f"docs/security.md or tests/faults/README.md names tests that {file} does not have"


def test_every_fault_of_the_list_has_a_test() -> None:
    rows = [line for line in FAULTS.read_text("utf-8").splitlines() if line.startswith("| ") and " --- " not in line]
    faults = [row for row in rows if not row.startswith(("| fault ", "| script ", "| `python "))]
    assert len(faults) >= 20
    assert not [row for row in faults if not re.search(r"`\w+\.py::test_\w+`", row)]


def test_every_threat_of_the_page_has_a_test_and_says_what_is_not_defended() -> None:
    threats = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert len(threats) >= 10
    for threat in threats:
        assert re.search(r"`\w+\.py::test_\w+`", threat), threat[:60]
        assert "**Not defended:**" in threat, threat[:60]


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.llama(), tmp_path / "model"))


def test_code_that_comes_with_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = (
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig\nclass C(LlamaConfig):\n    model_type = 'evil'"
    )
    (model / "evil.py").write_text(code)
    found = json.loads((model / "config.json").read_text())
    changes = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (model / "config.json").write_text(json.dumps(found | changes))
    with pytest.raises(UserError, match=r"model\.path: no model can be loaded"):
        open_policy(model)
    assert not ran.exists()


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return open, (str(self.ran), "w")


def test_a_checkpoints_random_state_runs_no_code(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"python": Evil(ran)}, tmp_path / "rng-0.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_rng(tmp_path, 0, 1)
    assert not ran.exists()


REACHES = (
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
)


@pytest.mark.parametrize("template", REACHES, ids=["subclasses", "globals", "changes its input", "file"])
def test_a_chat_template_reaches_neither_python_nor_files(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "t.jinja"
    file.write_text(template + finished.CHATML)
    messages = [Message("user", "Hello!")]
    with pytest.raises(UserError) as refused:
        load_tokenizer(ModelConfig(path=tiny.llama(), chat_template=str(file)), tiny.llama()).prompt(messages)
    assert "root:" not in str(refused.value) and not (tmp_path / "ran").exists()


# ---- servers and pages -----------------------------------------------------------------------------------------------


def test_what_a_judge_replies_does_not_reach_the_terminal(tmp_path: Path) -> None:
    rankings = tiny.write_rankings(tmp_path / "rankings", 1, held_out=4)

    def hostile(body: dict[str, Any], number: int) -> Any:
        return fault(400, "\x1b[2J[/red]no") if number % 2 else completion("\x1b]0;mine\x07 [[A]]")

    with chat_server(hostile, models=("\x1b[31mm[/red]",)) as server:
        spec = json.dumps({"url": server.url, "cache": str(tmp_path / "replies")})
        said, warned = finished.invoke(judge.command, spec, rankings, "--json")
    assert "[31mm[/red]" in said and "the server refused the request" in warned
    assert not {"\x1b", "\x07"} & set(said + warned)


def test_a_card_holds_hostile_names_and_configs_as_code(tmp_path: Path) -> None:
    demonstrations = tiny.write_demonstrations(tmp_path / "a`<img src=x>`|b\n# Mine\x1b[31m", 8)
    run = sft_runs.run(sft_runs.settings(demonstrations, tmp_path / "run", batch={"batch_size": 8, "max_steps": 1}))
    with (run / "config.yaml").open("a", encoding="utf-8") as config:
        config.write('note: "x\\n```\\n# Mine"\n')
    export(run, tmp_path / "out", EXPORTERS.pick({"name": "hf"}))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| `a'<img src=x>'\\|b # Mine\N{REPLACEMENT CHARACTER}[31m` |" in card
    assert "\n````yaml\n" in card.split("## Training")[1] and "\n````\n" in card.split("## Training")[1]


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_of_the_environment_are_in_no_file_of_a_run_or_export_and_not_in_the_log(
    demos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    batch = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 1}
    run = sft_runs.run(sft_runs.settings(demos, tmp_path / "run", batch=batch, checkpoints={"every": 1}))
    export(run, tmp_path / "out", EXPORTERS.pick({"name": "hf"}))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"run.json", "README.md", "metrics.jsonl"} <= {file.name for file in files}
    said = "".join(capfd.readouterr()).encode()
    for value in SECRETS.values():
        assert value.encode() not in said
        assert not [file for file in files if value.encode() in file.read_bytes()]
