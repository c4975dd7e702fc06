"""Tables: name -> implementation, with the options of each row checked against its signature.

A row is a function or class; its keyword-only parameters are the options that a config may set. Their
annotations (``float``, ``Literal[...]``, ``Annotated[float, Field(ge=0)]``) are what values are checked against.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import core_schema

from rlhf.core.errors import nearest


@dataclass(frozen=True)
class TableRow:
    """One implementation in a table. `traits` are facts that callers need, such as `needs_critic`."""

    name: str
    fn: Callable[..., Any]
    traits: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the row's docstring."""
        return (inspect.getdoc(self.fn) or "").split("\n")[0]

    @cached_property
    def options(self) -> type[BaseModel]:
        """The row's keyword-only parameters as a pydantic model that refuses unknown ones."""
        fields: dict[str, Any] = {}
        scope = getattr(self.fn, "__globals__", None) or vars(inspect.getmodule(self.fn))
        for parameter in inspect.signature(self.fn).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                kind = parameter.annotation
                kind = eval(kind, scope) if isinstance(kind, str) else kind  # our source code, not user input
                default = ... if parameter.default is parameter.empty else parameter.default
                fields[parameter.name] = (kind, default)
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False)
        return create_model(f"{self.name}_options", __config__=config, **fields)


def options_of(function: Callable[..., Any], without: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Decorator for a row that passes `**options` on to `function`: its options are that function's, but `without`."""

    def decorate(row: Any) -> Any:
        own = inspect.signature(row).parameters.values()
        more = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD] + [p for p in more if p.name not in without]
        row.__signature__ = inspect.Signature(parameters)
        return row

    return decorate


class Pick(partial[Any]):
    """A row chosen by a config, with its checked options. Calling it calls the row with those options."""

    row: TableRow

    def __new__(cls, row: TableRow, options: dict[str, Any]) -> Pick:
        pick = super().__new__(cls, row.fn, **options)
        pick.row = row
        return pick

    @property
    def options(self) -> dict[str, Any]:
        return self.keywords

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def plain(self) -> str | dict[str, Any]:
        """The value of a config that picks this."""
        return {"name": self.name, **self.options} if self.options else self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pick) and (self.row, self.options) == (other.row, other.options)

    def __reduce__(self) -> Any:  # for copies: a partial would be rebuilt from the function
        return Pick, (self.row, self.options)


class Table:
    """A named set of rows. `kind` is what messages call one of them ("advantage estimator")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._rows: dict[str, TableRow] = {}

    def row(self, name: str, **traits: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that adds a function or class under `name`."""

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._rows:
                raise KeyError(f"{self.kind} {name!r} is already in the table")
            self._rows[name] = TableRow(name, fn, traits)
            return fn

        return add

    def __getitem__(self, name: str) -> TableRow:
        if name not in self._rows:
            raise ValueError(f"unknown {self.kind} {name!r}; {nearest(name, self._rows)}")
        return self._rows[name]

    def __iter__(self) -> Iterator[TableRow]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def pick(self, spec: Any) -> Pick:
        """Choose a row from a config value: a name, or a mapping with `name` and the row's options.

        Raises:
            ValueError: The name or an option is unknown (the nearest match is named), or a value is invalid.
        """
        if isinstance(spec, Pick):
            return spec
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise ValueError(f"expected the name of a {self.kind} or a mapping with `name`, got {spec!r}")
        row = self[spec["name"]]
        given = {key: value for key, value in spec.items() if key != "name"}
        unknown = [key for key in given if key not in row.options.model_fields]
        if unknown:
            hint = nearest(unknown[0], row.options.model_fields) if row.options.model_fields else "it has no options"
            raise ValueError(f"{self.kind} {row.name!r} has no option {unknown[0]!r}; {hint}")
        try:
            checked = row.options(**given)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
            )
            raise ValueError(f"{self.kind} {row.name!r}: {faults}") from None
        return Pick(row, {name: getattr(checked, name) for name in row.options.model_fields})

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Make `Annotated[Pick, TABLE]` the type of a config field that picks from this table."""
        to_plain = core_schema.plain_serializer_function_ser_schema(lambda pick: pick.plain)
        return core_schema.no_info_plain_validator_function(self.pick, serialization=to_plain)
