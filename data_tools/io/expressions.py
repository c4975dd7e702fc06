"""Expressions and templates that users write, in Jinja's sandbox: they compute with the values that they are given.

They cannot import, read files, reach Python's internals, call anything but a few methods of text, or build a text
that fills the memory. The content of a value is never read as a template.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, filters, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from rlhf.core.errors import UserError, nearest

FILTERS = (
    "abs", "capitalize", "count", "default", "first", "float", "int", "join", "last", "length", "list", "lower", "map",
    "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "select", "selectattr", "sort", "string",
    "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
METHODS = frozenset(
    (
        "capitalize", "count", "endswith", "find", "isdigit", "islower", "isupper", "lower", "lstrip", "partition",
        "removeprefix", "removesuffix", "replace", "rpartition", "rsplit", "rstrip", "split", "splitlines",
        "startswith", "strip", "title", "upper",
    )
)  # fmt: skip
"""The only methods that may be called: those of text."""
LONGEST_SOURCE = 20_000
LARGEST_POWER = 64


class Failed(ValueError):
    """An expression or template could not be computed with these values; the message says why."""


class _Sandbox(SandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
        self.globals.clear()  # range, lipsum, cycler, ...
        self.filters = {name: filters.FILTERS[name] for name in FILTERS} | {"regex_replace": _regex_replace}
        self.tests["search"] = lambda text, pattern: re.search(pattern, text) is not None

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(getattr(called, "__self__", None), str) and called.__name__ in METHODS):
            name = getattr(called, "__name__", None) or getattr(called, "_undefined_name", "this")
            raise SecurityError(f"{name}() may not be called, only methods of text: {', '.join(sorted(METHODS))}")
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            raise SecurityError(f"{operator} is for numbers, not for {type(left).__name__} and {type(right).__name__}")
        if operator == "**" and (abs(right) > LARGEST_POWER or abs(left) > 2**LARGEST_POWER):
            raise SecurityError(f"{left} ** {right} is too large")
        return super().call_binop(context, operator, left, right)


def _regex_replace(text: str, pattern: str, new: str = "") -> str:
    """The text with every match of the regular expression replaced."""
    return re.sub(pattern, new, text)


_SANDBOX = _Sandbox()


class Expression:
    """A value computed from named values, such as ``k > 2 and not ties``.

    Args:
        source: The expression.
        where: The prefix of error messages, such as ``--where``.
        known: The names that it may use; None where they are known only when it is computed.

    Raises:
        UserError: It is invalid, or uses an unknown name.
    """

    def __init__(self, source: str, where: str, known: Collection[str] | None = None) -> None:
        self.source, self.where = source, where
        try:
            _check_length(source)
            parser = Parser(_SANDBOX, source, state="variable")
            tree = nodes.Template([nodes.Output([parser.parse_expression()])], lineno=1)
            self._compute = _SANDBOX.compile_expression(source, undefined_to_none=False)
            self.names = frozenset(meta.find_undeclared_variables(tree.set_environment(_SANDBOX)))
        except (TemplateSyntaxError, SyntaxError, RecursionError, ValueError) as error:
            raise UserError(f"{where} {_brief(source)}: not an expression: {_message(error)}", remedy=_HELP) from None
        _check_names(self.names, f"{where} {_brief(source)}", known)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """The value.

        Raises:
            Failed: It cannot be computed with these values.
        """
        try:
            value = self._compute(values)
            if isinstance(value, StrictUndefined):
                str(value)  # raises what is undefined
            return value
        except Exception as error:  # any error is the expression's
            raise Failed(_message(error)) from None


class Template:
    """A text with ``{{ values }}`` in it. `where` is its file and name, for messages.

    Raises:
        UserError: It is not a template, uses an unknown name, or includes another.
    """

    def __init__(self, source: str, where: str, known: Collection[str] | None = None) -> None:
        self.source, self.where = source, where
        try:
            _check_length(source)
            tree = _SANDBOX.parse(source)
            others = [node for kind in _LOADS for node in tree.find_all(kind)]
            self._template = _SANDBOX.from_string(source)
        except (TemplateSyntaxError, SyntaxError, RecursionError, ValueError) as error:
            line = f" line {error.lineno}:" if isinstance(error, TemplateSyntaxError) else ""
            raise UserError(f"{where}: not a Jinja template:{line} {_message(error)}", remedy=_HELP) from None
        if others:
            raise UserError(f"{where}: line {others[0].lineno}: a template cannot load another")
        self.names = frozenset(meta.find_undeclared_variables(tree))
        _check_names(self.names, where, known)

    def __call__(self, values: Mapping[str, Any]) -> str:
        """The text.

        Raises:
            Failed: It cannot be rendered with these values.
        """
        try:
            return self._template.render(values)
        except Exception as error:  # any error is the template's
            raise Failed(_message(error)) from None


_LOADS = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_HELP = "Jinja's syntax: https://jinja.palletsprojects.com/templates/#expressions"


def _check_length(source: str) -> None:
    if len(source) > LONGEST_SOURCE:
        raise ValueError(f"longer than {LONGEST_SOURCE:,} characters")


def _check_names(names: frozenset[str], where: str, known: Collection[str] | None) -> None:
    unknown = sorted(names - set(known)) if known is not None else []
    if unknown:
        raise UserError(f"{where}: there is no field {unknown[0]!r}", remedy=nearest(unknown[0], known or ()))


def _message(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, TemplateSyntaxError):
        return error.message or ""
    return str(error) or type(error).__name__


def _brief(source: str) -> str:
    return repr(source if len(source) <= 200 else source[:200] + "...")
