"""The examples on the documentation's pages work when they are typed, and its picture is one in two colours."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from documentation import DOCS, REPOSITORY, blocks, named, typed

from rlhf.config.load import check_config
from rlhf.ppo.config import PPOConfig


@pytest.fixture(scope="module")
def data_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the commands of docs/data.md print; the last one needs the demo."""
    script = "\n".join(block for block in blocks(DOCS / "data.md", "bash") if "configs/demo" not in block)
    return typed(tmp_path_factory.mktemp("data"), script)


@pytest.mark.slow
def test_own_data_comes_from_the_readme_to_a_checked_pipeline(tmp_path: Path) -> None:
    section = (REPOSITORY / "README.md").read_text("utf-8").split("\n## Your own data\n")[1].split("\n## ")[0]
    (tmp_path / "section.md").write_text(section, "utf-8")
    printed = typed(tmp_path, "\n".join(blocks(tmp_path / "section.md", "bash")))
    assert "no prompt is in more than one split" in printed and "Preflight: ppo" in printed


@pytest.mark.slow
def test_the_commands_of_the_data_page_print_what_stands_there(data_page: str) -> None:
    printed = {line.rstrip() for line in data_page.splitlines()}
    for block in blocks(DOCS / "data.md", "text"):
        for line in block.splitlines():
            assert line in printed


@pytest.mark.slow
def test_the_data_page_keeps_a_prompt_in_one_split(data_page: str) -> None:
    assert "no prompt is in more than one split" in data_page


@pytest.mark.slow
@pytest.mark.parametrize("page", ["prepare.md", "tasks.md", "label-studio.md"])
def test_the_commands_of_a_page_print_what_the_page_shows(page: str, tmp_path: Path) -> None:
    printed = _without_fingerprints(typed(tmp_path, "\n".join(blocks(DOCS / page, "bash"))))
    shown = _without_fingerprints("".join(blocks(DOCS / page, "text")))
    assert shown and [line for line in shown if line not in printed] == []


def _without_fingerprints(text: str) -> list[str]:
    """The lines, without the digits of fingerprints, which another version of pyarrow changes."""
    return [re.sub(r"\b[0-9a-f]{12}\b", "fingerprint", line).rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("page", sorted([*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")]), ids=lambda page: page.name)
def test_python_on_every_page_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


# ---- docs/extending.md ---------------------------------------------------------------------------------------------

EXTENDING = DOCS / "extending.md"


def test_the_example_of_a_reward_function_is_found_by_the_example_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(named(EXTENDING, "python")["my_rewards.py"])
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("my_rewards").brief_and_polite
    chat = [{"role": "user", "content": "Tea?"}]
    assert function(chat, "Yes, thank you.") > function(chat, "Yes.") > function(chat, "Yes, and so on and on.")
    one, several = map(yaml.safe_load, blocks(EXTENDING, "yaml"))
    assert check_config(PPOConfig, one, "polite.yaml").reward.name == "function"
    terms = check_config(PPOConfig, {**one, **several}, "polite.yaml").reward.options["terms"]
    assert [term["name"] for term in terms] == ["model", "function"]


@pytest.mark.slow
def test_every_example_row_passes_the_tests_of_its_table(tmp_path: Path) -> None:
    for name in ("rlhf", "stages", "data_tools", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    examples = named(EXTENDING, "python")
    del examples["my_rewards.py"]
    for file, code in examples.items():
        with open(tmp_path / file, "a", encoding="utf-8") as text:
            text.write("\n\n" + code)
    rows = {
        name
        for code in examples.values()
        for name in re.findall(r'^@(?:\w+\.row|row_format)\("([^"]+)"', code, re.MULTILINE)
    }
    assert rows == {"batch-mean", "tempered", "duel", "norms", "brevity", "generate"}
    every = " or ".join(f"[{row}]" for row in rows)
    tests = [
        f"tests/test_{name}.py" for name in ("advantages", "ranking", "import_table", "tuning", "table", "rollout")
    ]
    selected = f"({every}) and not loop_over_pairs"  # that test needs a formula written by hand for each row
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *tests, "-k", selected],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True, capture_output=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    for row in rows:
        assert any(f"[{row}]" in line for line in passed), f"no test ran over {row}"


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_the_picture_is_the_same_in_light_and_in_dark() -> None:
    files = [DOCS / "pipeline.svg", DOCS / "pipeline-dark.svg"]
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    texts = [file.read_text("utf-8") for file in files]
    for file, text in zip(files, texts):
        ET.fromstring(text)
        assert f'"docs/{file.name}"' in readme
    light, dark = (re.sub(r"^ +\.\w+ \{ (fill|stroke): .*\n", "", text, flags=re.MULTILINE) for text in texts)
    assert light == dark
