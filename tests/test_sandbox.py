"""Expressions and templates of users: they compute, and reach nothing else."""

from __future__ import annotations

import pytest

from data_tools.io.expressions import Expression, Failed, Template
from rlhf.core.errors import UserError

VALUES = {"text": "Hello World", "n": 3, "none": None, "items": [{"text": "a", "n": 1}, {"text": "b", "n": 5}]}


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("n + 1 > 3 and not none", True),
        ("'World' in text", True),
        ("text.lower().split()[1]", "world"),
        ("text is search('^hello')", False),
        ("text|lower is search('^hello')", True),
        ("text|regex_replace('o.*r', '-')", "Hell-ld"),
        ("items|map(attribute='n')|max", 5),
        ("items[1].text ~ '{{ n }}'", "b{{ n }}"),  # a value is never taken as a template
        ("7 % 4 * 2 ** 3", 24),
    ],
)
def test_expressions_compute(source, value):
    assert Expression(source, "--where")(VALUES) == value


ESCAPES = [
    "text.__class__", "''.__class__.__mro__[1].__subclasses__()", "text['__class__']", "[].__class__.__base__",
    "items|map(attribute='__class__')|first|string", "self._TemplateReference__context", "none.__init__.__globals__",
    "text.format.__self__", "('{0.__class__}').format(n)", "'{x.__class__}'.format_map({'x': n})", "text.encode()",
    "items.append(1)", "items[0].pop('n')", "items[0].update(a=1)", "range(10)", "lipsum()", "cycler(1)",
    "namespace(a=1)", "joiner()", "dict()", "text|map('center', 9)|list", "text|map('attr', '__class__')|list",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_but_the_values_can_be_reached(source):
    for make in (lambda: Expression(source, "-")(VALUES), lambda: Template(f"{{{{ {source} }}}}", "-")(VALUES)):
        with pytest.raises(Failed) as caught:
            made = make()
            raise AssertionError(f"gave {made!r}")
        assert "0x" not in str(caught.value)
    assert VALUES["items"] == [{"text": "a", "n": 1}, {"text": "b", "n": 5}]


@pytest.mark.parametrize(
    "source",
    ["'a' * 10**9", "[1] * 10**9", "10**9 * 'a'", "9**99999", "2**64**64**64", "'%999999999d' % 1", "(2**60)**60**60"],
)
def test_what_would_fill_the_memory_or_never_end_is_refused(source):
    with pytest.raises(Failed, match=r"is too large|is for numbers"):
        Expression(source, "--where")({})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("n >", "not an expression"),
        ("", "not an expression"),
        ("n n", "not an expression"),
        ("n|center(10**9)", "No filter named 'center'"),
        ("n|attr('__class__')", "No filter named 'attr'"),
        ("(" * 5000 + "1" + ")" * 5000, "nested too deeply|too many nested"),
        ("n or " * 9000 + "n", "longer than 20,000 characters"),
        ("n > 1 and ties", "there is no field 'ties'"),
    ],
)
def test_what_is_no_expression_is_reported_before_any_value_is_seen(source, message):
    with pytest.raises(UserError, match=message):
        Expression(source, "--where", known=["n", "tied"])


def test_an_unknown_field_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"--where 'annotater == 1': there is no field 'annotater'") as caught:
        Expression("annotater == 1", "--where", known=["annotator", "answer"])
    assert caught.value.remedy == "did you mean 'annotator'? Valid: annotator, answer"


@pytest.mark.parametrize(
    ("source", "message"),
    [("none < 3", "'<' not supported"), ("items[9]", "no element 9"), ("1 / 0", "division by zero"), ("ties", "ties"),
     ("text is search('(')", "unterminated subpattern"), ("items[0].k", "no attribute 'k'")],
)  # fmt: skip
def test_values_with_which_it_cannot_be_computed_are_reported(source, message):
    with pytest.raises(Failed, match=message):
        Expression(source, "--where")(VALUES)


def test_templates_render_text_as_it_is():
    template = Template("{{ text }} & <{{ n }}>{% for i in items %} {{ loop.index }}:{{ i.text }}{% endfor %}", "t")
    assert template(VALUES) == "Hello World & <3> 1:a 2:b"
    assert template.names == {"text", "n", "items"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ text", "t.yaml, one: not a Jinja template: line 1"),
        ("\n\n{{ text|no }}", "line 3: No filter named 'no'"),
        ("{% include '/etc/passwd' %}", "cannot load another"),
        ("{% import text as x %}", "cannot load another"),
        ("{% extends text %}", "cannot load another"),
        ("{{ txt }}", "there is no field 'txt'"),
    ],
)
def test_what_is_no_template_is_reported_with_its_place(source, message):
    with pytest.raises(UserError, match=message):
        Template(source, "t.yaml, one", known=VALUES)


def test_a_macro_cannot_be_called_and_a_missing_value_is_no_empty_text():
    with pytest.raises(Failed, match="may not be called"):
        Template("{% macro f() %}x{% endmacro %}{{ f() }}", "t")({})
    with pytest.raises(Failed, match="'text' is undefined"):
        Template("{{ text }}", "t")({})
