"""The layout's rules, read from the imports of every file: imports run downward, and nothing hides from the count."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = {
    "rlhf": [
        "core", "config", "servers", "distributed", "data", "judging", "tasks", "runs", "doctor", "models", "tuning",
        "rollout", "reward", "guard", "training", "sft", "specialist", "ppo", "replay", "dpo", "inference", "prompting",
        "export", "memory", "cli", "comparison", "evaluation", "policy_evaluation", "report",
    ],
    "data_tools": [
        "statistics", "io", "curate", "check", "reading", "published", "importers", "aggregate", "annotate",
        "ranking_page", "tasks", "growth", "demo_world", "commands",
    ],
}  # fmt: skip
"""Packages from the ground up: each imports only packages before it, and files of its own."""
FILES = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("rlhf", "stages", "data_tools")
    for file in sorted((REPOSITORY / package).rglob("*.py"))
}
COMBINING = {
    "stages.cli", "stages.library", "stages.pipeline", "stages.demo", "stages.check_model", "stages.model_table",
    "stages.__main__",
}  # fmt: skip
"""Modules that put stages together; all others in stages/ stand alone."""
OPEN_TO_DATA_TOOLS = (
    "rlhf.core.", "rlhf.data.schema", "rlhf.data.columns", "rlhf.data.jsonl", "rlhf.data.manifest",
    "rlhf.data.store", "rlhf.data.writer", "rlhf.data.row_check",
)  # fmt: skip
"""What data_tools may import of the library."""
MOST_LINES = 400
FEWEST_FILES, MOST_FILES = 2, 14


@functools.cache
def imports(module: str) -> set[str]:
    """What a module imports: at the top, in functions, under TYPE_CHECKING, by `lazy` and by command tables."""
    return set(_imports(module)) - {module}


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        elif isinstance(node, ast.Call) and _name(node.func) in ("lazy", "import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # `module:function` in a command table
            names = [node.value.partition(":")[0]] if node.value.count(":") == 1 else []
        else:
            continue
        yield from (name for name in names if name in FILES)


def _name(function: ast.expr) -> str:
    """`importlib.import_module` -> `import_module`."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def package(module: str) -> str:
    """`rlhf.core.table` -> `core`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def of(root: str) -> list[str]:
    return [module for module in FILES if module.split(".")[0] == root]


def test_the_library_imports_neither_stages_nor_data_tools():
    inner = [module for module in of("rlhf") if module != "rlhf"]  # its front page names functions of all floors
    assert not {(m, name) for m in inner for name in imports(m) if not name.startswith("rlhf")}


def test_stages_never_import_each_other():
    alone = [module for module in of("stages") if module not in COMBINING]
    assert not {(m, name) for m in alone for name in imports(m) if name.startswith("stages.")}


def test_data_tools_import_only_core_and_records_of_the_library():
    found = {(m, name) for m in of("data_tools") for name in imports(m) if name.startswith(("rlhf.", "stages"))}
    assert not {(m, name) for m, name in found if not name.startswith(OPEN_TO_DATA_TOOLS)}


def test_packages_import_only_packages_below_them():
    upward = set()
    for root, floors in FLOORS.items():
        for module in of(root):
            if not package(module):
                continue
            upward |= {
                (module, name)
                for name in imports(module)
                if name.startswith(f"{root}.") and floors.index(package(name)) > floors.index(package(module))
            }
    assert not upward


def test_the_map_of_the_code_lists_the_packages_from_the_ground_up():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    for root, floors in FLOORS.items():
        assert {file.parent.name for file in (REPOSITORY / root).glob("*/__init__.py")} == set(floors)
        listed = text.split(f"| `{root}/` | holds |")[1].split("\n\n")[0]
        assert re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE) == floors


def test_test_files_import_helpers_and_not_each_other():
    for file in (REPOSITORY / "tests").glob("*.py"):
        text = file.read_text("utf-8")
        if not re.search(r"^\s*(from|import)\b.*\btest_", text, re.MULTILINE):  # parsing takes its time
            continue
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("test_")], file.name


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports(module) for module in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                walk(name, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_files_are_short_enough_to_read():
    lines = {module: len(file.read_text("utf-8").splitlines()) for module, file in FILES.items()}
    assert not {module: count for module, count in lines.items() if count > MOST_LINES}


def test_a_class_has_its_name_for_itself():
    found: dict[str, list[str]] = {}
    for module, file in FILES.items():
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def test_packages_have_few_files():
    for root, floors in FLOORS.items():
        counts = {p: len([f for f in (REPOSITORY / root / p).rglob("*.py") if f.name != "__init__.py"]) for p in floors}
        assert not {p: n for p, n in counts.items() if not FEWEST_FILES <= n <= MOST_FILES}
