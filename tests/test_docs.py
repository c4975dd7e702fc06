"""Commands in the documentation and in the configs' comments exist as they stand there."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from data_tools.commands import import_docs as docs
from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.cli.stage_configs import STAGES
from rlhf.config.load import load_stage_config
from stages.cli import app

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [file for name in ("*.md", "docs/*.md", "benchmarks/*.md") for file in sorted(REPOSITORY.glob(name))]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
ROOT = typer.main.get_command(app)
RANK_OPTIONS = {"--config", "-c", "--resume", "--overwrite", "--dry-run", "--help"}
"""What `python -m stages.STAGE` takes."""


def parameters(command: Any, words: tuple[str, ...] = ("rlhf",)) -> Iterator[tuple[str, Any]]:
    """The arguments and options of a command and those in it, each after its command and name."""
    for one in command.params:
        yield shlex.join([*words, one.name]), one
    for name, inner in getattr(command, "commands", {}).items():
        yield from parameters(inner, (*words, name))


def test_every_argument_and_option_has_a_help():
    assert [name for name, one in parameters(ROOT) if not one.help] == []


def code_lines(file: Path) -> list[str]:
    """Lines of a page's code blocks, or of a config's comments; a backslash joins a line to the next."""
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        lines = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    else:
        lines = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#   "))
    return [line.strip().removeprefix("$ ") for line in lines.replace("\\\n", " ").splitlines()]


def commands(files: list[Path]) -> Iterator[Any]:
    """One test case for each command that starts `rlhf`, or starts a stage's module."""
    for file in files:
        for line in code_lines(file):
            words = shlex.split(line, comments=True) if re.search(r"\brlhf |stages\.\w", line) else []
            for command in split(words):
                if command[:1] == ["rlhf"] or any(re.fullmatch(r"stages\.\w+", word) for word in command):
                    yield pytest.param(command, id=f"{file.relative_to(REPOSITORY)}: {shlex.join(command)}")


