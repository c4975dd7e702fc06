"""Groups of commands whose modules are imported when a command is called, so that `rlhf --help` stays fast.

A command is a function. Its docstring is its help, and the part `Args:` is that of its arguments and options.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, get_args, get_origin

import typer
from typer.core import TyperGroup

OPTIONS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


def command_group(name: str, help: str, commands: Mapping[str, tuple[str, str]]) -> typer.Typer:
    """A typer application of commands that are imported late.

    Args:
        name: The group's name on the command line.
        help: A sentence about the group.
        commands: Command name -> (`module:attribute`, help line). The attribute is a command function or a
            `typer.Typer`. The help line is shown in the list of commands, which imports none of them; it is also
            the help of a function without a docstring.
    """
    kind = type("LazyGroup", (_LazyGroup,), {"table": commands})
    app = typer.Typer(name=name, help=help, cls=kind, no_args_is_help=True, **OPTIONS)
    app.callback()(lambda: None)  # makes typer build a group although no command is registered yet
    return app


class _LazyGroup(TyperGroup):
    table: ClassVar[Mapping[str, tuple[str, str]]]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = _LateCommands(self.table)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])


class _LateCommands(Mapping[str, Any]):
    """Command name -> command, which is imported when it is looked up."""

    def __init__(self, table: Mapping[str, tuple[str, str]]) -> None:
        self._table, self._built = table, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            place, help = self._table[name]
            module, _, attribute = place.partition(":")
            found = getattr(importlib.import_module(module), attribute)
            app = found if isinstance(found, typer.Typer) else command_app(found, name, help)
            self._built[name] = typer.main.get_command(app)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def command_app(function: Callable[..., None], name: str = "", help: str = "") -> typer.Typer:
    """An application of one command, whose docstring is its help; `help` is used where there is none."""
    signature, text = inspect.signature(function, eval_str=True), inspect.getdoc(function) or help
    parameters = described(signature.parameters.values(), text)
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    app = typer.Typer(**OPTIONS)
    app.command(name or None, help=text.partition("\nArgs:\n")[0])(function)
    return app


_ENTRY = re.compile(r"^ {4}(\w+)(?: \((\S+)\))?: (.+(?:\n {8}.+)*)", re.MULTILINE)


def described(parameters: Iterable[inspect.Parameter], text: str) -> list[inspect.Parameter]:
    """The parameters of a command, with the help that a docstring gives them.

    A keyword-only parameter is an option, any other one an argument; `Annotated[..., typer.Option(...)]` says more.

    Args:
        parameters: With evaluated annotations.
        text: A docstring whose part `Args:` has entries `name: HELP`, or `name (METAVAR): HELP`.
    """
    entries = {name: (metavar or None, help) for name, metavar, help in _ENTRY.findall(text.partition("\nArgs:\n")[2])}
    return [_described(one, *entries[one.name]) if one.name in entries else one for one in parameters]


def _described(parameter: inspect.Parameter, metavar: str | None, help: str) -> inspect.Parameter:
    kind, info = parameter.annotation, typer.Option() if parameter.kind is parameter.KEYWORD_ONLY else typer.Argument()
    if get_origin(kind) is Annotated:
        kind, given = get_args(kind)
        info = copy.copy(given)
    elif parameter.default is False:  # a flag, without its opposite
        info = typer.Option(f"--{parameter.name.replace('_', '-')}")
    info.help, info.metavar = " ".join(help.split()), metavar or info.metavar
    return parameter.replace(annotation=Annotated[kind, info])
