"""Groups of commands whose modules are imported when a command is called, so that `rlhf --help` stays fast."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

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
            self._built[name] = _build(name, getattr(importlib.import_module(module), attribute), help)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def _build(name: str, found: Any, help: str) -> Any:
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(**OPTIONS)
        found.command(name, help=None if function.__doc__ else help)(function)
    return typer.main.get_command(found)
