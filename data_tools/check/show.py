"""The report on the console, and the words and numbers that the HTML page shares with it."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.check.report import Measured, Report
from data_tools.check.rules import Rule
from data_tools.statistics.intervals import Estimate
from rlhf.core import console

GRADE_WORDS = {"bad": "bad", "look": "needs a look", "good": "good", "info": "", "none": "-"}
PARTS = {
    "duplicates": "Duplicates and leaks", "consistency": "Consistency", "biases": "Biases", "agreement": "Agreement",
    "annotators": "Annotators", "texts": "Texts",
}  # fmt: skip
MOST_ROWS = 20


def format_value(value: float | None, unit: str) -> str:
    """A fraction as a percentage; a whole number without decimals; a dash for None."""
    if value is None:
        return "-"
    if unit == "fraction":
        return f"{value:.1%}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.2f}"


def value_of(one: Measured, note: bool = True) -> str:
    """The metric's value with its note; a dash if it has none."""
    if one.found is None:
        return "-"
    suffix = f" ({one.found.note})" if note and one.found.note else ""
    return format_value(one.found.value, one.metric.unit) + suffix


def interval(found: Estimate | None, unit: str) -> str:
    """The 95 % interval; empty if there is none."""
    if found is None or found.low is None:
        return ""
    return f"{format_value(found.low, unit)} to {format_value(found.high, unit)}"


def basis(one: Measured) -> str:
    """What the value was counted over, or why there is none."""
    if one.found is None:
        return one.why
    sample = ""
    if one.sampled:  # a pair of near-duplicates is found only if both are in the sample
        misses = one.name.startswith(("near-duplicate", "near-contaminated"))
        sample = " (a sample; the whole dataset has more)" if misses else " (a sample)"
    return f"{one.found.n:,} {one.metric.basis}{sample}"


def conditions(one: Measured) -> str:
    """When the metric needs a look and when it is bad, in words."""
    scale, percent = (100, "%") if one.metric.unit == "fraction" else (1, "")
    parts = []
    for name, bounds in (("needs a look", one.metric.look), ("bad", one.metric.bad)):
        words = [f"{'above' if text[0] == '>' else 'below'} {float(text[1:]) * scale:g}{percent}" for text in bounds]
        parts += [f"{name} {' or '.join(words)}"] if words else []
    return "; ".join(parts)


def advice(one: Measured) -> str:
    """What to do: the metric's advice, or more judgements where only the interval reaches a threshold."""
    rules = (*one.metric.look, *one.metric.bad)
    value = one.found and one.found.value
    if one.grade != "look" or value is None or any(Rule.parse(text).holds(value) for text in rules):
        return str(one.metric.advice)
    return "Collect more: the value is good, but its interval reaches a threshold, so this is too little to be sure."


def ceiling_line(report: Report) -> str:
    """The accuracy that a reward model can reach, or why it is unknown; empty for other kinds than rankings."""
    one = report["ceiling"]
    if report.kind != "ranking":
        return ""
    if one.found is None:
        return (
            f"The agreement and the ceiling of a reward model are unknown: {one.why}. "
            "Have some hundred prompts ranked by two or more named annotators each."
        )
    bounds = f" ({interval(one.found, 'fraction')})" if one.found.low is not None else ""
    return (
        f"Agreement ceiling: a reward model cannot predict the choice of a single annotator more often than "
        f"{value_of(one)}{bounds}, by {basis(one)}."
    )


def headline(report: Report) -> str:
    """The result in one line."""
    bad, look, good = (len(report.of_grade(grade)) for grade in ("bad", "look", "good"))
    if not bad and not look:
        return f"All {good} metrics with a grade are good."
    parts = [f"{bad} bad"] * (bad > 0) + [f"{look} to look at"] * (look > 0) + [f"{good} good"]
    return ", ".join(parts) + "."


def missing(report: Report) -> dict[str, list[str]]:
    """Why metrics have no value -> their names."""
    found: dict[str, list[str]] = {}
    for one in report.of_grade("none"):
        found.setdefault(one.why, []).append(one.name)
    return found


def parts(report: Report) -> Iterator[tuple[str, str, list[Measured]]]:
    """The parts of the report: key, title and metrics with a value; without the parts that have none."""
    for part, title in PARTS.items():
        measured = [one for one in report.measured if one.metric.part == part and one.found is not None]
        if measured:
            yield part, title, measured


def show(report: Report) -> None:
    """Print the report."""
    for _, title, measured in parts(report):
        rows = [
            [m.name, value_of(m, False), interval(m.found, m.metric.unit), basis(m), GRADE_WORDS[m.grade]]
            for m in measured
        ]  # fmt: skip
        console.table(title, ["metric", "value", "95 % interval", "of", ""], rows)
    _show_annotators(report)
    for why, names in missing(report).items():
        console.say(f"not measured: {', '.join(names)}: {why}")
    if len(report.k) > 1:
        console.say(f"answers to rank: {', '.join(f'{k} in {times:,}' for k, times in report.k.items())}")
    console.say("")
    console.say(f"{report.path}: {report.records:,} records, {report.prompts:,} prompts: {headline(report)}")
    if ceiling_line(report):
        console.say(ceiling_line(report))
    for one in [*report.of_grade("bad"), *report.of_grade("look")]:
        words = f"{one.metric.summary} {advice(one)}"
        console.say(f"{GRADE_WORDS[one.grade]}: {one.name} {value_of(one)}: {words}")
    if report.bad_rows:
        console.warn(f"{sum(report.bad_rows.values()):,} bad rows were skipped: {report.bad_rows}")


def _show_annotators(report: Report) -> None:
    if report.annotators:
        rows = [
            [
                one.name, one.rankings, format_value(one.agreement and one.agreement.value, "fraction"),
                interval(one.agreement, "fraction"), format_value(one.first and one.first.value, "fraction"),
                None if one.seconds is None else round(one.seconds, 1), one.verdict + (", one-sided" * one.one_sided),
            ]
            for one in report.annotators[:MOST_ROWS]
        ]  # fmt: skip
        more = f" (the first {MOST_ROWS} of {len(report.annotators):,})" * (len(report.annotators) > MOST_ROWS)
        columns = ["annotator", "rankings", "agrees", "95 % interval", "prefers first", "median s", "verdict"]
        console.table(f"Annotators{more}", columns, rows)
    if report.authors:
        rows = [
            [a.name, format_value(a.rate.value, "fraction"), interval(a.rate, "fraction"), a.rate.n]
            for a in report.authors
        ]
        columns = ["author", "win rate", "95 % interval", "pairs"]
        console.table("Win rates against other authors, without ties", columns, rows)


def show_rules(report: Report) -> None:
    """Print which rules fired, and which have no value to compare."""
    for rule in report.without_value:
        console.warn(f"--fail-on {rule}: not checked: {report[rule.metric].why}")
    for rule in report.fired:
        console.say(f"--fail-on {rule}: fired: {rule.metric} is {value_of(report[rule.metric])}", style="red")
    if report.rules and not report.fired:
        console.say("no --fail-on rule fired")
