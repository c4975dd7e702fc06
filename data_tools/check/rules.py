"""Conditions on metrics: when a figure is good, needs a look or is bad, and the rules of `--fail-on`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from data_tools.check.metrics import METRICS
from data_tools.statistics.intervals import Estimate
from rlhf.core.errors import UserError, nearest

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*([a-z-]*)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Rule:
    """A condition on a metric, such as ``agreement<0.6``: it fires where the condition holds."""

    metric: str
    operator: str
    number: float

    def holds(self, value: float) -> bool:
        return OPERATORS[self.operator](value, self.number)

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.number:g}"


def parse_rule(text: str) -> Rule:
    """A rule from its words: the name of a metric, an operator (> >= < <= ==) and a number.

    Raises:
        UserError: Another form, or an unknown metric (with the nearest).
    """
    match = _CONDITION.fullmatch(text)
    try:
        name, sign, number = match.groups() if match else ("", "", "")
        rule = Rule(name, sign, float(number))
    except ValueError:
        why = "A rule is the name of a metric, one of > >= < <= ==, and a number (a share from 0 to 1)."
        raise UserError(f"--fail-on {text!r}: not a rule", why, "Write, for instance, 'agreement<0.6'.") from None
    names = [row.name for row in METRICS]
    if rule.metric not in names:
        raise UserError(f"--fail-on {text!r}: unknown metric {rule.metric!r}; {nearest(rule.metric, names)}")
    return rule


def parse_rules(texts: Iterable[str], near: bool, against: bool) -> list[Rule]:
    """The rules of `--fail-on`.

    Args:
        near: Near-duplicates are looked for.
        against: Evaluation sets are given.

    Raises:
        UserError: Not a rule, an unknown metric, or one that these options switch off.
    """
    rules = [parse_rule(text) for text in texts]
    for rule in rules:
        if not near and rule.metric.startswith("near-") and rule.metric != "near-identical-pairs":
            raise UserError(f"--fail-on {rule}: --no-near switches that search off", remedy="Leave one of them out.")
        if not against and rule.metric.endswith("contaminated-prompts"):
            raise UserError(f"--fail-on {rule}: needs evaluation sets", remedy="Name them with --against.")
    return rules


def grade(found: Estimate, look: tuple[str, ...], bad: tuple[str, ...]) -> str:
    """good, look or bad; or info where nothing is good or bad.

    It is bad only where the whole interval is: a figure that may be bad, and may not, needs a look.
    """
    if not look and not bad:
        return "info"
    if any(_surely(found, _condition(text)) for text in bad):
        return "bad"
    return "look" if any(_condition(text).holds(found.value) for text in (*look, *bad)) else "good"


def _condition(text: str) -> Rule:
    match = _CONDITION.fullmatch(text)
    assert match, text
    return Rule("", match[2], float(match[3]))


def _surely(found: Estimate, rule: Rule) -> bool:
    return all(rule.holds(value) for value in (found.value, found.low, found.high) if value is not None)