def split(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, apart at `&&`, `;`, `|` and `>`."""
    command: list[str] = []
    for word in words:
        if word in ("&&", ";", "|", ">", "&"):
            yield command
            command = []
        else:
            command.append(word)
    yield command


def options_of(words: list[str]) -> tuple[str, set[str], list[str]]:
    """The subcommand that words name, its options, and the words after it."""
    node, path = ROOT, []
    while words and hasattr(node, "commands") and not words[0].startswith("-"):
        assert words[0] in node.commands, f"rlhf {' '.join(path)} has no command {words[0]!r}"
        node = node.commands[words[0]]
        path.append(words[0])
        words = words[1:]
    known = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return " ".join(path), known | {"--help"}, words


def check(command: list[str]) -> None:
    """Refuse a command whose subcommand, options, config file or overrides do not exist."""
    if command[0] == "rlhf":
        stage, known, words = options_of(command[1:])
    else:
        place = next(i for i, word in enumerate(command) if re.fullmatch(r"stages\.\w+", word))
        stage, known, words = command[place].split(".")[1], RANK_OPTIONS, command[place + 1 :]
        assert (REPOSITORY / "stages" / f"{stage}.py").is_file()
    words = [word.strip("[]") for word in words]
    for word in words:
        if re.match(r"--?[a-z]", word):
            assert word.split("=")[0] in known, f"{stage} has no option {word}; it has {', '.join(sorted(known))}"
    config = next((after for word, after in zip(words, words[1:]) if word in ("--config", "-c")), None)
    if config is not None and config.startswith("configs/") and (stage in STAGES or stage == "pipeline"):
        overrides = [word for word in words if re.match(r"[a-z][\w.]*=", word) and "..." not in word]
        if stage == "pipeline":
            overrides = [word for word in overrides if word.split(".")[0] not in STAGES]
        load_stage_config(STAGES.get(stage, PipelineConfig), REPOSITORY / config, overrides)


@pytest.mark.parametrize("command", commands([*PAGES, *CONFIGS]))
def test_every_documented_command_exists_as_it_stands(command):
    check(command)


@pytest.mark.parametrize(
    "line",
    [
        "rlhf sfd --config configs/0.5b/sft.yaml",
        "rlhf sft --confg configs/0.5b/sft.yaml",
        "rlhf data imprt x",
        "torchrun --nproc_per_node 2 -m stages.sft --config configs/0.5b/sft.yaml --num-processes 2",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line):
    with pytest.raises(AssertionError):
        check(shlex.split(line))


def quoted(file: Path) -> Iterator[str]:
    """The commands in backticks of a page, or of the texts of a module."""
    texts = [file.read_text("utf-8")]
    if file.suffix == ".py":
        nodes = ast.walk(ast.parse(texts[0]))
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for text in texts:
        yield from re.findall(r"`(rlhf [a-z][^`\n]*)`", text)


def test_every_command_that_a_text_names_exists():
    modules = [file for root in ("rlhf", "stages", "data_tools") for file in sorted((REPOSITORY / root).rglob("*.py"))]
    found = {command for file in [*PAGES, *modules] for command in quoted(file)} - {"rlhf data ..."}
    assert len(found) > 100
    for command in found:
        check(shlex.split(command))


def test_the_page_on_formats_is_what_the_importers_say():
    written = (REPOSITORY / "docs" / "formats.md").read_text("utf-8")
    assert written == docs.page(), "run: python -m data_tools.commands.import_docs > docs/formats.md"


def test_make_targets_in_the_documentation_exist():
    named = {
        target for page in PAGES for line in code_lines(page) for target in re.findall(r"^make ([a-z]+)", line.strip())
    }
    makefile = REPOSITORY / "Makefile"
    rules = re.findall(r"^([a-z]+):", makefile.read_text("utf-8"), re.MULTILINE) if makefile.is_file() else []
    assert named <= set(rules)


def test_links_between_the_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)#?([^)]*)\)", page.read_text("utf-8")):
            place = page.parent / target if target else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{page.relative_to(REPOSITORY)}: {target}#{anchor}")
    assert broken == []


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page: those of its headings, as GitHub makes them, and explicit ones."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    found, seen = set(re.findall(r'<a id="([^"]+)"', text)), Counter[str]()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_has_the_cells_of_its_header(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, *rows = (len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines())
        assert rows and {header} == set(rows), table


def test_files_that_pages_name_are_there():
    kinds = "rlhf|stages|data_tools|tests|benchmarks|configs|docs"
    missing = {
        f"{page.name}: {name}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for name in re.findall(rf"`((?:{kinds})/[\w./-]+)`", page.read_text("utf-8"))
        if not (REPOSITORY / name).exists()
    }
    assert not missing


def test_keys_that_pages_name_are_keys_of_a_config():
    keys = set(re.findall(r"^\| `([\w.]+)` \|", (REPOSITORY / "docs/config.md").read_text("utf-8"), re.MULTILINE))
    groups = {key.split(".")[0] for key in keys if "." in key}
    known = {".".join(key.split(".")[: parts + 1]) for key in keys for parts in range(key.count(".") + 1)}
    unknown = {
        f"{page.name}: {name}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
        for name in re.findall(rf"^(?:{'|'.join(sorted(groups))})(?:\.[a-z_]+)+", code)
        if name not in known and not re.search(r"\.(py|json|jsonl|safetensors)$", name)  # files
    }
    assert not unknown


def test_the_map_of_the_code_names_every_file_of_stages():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    assert {file.stem for file in (REPOSITORY / "stages").glob("[!_]*.py") if f"`{file.stem}`" not in text} == set()


def test_every_table_is_named_where_pages_say_how_to_add_a_row():
    text = "".join((REPOSITORY / page).read_text("utf-8") for page in ("CONTRIBUTING.md", "docs/extending.md"))
    for file in [*REPOSITORY.glob("rlhf/*/*.py"), *REPOSITORY.glob("data_tools/*/*.py")]:
        path = file.relative_to(REPOSITORY)
        for table in re.findall(r"^(\w+) = Table\(", file.read_text("utf-8"), re.MULTILINE):
            assert f"`{table}`" in text and (f"`{path}`" in text or f"`{path.parent}/`" in text), f"{path}: {table}"


def test_every_page_command_and_folder_of_configs_is_found_from_a_page():
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert {page.name for page in REPOSITORY.glob("docs/*.md") if f"docs/{page.name}" not in readme} == set()
    text = "\n".join(page.read_text("utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    commands = {*ROOT.commands, *(f"data {name}" for name in ROOT.commands["data"].commands)}
    assert {name for name in commands if f"rlhf {name}" not in text} == set()
    assert {folder.name for folder in REPOSITORY.glob("configs/*/") if f"configs/{folder.name}" not in text} == set()
