"""docs/config.md from the config classes and the tables: `python -m rlhf.cli.config_docs > docs/config.md`."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.cli.compare_config import CompareConfig, ComparedTask, WayConfig
from rlhf.cli.pipeline_config import PipelineConfig
from rlhf.config.base import StageConfig
from rlhf.core.table import Pick, Table, TableRow
from rlhf.dpo.config import DPOConfig
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.sft.config import SFTConfig
from rlhf.specialist.config import SpecialistConfig

SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "Every stage": (StageConfig, "The keys that all stages share."),
    "SFT": (SFTConfig, "`rlhf sft --config FILE`: instruction tuning on demonstrations."),
    "Reward model": (RewardConfig, "`rlhf reward --config FILE`: a reward model from rankings."),
    "DPO": (DPOConfig, "`rlhf dpo --config FILE`: the policy from rankings, without a reward model and without RL."),
    "PPO": (PPOConfig, "`rlhf ppo --config FILE`: PPO against the reward."),
    "Specialist": (SpecialistConfig, "`rlhf specialist --config FILE`: a head for one labelled task."),
    "Pipeline": (PipelineConfig, "`rlhf pipeline --config FILE`: the stages in order, then the export."),
    "Comparison": (CompareConfig, "`rlhf compare --config FILE`: prompting, tuning, DPO and PPO, side by side."),
    "A task of a comparison": (ComparedTask, "A value of `tasks`."),
    "A way of a comparison": (WayConfig, "A value of `ways`."),
}

HEAD = """# Config reference

Generated from the config classes by `python -m rlhf.cli.config_docs > docs/config.md`; a test keeps it current.

- A config is a YAML file. Paths in it are relative to the folder where the command is started.
- `key=value` on the command line replaces a key of the file: `batch.max_steps=10 tuning=lora tuning.rank=8`. Values
  are YAML.
- Unknown keys, values out of range and values of the wrong type are refused, all faults of a file at once.
- Where the type is a *table*, the value is the name of one of its rows, or a mapping of `name` and the row's options:
  `tuning: {name: lora, rank: 8}`. The tables are at the end.
- `--dry-run` prints the resolved config and the preflight table. It checks everything that needs no weights: run
  folder, parents, datasets, DeepSpeed file. Names on the hub are not looked up (the table says so). A pipeline's dry
  run accepts runs that do not exist yet if an earlier stage of the pipeline makes them.
"""


def document() -> str:
    """The text of docs/config.md."""
    parts, tables = [HEAD], dict[int, Table]()
    every_stage = set(_keys(StageConfig, {}))
    for title, (kind, text) in SECTIONS.items():
        keys = [line for line in _keys(kind, tables) if kind is StageConfig or line not in every_stage]
        parts.append(f"## {title}\n\n{text}\n\n{_grid(('key', 'type', 'default', 'meaning'), keys)}")
    parts.append("## Tables\n\nThe rows that a config may name, and their options.")
    parts += [_table(table) for table in tables.values()]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _keys(kind: type[BaseModel], tables: dict[int, Table], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """A line for each key, with groups flattened to dotted keys. Adds the tables it finds to `tables`."""
    for name, field in kind.model_fields.items():
        group, optional = _group(field)
        for table in _tables(field.annotation, field.metadata):
            tables.setdefault(id(table), table)
        if group is None or optional:
            meaning = " ".join((field.description or "").split())
            yield f"`{prefix}{name}`", "group or null" if optional else _type(field), _default(field), meaning
        if group is not None:
            yield from _keys(group, tables, f"{prefix}{name}.")


def _tables(kind: Any, metadata: Iterable[Any] = ()) -> list[Table]:
    """The tables that a type picks from, also as the items of a list or the values of a mapping."""
    own = [part for part in metadata if isinstance(part, Table)]
    if get_origin(kind) is Annotated:
        inner, *rest = get_args(kind)
        return own + _tables(inner, rest)
    return own + [table for part in get_args(kind) if not isinstance(part, str) for table in _tables(part)]


def _group(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The class of a group of keys, and whether the group may be left out."""
    kinds = get_args(field.annotation) or (field.annotation,)
    groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return (groups[0], type(None) in kinds) if groups else (None, False)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()  # type: ignore[misc, call-arg]
    if isinstance(value, tuple):  # only the names of rows, since their options have their own table
        value = [one.name if isinstance(one, Pick) else one for one in value]
    return f"`{_plain(value.plain if isinstance(value, Pick) else value)}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)


def _type(field: FieldInfo) -> str:
    tables = _tables(field.annotation, field.metadata)
    if tables:
        link = f"[{tables[0].kind}](#{_anchor(tables[0].kind)})"
        if get_origin(field.annotation) in (list, tuple):
            return f"list of table rows: {link}"
        if get_origin(field.annotation) is dict:
            return f"mapping of text to table rows: {link}"
        return f"table: {link}" + " or null" * (type(None) in get_args(field.annotation))
    return _kind(field.annotation) + _bounds(field.metadata)


def _kind(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(parts[0]) + _bounds(parts[1:])
    if origin is Literal:
        return ", ".join(f"`{_plain(part)}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts)
    if origin in (list, tuple) and parts:
        inner = [_kind(part) for part in parts if part is not Ellipsis]
        return f"list of {inner[0]}" if origin is list else "[" + ", ".join(inner) + "]"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _bounds(metadata: Any) -> str:
    """The range of values; pydantic stores `Field(ge=0)` or the constraint itself."""
    flat = [part for found in metadata for part in (found.metadata if isinstance(found, FieldInfo) else [found])]
    signs = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}
    found = [f"{signs[type(b)][1]} {getattr(b, signs[type(b)][0]):g}" for b in flat if type(b) in signs]
    text = " " + ", ".join(found) if found else ""
    return text + ", not empty" * any(isinstance(part, MinLen) for part in flat)


def _table(table: Table) -> str:
    rows = "\n\n".join(_row(row) for row in table)
    return f'<a id="{_anchor(table.kind)}"></a>\n### {table.kind[0].upper()}{table.kind[1:]}\n\n{rows}'


def _row(row: TableRow) -> str:
    lines = [(f"`{name}`", _type(f), _default(f)) for name, f in row.options.model_fields.items()]
    grid = "\n\n" + _grid(("option", "type", "default"), lines) if lines else ""
    return f"#### `{row.name}`\n\n{_prose(row)}{grid}"


def _prose(row: TableRow) -> str:
    """The docstring without its sections on arguments and results, which are for programmers."""
    text = inspect.getdoc(row.fn) or ""
    text = re.split(r"\n\s*(?:Args|Returns|Raises|Attributes):\n", text)[0].strip()
    text = re.sub(r" Arguments and result as `\w+`\.", "", text).replace("::\n", ":\n")
    return "\n".join(line if line.startswith("    ") else line.replace("*", "\\*") for line in text.split("\n"))


def _grid(columns: tuple[str, ...], lines: Any) -> str:
    rows = [columns, ("---",) * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _anchor(text: str) -> str:
    return "table-" + re.sub(r"\W+", "-", text.lower())


if __name__ == "__main__":
    print(document(), end="")
