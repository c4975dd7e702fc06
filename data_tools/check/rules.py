"""Conditions on metrics: when a metric is good, needs a look or is bad, and the rules of `--fail-on`."""

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


@dataclass(frozen=True)
class Rule:
    """A condition on a metric, such as ``agreement<0.6``. The rule fires if it holds."""

    metric: str
    operator: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From text: a metric's name (or none), an operator and a number.

        Raises:
            ValueError: The text has another form.
        """
        match = re.fullmatch(r"\s*([a-z-]*)\s*(>=|<=|==|>|<)\s*(\S+)\s*", text)
        if match is None:
            raise ValueError(text)
        return cls(match[1], match[2], float(match[3]))

    def holds(self, value: float) -> bool:
        return OPERATORS[self.operator](value, self.number)

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.number:g}"


def parse_rules(texts: Iterable[str], near: bool, against: bool) -> list[Rule]:
    """The rules of `--fail-on`, each the name of a metric, an operator (> >= < <= ==) and a number.

    Args:
        near: Near-duplicates are searched for.
        against: Evaluation sets are given.

    Raises:
        UserError: A text is not a rule, its metric is unknown (with the nearest name), or these options switch the
            metric off.
    """
    rules = []
    names = [row.name for row in METRICS]
    for text in texts:
        try:
            rule = Rule.parse(text)
        except ValueError:
            why = "A rule is the name of a metric, one of > >= < <= ==, and a number (a fraction is from 0 to 1)."
            raise UserError(f"--fail-on {text!r}: not a rule", why, "Write, for instance, 'agreement<0.6'.") from None
        if rule.metric not in names:
            raise UserError(f"--fail-on {text!r}: unknown metric {rule.metric!r}; {nearest(rule.metric, names)}")
        if not near and rule.metric.startswith("near-") and rule.metric != "near-identical-pairs":
            raise UserError(f"--fail-on {rule}: --no-near switches this metric off", remedy="Remove one of the two.")
        if not against and rule.metric.endswith("contaminated-prompts"):
            raise UserError(f"--fail-on {rule}: needs evaluation sets", remedy="Give them with --against.")
        rules.append(rule)
    return rules


def grade(found: Estimate, look: tuple[str, ...], bad: tuple[str, ...], census: bool = False) -> str:
    """good, look or bad; info for a metric without conditions.

    It is bad only if its whole interval is, and good only if no value of the interval needs a look or is bad: a handful
    of judgements cannot show that all is well. What is between needs a look.

    Args:
        census: The metric counts a fact of this very dataset, such as its duplicates: it is good by its value.
    """
    if not look and not bad:
        return "info"
    bounds = [value for value in (found.value, found.low, found.high) if value is not None]
    if any(all(map(Rule.parse(text).holds, bounds)) for text in bad):
        return "bad"
    judged = [found.value] if census else bounds
    return "look" if any(Rule.parse(text).holds(value) for text in (*look, *bad) for value in judged) else "good"
