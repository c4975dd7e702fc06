"""Limits on what is read from files, all in one place, and the readers of YAML and JSON that keep them.

A file beyond a limit is refused before it takes the machine's memory or hours of time. The limits are far above what
configs, models and datasets need.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

YAML_BYTES = 1 << 18
"""Most bytes of a YAML text."""
YAML_VALUES = 100_000
"""Most values of a YAML text, with those behind an alias counted each time that it is used."""
DEPTH = 50
"""Most levels of lists and mappings in each other, in YAML and in the JSON files of models and runs."""
ROW_BYTES = 1 << 28
"""Most bytes of one line in a JSON lines file."""
UNPACKED_BYTES = 1 << 28
UNPACKED_RATIO = 200
"""A gzip or zstd file with more than UNPACKED_BYTES of content may unpack to at most UNPACKED_RATIO times its size.
Text packs to a tenth; zeros to a thousandth."""
MODEL_PARTS = 10_000
"""Most layers, and most experts of a layer, in the config of a model."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Stricter than PyYAML: keys are text and unique. A date is text, because no setting is a date.

    Raises:
        ValueError: Not YAML, or beyond a limit.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"longer than {YAML_BYTES:,} characters")
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML raises these for values that do not fit their tag, such as `!!timestamp today`
        raise ValueError(f"not valid YAML: {type(error).__name__}: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file; see `parse_yaml`.

    Raises:
        ValueError: Not UTF-8, not YAML, or beyond a limit.
        OSError: The file cannot be read.
    """
    if Path(path).stat().st_size > 4 * YAML_BYTES:  # a character has at most 4 bytes
        raise ValueError(f"longer than {YAML_BYTES:,} characters")
    return parse_yaml(Path(path).read_text("utf-8"))


class _StrictLoader(yaml.SafeLoader):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value with all that is in it; called for the values in it by PyYAML."""
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        if self._depth == DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEPTH} levels", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and node not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias inside of what it refers to", problem_mark=mark)
        if node is not None and not alias:
            self._sizes[node] = size = 1 + sum(self._sizes[inner] for inner in _inside(node))
            if size > YAML_VALUES:
                raise yaml.MarkedYAMLError(problem=f"more than {YAML_VALUES:,} values", problem_mark=mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; PyYAML would silently take the last of two equal keys."""
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.MarkedYAMLError(problem="a key that is not text; quote it", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _inside(node: yaml.Node) -> list[yaml.Node]:
    """The values in a list or mapping, keys included."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    node.value.encode("utf-8")  # raises an error for half of a surrogate pair, which no file can hold
    return []


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: Not JSON, or nested deeper than DEPTH.
    """
    too_deep = f"nested deeper than {DEPTH} levels"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    except json.JSONDecodeError as fault:
        raise ValueError(_why_not_json(text, fault)) from None
    level, depth = _children([value]), 1
    while level := [inner for part in level for inner in _children(part)]:
        if (depth := depth + 1) > DEPTH:
            raise ValueError(too_deep)
    return value


def _why_not_json(text: str, fault: json.JSONDecodeError) -> str:
    if not text.strip():
        return "it is empty"
    if fault.pos >= len(text.rstrip()) or fault.msg.startswith("Unterminated string"):
        return f"the JSON ends in the middle, in line {text.count(chr(10)) + 1:,}"
    return f"not JSON: {fault}"


def _children(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in inside if isinstance(inner, (dict, list))]


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: Not UTF-8, not a JSON object, or beyond a limit.
        OSError: The file cannot be read.
    """
    value = parse_json(Path(path).read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value
