"""Figures in words, and the report on the console."""

from __future__ import annotations

from data_tools.check.report import Measured, Report
from data_tools.statistics.intervals import Estimate
from rlhf.core import console

GRADE_WORDS = {"bad": "bad", "look": "needs a look", "good": "good", "info": "", "none": "-"}
PARTS = {
    "duplicates": "Duplicates and leaks",
    "consistency": "Consistency",
    "biases": "Biases",
    "agreement": "Agreement",
    "annotators": "Annotators",
    "texts": "Texts",
}
MOST_ROWS = 20


def figure(value: float | None, unit: str) -> str:
    """A value as people read it: a share in per cent, a whole number whole."""
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.2f}"


def value_of(one: Measured, note: bool = True) -> str:
    """The metric's figure, with its note; a dash where there is none."""
    if one.found is None:
        return "-"
    return figure(one.found.value, one.row.traits["unit"]) + (f" ({one.found.note})" if note and one.found.note else "")


def interval(found: Estimate | None, unit: str) -> str:
    """The 95 % interval; empty where there is none."""
    if found is None or found.low is None:
        return ""
    return f"{figure(found.low, unit)} to {figure(found.high, unit)}"


def basis(one: Measured) -> str:
    """What the figure rests on, or why there is none."""
    if one.found is None:
        return one.why
    sample = ""
    if one.sampled:
        pairs_are_lost = one.name.startswith(("near-duplicate", "near-contaminated"))
        sample = " (a sample; the whole has more)" if pairs_are_lost else " (a sample)"
    return f"{one.found.n:,} {one.row.traits['basis']}{sample}"


def conditions(one: Measured) -> str:
    """When the metric needs a look and when it is bad, in words."""
    share = one.row.traits["unit"] == "share"
    told = []
    for name, bounds in (("needs a look", one.row.traits["look"]), ("bad", one.row.traits["bad"])):
        limits = [f"{float(text[1:]) * 100:g}%" if share else text[1:] for text in bounds]
        words = [("above " if text[0] == ">" else "below ") + limit for text, limit in zip(bounds, limits)]
        told += [f"{name} {' or '.join(words)}"] if words else []
    return "; ".join(told)


def ceiling_line(report: Report) -> str:
    """What a reward model can reach, in a sentence, or why nobody can tell; empty for other kinds than rankings."""
    one = report["ceiling"]
    if report.kind != "ranking":
        return ""
    if one.found is None:
        todo = "Have some hundred prompts ranked by two or more people each, under their names."
        return f"Agreement, and the ceiling of a reward model, are unknown: {one.why}. {todo}"
    reach = f"{value_of(one)} ({interval(one.found, 'share')})" if one.found.low is not None else value_of(one)
    return f"Agreement ceiling: against the choice of one annotator no reward model can be right in more than {reach}."


def answers_line(report: Report) -> str:
    """How many answers a record has."""
    return ", ".join(f"{k} in {times:,}" for k, times in report.k.items())


def headline(report: Report) -> str:
    """The verdict in one line."""
    bad, look = len(report.of_grade("bad")), len(report.of_grade("look"))
    if not bad and not look:
        return f"Nothing stands out: all {len(report.of_grade('good'))} metrics that can be judged are good."
    parts = [f"{bad} bad"] * (bad > 0) + [f"{look} to look at"] * (look > 0) + [f"{len(report.of_grade('good'))} good"]
    return ", ".join(parts) + "."


def show(report: Report) -> None:
    """Print the report."""
    for part, title in PARTS.items():
        rows = [
            [
                one.name,
                value_of(one, note=False),
                interval(one.found, one.row.traits["unit"]),
                basis(one),
                GRADE_WORDS[one.grade],
            ]
            for one in report.measured
            if one.row.traits["part"] == part and one.found is not None
        ]
        if rows:
            console.table(title, ["metric", "value", "95 % interval", "of", ""], rows)
    _show_people(report)
    missing: dict[str, list[str]] = {}
    for one in report.of_grade("none"):
        missing.setdefault(one.why, []).append(one.name)
    for why, names in missing.items():
        console.say(f"not measured: {', '.join(names)}: {why}")
    if len(report.k) > 1:
        console.say(f"answers to rank: {answers_line(report)}")
    console.say("")
    console.say(f"{report.records:,} records over {report.prompts:,} prompts in {report.path}: {headline(report)}")
    if ceiling_line(report):
        console.say(ceiling_line(report))
    for one in [*report.of_grade("bad"), *report.of_grade("look")]:
        console.say(
            f"{GRADE_WORDS[one.grade]}: {one.name} {value_of(one)}: {one.row.summary} {one.row.traits['advice']}"
        )
    if report.bad_rows:
        console.warn(f"{sum(report.bad_rows.values()):,} bad rows were left out: {report.bad_rows}")


def _show_people(report: Report) -> None:
    if report.annotators:
        rows = [
            [
                one.name, one.rankings, figure(one.agreement and one.agreement.value, "share"),
                interval(one.agreement, "share"), figure(one.first and one.first.value, "share"),
                None if one.seconds is None else round(one.seconds, 1), one.verdict + (", one-sided" * one.one_sided),
            ]
            for one in report.annotators[:MOST_ROWS]
        ]  # fmt: skip
        title = "Annotators" + (
            f" (the first {MOST_ROWS} of {len(report.annotators):,})" * (len(report.annotators) > MOST_ROWS)
        )
        columns = ["annotator", "rankings", "with the others", "95 % interval", "first wins", "median s", "verdict"]
        console.table(title, columns, rows)
    if report.authors:
        rows = [[a.name, figure(a.share.value, "share"), interval(a.share, "share"), a.share.n] for a in report.authors]
        console.table("Win rates against other authors, ties aside", ["author", "wins", "95 % interval", "pairs"], rows)


def show_rules(report: Report) -> None:
    """Print which rules fired, and which could not be tried."""
    for rule in report.without_value:
        console.warn(f"--fail-on {rule}: not tried: {report[rule.metric].why}")
    for rule in report.fired:
        console.say(f"--fail-on {rule}: fired: {rule.metric} is {value_of(report[rule.metric])}", style="red")
    if report.rules and not report.fired:
        console.say("no --fail-on rule fired")
