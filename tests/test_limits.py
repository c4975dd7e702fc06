"""Files beyond the limits, and files that are not what their name says, give one error in moments."""

from __future__ import annotations

import datetime
import json

import pytest

from rlhf.config.load import override_values, read_values
from rlhf.core.errors import UserError
from rlhf.core.limits import DEPTH, YAML_BYTES, YAML_VALUES, parse_json, parse_yaml, read_json_object, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30)
)
FAULTS = [
    (BOMB, "more than 100,000 values"),
    (MERGE_BOMB, "more than 100,000 values"),
    ("a: &a [*a]", "an alias inside of what it refers to"),
    ("a: &a {b: {c: *a}}", "an alias inside of what it refers to"),
    ("a: " + "[" * 100_000, "nested deeper than 50 levels"),
    ("a: " + "[" * 60 + "]" * 60, "nested deeper than 50 levels"),
    ("\n".join(" " * n + "- a:" for n in range(0, 200, 2)), "nested deeper than 50 levels"),
    ("a: " + "x" * YAML_BYTES, "longer than 262,144 characters"),
    ("1: x", "a key that is not text"),
    ("{a: {null: x}}", "a key that is not text"),
    ("yes: x", "a key that is not text"),
    ("? [a, b]\n: x", "a key that is not text"),
    ("? {a: b}\n: x", "a key that is not text"),
    ("a: !!timestamp today", "not valid YAML"),
    ("a: !!int many", "not valid YAML"),
    ("a: !!map [b]", "not valid YAML"),
    ("a: !!python/object:os.system x", "not valid YAML"),
    ("a: " + "9" * 5000, "not valid YAML"),
    ('a: "\\uD800"', "not valid YAML"),
    ("a: \0", "not valid YAML"),
    ("a: *b", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "fault"), FAULTS, ids=[text[:20] for text, _ in FAULTS])
def test_yaml_beyond_a_limit_or_not_yaml_is_one_error(tmp_path, text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_yaml(text)
    (tmp_path / "sft.yaml").write_text(text, "utf-8", "surrogatepass")
    with pytest.raises(UserError, match=fault):
        read_values(tmp_path / "sft.yaml")


def test_a_date_is_text():
    assert parse_yaml("run: 2026-11-28") == {"run": "2026-11-28"}
    values = {}
    override_values(values, ["run=2026-11-28", "data.train=2026-13-45"])
    assert values == {"run": "2026-11-28", "data": {"train": "2026-13-45"}}
    assert parse_yaml("a: !!timestamp 2026-11-28") == {"a": datetime.date(2026, 11, 28)}  # asked for


def test_anchors_and_merge_keys_work_within_the_limits():
    text = "base: &base {lr: 1e-5, betas: [0.9, 0.95]}\nsft: {<<: *base, epochs: 2}\nreward: *base\n"
    assert parse_yaml(text)["sft"] == {"lr": "1e-5", "betas": [0.9, 0.95], "epochs": 2}
    assert parse_yaml(text)["reward"] == {"lr": "1e-5", "betas": [0.9, 0.95]}
    assert parse_yaml("[" + "0, " * (YAML_VALUES // 10) + "]")


def test_an_override_keeps_the_limits():
    with pytest.raises(UserError, match=r"override 'a=\[\[.*nested deeper"):
        override_values({}, ["a=" + "[" * 1000])
    with pytest.raises(UserError, match=r"override 'a=\{1: 2\}'.*a key that is not text"):
        override_values({}, ["a={1: 2}"])


def nested(levels):
    return "[" * levels + "]" * levels


def test_json_has_the_same_depth():
    assert parse_json(nested(DEPTH)) == json.loads(nested(DEPTH))
    for levels in (DEPTH + 1, 100_000):
        with pytest.raises(ValueError, match="nested deeper than 50 levels"):
            parse_json(nested(levels))
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json('{"a":' * 60 + "1" + "}" * 60)


def test_a_json_file_that_is_not_an_object_is_refused(tmp_path):
    file = tmp_path / "config.json"
    for content in (b"[1]", b"null", b"{", b"\xff", b"", nested(100_000).encode()):
        file.write_bytes(content)
        with pytest.raises(ValueError):
            read_json_object(file)


def test_a_yaml_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "it is empty"), (" \n", "it is empty"), ('{"a":\n [1,', "ends in the middle, in line 2"),
        ('{"a": "b', "ends in the middle, in line 1"), ('{"a" 1}', "not JSON: .* line 1 column 6"),
        ("{}\n{}", "not JSON: Extra data: line 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_json_text_is_said_in_words(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_json(text)
