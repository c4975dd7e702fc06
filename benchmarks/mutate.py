"""Which small faults in a module do its tests notice? Each mutant has one operator, constant or condition changed.

    python benchmarks/mutate.py rlhf/ppo/kl.py tests/test_kl.py tests/test_ppo.py --mutants 40

A mutant is killed when a test fails, and survives when all pass: read the survivors, and write the missing test or
find that the change makes no difference. Tests run in processes forked from one that has imported the large libraries,
so the module's own tests should be in-process ones; those in processes of their own do not see the mutant.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "trl",
    "datasets",
    "hypothesis",
    "pyarrow.parquet",
)
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt,), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt,), ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """Changed copies of one node; None drops a statement."""

    def changed(**fields: Any) -> ast.AST:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    match node:
        case ast.Compare(ops=[op]):
            yield from (changed(ops=[other()]) for other in COMPARISONS[type(op)])
        case ast.BinOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            yield changed(op=OPERATORS[type(node.op)]())
        case ast.BoolOp():
            yield changed(op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield changed(value=not node.value)
        case ast.Constant(value=int()):
            yield changed(value=node.value + 1)
        case ast.Constant(value=float()):
            yield changed(value=2 * node.value or 1.0)
        case ast.Name(id=name) if name in NAMES:
            yield changed(id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield changed(attr=NAMES[name])
        case ast.If() | ast.IfExp() | ast.While():
            yield changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension(ifs=[test, *rest]):
            yield changed(ifs=[ast.UnaryOp(ast.Not(), test), *rest])
    if isinstance(node, (ast.AugAssign, ast.Continue)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Yield))
    ):
        yield None


def sites(tree: ast.Module) -> list[tuple[ast.AST, str, int | None]]:
    """Every node that may change, with its parent and field; annotations, messages and declarations stay."""
    found = []

    def walk(parent: ast.AST) -> None:
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list", "kw_defaults", "defaults", "bases"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
                    continue
                if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                    continue
                if isinstance(child, ast.AST):
                    found.append((parent, name, index))
                    walk(child)

    walk(tree)
    return found


def mutants(source: str) -> list[tuple[str, str]]:
    """(What changed, the module's text) of every mutant."""
    tree, found = ast.parse(source), []
    for parent, name, index in sites(tree):
        value = getattr(parent, name)
        node = value if index is None else value[index]
        for other in variants(node):
            new = ast.Pass() if other is None else other
            if index is None:
                setattr(parent, name, new)
            else:
                value[index] = new
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            before, after = (ast.unparse(n).splitlines()[0] for n in (node, new))
            found.append((f"line {line}: {before}  ->  {after}", ast.unparse(ast.fix_missing_locations(tree))))
            if index is None:
                setattr(parent, name, node)
            else:
                value[index] = node
    return found


def survives(file: Path, text: str, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass with this text in place of the file's."""
    child = os.fork()
    if not child:
        _run(file, text, tests)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run(file: Path, text: str, tests: list[str]) -> None:
    import pytest

    os.setpgid(0, 0)
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    read, stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(self: SourceFileLoader, path: str) -> bytes:
        return text.encode() if Path(path) == file else read(self, path)

    def path_stats(self: SourceFileLoader, path: str) -> Any:
        if Path(path) == file:
            raise OSError  # so that no compiled copy is read
        return stats(self, path)

    SourceFileLoader.get_data, SourceFileLoader.path_stats = get_data, path_stats  # type: ignore[method-assign]
    status = 1
    with contextlib.suppress(BaseException):
        status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
    os._exit(int(status))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="file of the module, such as rlhf/ppo/kl.py")
    parser.add_argument("tests", nargs="+", help="test files, the quickest first")
    parser.add_argument("--mutants", type=int, default=40, help="how many, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--seconds", type=float, default=300, help="a mutant whose tests take longer is killed")
    options = parser.parse_args()
    os.chdir(REPOSITORY)
    sys.path.insert(0, str(REPOSITORY))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    file = REPOSITORY / options.module
    source = file.read_text("utf-8")
    if not survives(file, source, options.tests, options.seconds):
        sys.exit("The tests fail without a mutant.")
    every = mutants(source)
    drawn = random.Random(options.seed).sample(every, min(options.mutants, len(every)))
    alive = []
    for what, text in drawn:
        if survives(file, text, options.tests, options.seconds):
            alive.append(what)
            print(f"{options.module} {what}", flush=True)
    killed = len(drawn) - len(alive)
    print(f"{options.module}: {killed} of {len(drawn)} killed, drawn from {len(every)}", flush=True)


if __name__ == "__main__":
    main()
