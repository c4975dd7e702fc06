"""The layout's rules, read from the imports of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("rlhf", "stages", "data_tools")
FILES = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts): file
    for package in PACKAGES
    for file in sorted((REPOSITORY / package).rglob("*.py"))
}
TOGETHER = {"stages.cli", "stages.pipeline", "stages.demo", "stages.__main__"}
"""Modules that put stages together; all others in stages/ stand alone."""
LEAVES = {f"rlhf.{name}" for name in ("schema", "jsonl", "store", "errors", "lazy", "table", "console")} | {"rlhf"}
"""What data_tools may know of the library."""
LONGEST = 450


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: str, at_load: bool = False) -> Iterator[str]:
    """The project's modules that a module imports.

    Args:
        module: Its dotted name.
        at_load: Leave out imports inside functions and under TYPE_CHECKING, which cannot make a cycle.
    """
    nodes: list[ast.AST] = [ast.parse(FILES[module].read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        if at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_load and isinstance(node, ast.If) and is_type_checking(node):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy" and not at_load:
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def of(package: str) -> list[str]:
    return [module for module in FILES if module.split(".")[0] == package]


def test_the_library_imports_neither_stages_nor_data_tools():
    found = {(m, name) for m in of("rlhf") for name in imports(m) if not name.startswith("rlhf")}
    assert not found


def test_stages_never_import_each_other():
    alone = [module for module in of("stages") if module not in TOGETHER]
    found = {(m, name) for m in alone for name in imports(m) if name.startswith("stages") and name != "stages"}
    assert not found


def test_data_tools_know_of_the_library_only_its_leaves():
    found = {(m, name) for m in of("data_tools") for name in imports(m) if not name.startswith("data_tools")}
    assert {(m, name) for m, name in found if name not in LEAVES} == set()


def test_what_data_tools_know_knows_nothing_else_of_the_library():
    names = {name for leaf in LEAVES & set(FILES) for name in imports(leaf)}
    assert names <= LEAVES | {"rlhf"}


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {name for name in imports(module, at_load=True) if name in FILES} for module in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                walk(name, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("module", FILES)
def test_files_stay_short_enough_to_read(module):
    lines = len(FILES[module].read_text("utf-8").splitlines())
    assert lines < LONGEST, f"{module} has {lines} lines: does it have more than one reason to change?"
