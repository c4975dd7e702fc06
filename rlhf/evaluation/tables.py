"""The evaluation of a reward model as lines and tables (title, columns, rows) for the console and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.core.console import format_number, say, table, warn

TableParts = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
MOST_PARTS = 20
VERDICTS = ("exploitable", "sensitive", "unclear", "robust")


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


def between(facts: Mapping[str, Any], form: str = ".1%") -> str:
    """The bounds of an interval; a dash where they are not known."""
    return span(facts["low"], facts["high"], form)


def span(low: float | None, high: float | None, form: str = ".1%") -> str:
    """`low to high`; a dash where they are not known."""
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def show_card(card: Mapping[str, Any], model: str) -> None:
    """Print the tables and sentences of a model's result on a dataset."""
    for part in card_tables(card):
        table(*part)
    for benchmark in card["benchmarks"]:
        for line in notes(benchmark):
            warn(line)
    perturbations = card["perturbations"]
    if perturbations:
        table(*battery_table(perturbations))
    say(f"{model} on {card['dataset']}:")
    for line in headlines(card) + (battery_lines(perturbations) if perturbations else []):
        say(f"  {line}")


def headlines(card: Mapping[str, Any]) -> list[str]:
    """The result on a dataset in a few sentences."""
    lines = [f"{one['name']}: {percent(one['score'])} ({between(one)})" for one in card["benchmarks"]]
    facts, human, lists = card["pairs"], card["agreement"], card["listwise"]
    if facts:
        right = facts["accuracy"]
        line = f"Right on {percent(right['value'])} of {right['count']:,} pairs of {right['prompts']:,} prompts"
        line += f" ({between(right)})"
        if human:
            line += f"; the annotators' ceiling is {percent(human['ceiling'])} ({span(*human['ceiling_interval'])})"
        lines.append(line)
        best = max(facts["baselines"], key=lambda one: one["value"])
        ahead = best["ahead"]
        word = "not measurably better than" if not (ahead["low"] or 0) > 0 else "better than"
        if (ahead["high"] or 0) < 0:
            word = "worse than"
        lines.append(
            f"It is {word} the best simple rule, {best['name']}: {percent(best['value'])},"
            f" a difference of {100 * ahead['value']:+.1f} points ({_points(ahead)})"
        )
        lines += _calibration_lines(facts["calibration"])
    if lists:
        lines.append(
            f"Its best of K is a best one in {percent(lists['best_of_k']['value'])} of {lists['rankings']:,} rankings"
            f" (by chance {percent(lists['best_of_k_chance'])}); Kendall's tau-b"
            f" {lists['kendall_tau_b']['value']:.3f} ({between(lists['kendall_tau_b'], '.2f')})"
        )
    return lines


def _points(facts: Mapping[str, Any]) -> str:
    return "-" if facts["low"] is None else span(100 * facts["low"], 100 * facts["high"], "+.1f")


def _calibration_lines(facts: Mapping[str, Any]) -> list[str]:
    refit = facts["refit"]
    if refit is None:
        return []
    if refit["low"] <= 1 <= refit["high"] or refit["log_loss_after"] >= refit["log_loss_before"]:
        how = "not measurably over- or underconfident"  # else a temperature of half of the prompts helps on the other
    else:
        how = "overconfident" if refit["temperature"] > 1 else "underconfident"
    return [
        f"It is {how}: calibration error {facts['error']:.3f}, temperature {format_number(refit['temperature'], 3)}"
        f" ({between(refit, '.2f')}); on the other half log loss {refit['log_loss_before']:.3f} ->"
        f" {refit['log_loss_after']:.3f}"
    ]


def card_tables(card: Mapping[str, Any]) -> list[TableParts]:
    """The tables of a dataset: accuracy with baselines, parts, whole rankings, benchmarks."""
    found, facts = list(map(benchmark_table, card["benchmarks"])), card["pairs"]
    if facts:
        found += [accuracy_table(card), *(slice_table(*one) for one in facts["slices"].items())]
    return found + ([listwise_table(card["listwise"])] if card["listwise"] else [])


def accuracy_table(card: Mapping[str, Any]) -> TableParts:
    """Accuracy of the model, of the baselines, and what the annotators allow."""
    facts, human = card["pairs"], card["agreement"]
    rows: list[tuple[Any, ...]] = [("the model", *_fraction(facts["accuracy"]), "")]
    for one in facts["baselines"]:
        ahead = f"{100 * one['ahead']['value']:+.1f} ({_points(one['ahead'])})"
        rows.append((one["name"], *_fraction(one), ahead))
    if human:
        rows.append(("annotators agree", percent(human["annotator_agreement"]), "", "", ""))
        rows.append(("annotators' ceiling", percent(human["ceiling"]), span(*human["ceiling_interval"]), "", ""))
    return "Accuracy", ("", "accuracy", "95% interval", "pairs", "the model is ahead by (points)"), rows


def _fraction(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return percent(facts["value"]), between(facts), facts["count"]


def slice_table(name: str, parts: list[dict[str, Any]]) -> TableParts:
    """The accuracy by one property."""
    title = f"By {name}" + (f" ({MOST_PARTS} of {len(parts)})" if len(parts) > MOST_PARTS else "")
    columns = (name, "accuracy", "95% interval", "pairs", "prompts", "log loss", "longer wins")
    rows = [
        (one["label"], *_fraction(one), one["prompts"], f"{one['log_loss']:.3f}", percent(one["longer"]))
        for one in parts[:MOST_PARTS]
    ]
    return title, columns, rows


def listwise_table(facts: Mapping[str, Any]) -> TableParts:
    """The metrics of whole rankings, with those of a random choice."""
    tau, regret, rating = facts["kendall_tau_b"], facts["regret"], facts["rating_regret"]
    rows: list[tuple[Any, ...]] = [
        ("Kendall's tau-b", f"{tau['value']:.3f}", between(tau, ".2f"), "0"),
        ("best of K is a best one", percent(facts["best_of_k"]["value"]), between(facts["best_of_k"]),
         percent(facts["best_of_k_chance"])),
        ("all best ones above all others", percent(facts["beats_all"]["value"]), between(facts["beats_all"]), ""),
        ("regret of the choice (0 best, 1 worst)", f"{regret['value']:.3f}", between(regret, ".2f"),
         f"{facts['regret_chance']:.3f}"),
    ]  # fmt: skip
    if rating:
        rows.append(("regret in the data's ratings", f"{rating['value']:.3f}", between(rating, ".2f"), ""))
    return f"Whole rankings: {facts['rankings']:,}", ("", "value", "95% interval", "by chance"), rows


def benchmark_table(facts: Mapping[str, Any]) -> TableParts:
    """The parts of a benchmark."""
    levels = ("easy", "normal", "hard") if facts["name"] == "rm-bench" else ()
    rows = [
        (name, *_fraction(part), *(percent(part[level]) for level in levels)) for name, part in facts["parts"].items()
    ]
    rows.append(("mean", percent(facts["score"]), between(facts), None, *(percent(facts[level]) for level in levels)))
    return facts["name"], ("", "score", "95% interval", "rows", *levels), rows


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What a benchmark's score leaves out."""
    found = [f"{facts['name']}: {count:,} rows left out: {reason}" for reason, count in facts["left_out"].items()]
    return found + [f"{name}: {part['note']}" for name, part in facts["parts"].items() if "note" in part]


def battery_table(facts: Mapping[str, Any]) -> TableParts:
    """The perturbations: effects, rises, flips, verdicts."""
    columns = ("", "verdict", "should", "effect, sd (95% interval)", "p", "rises", "flips", "answers")
    rows = []
    for one in facts["perturbations"]:
        if not one["answers"]:
            rows.append((one["name"], "not measured", _expected(one), "-", "-", "-", "-", 0))
            continue
        effect, p = one["effect"], one["p"]
        change = f"{effect['value']:+.2f} ({between(effect, '.2f')})"
        chance = "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
        shares = percent(one["rises"]["value"]), percent(one["flips"]["value"])
        rows.append((one["name"], one["verdict"], _expected(one), change, chance, *shares, one["answers"]))
    title = f"Perturbations of {facts['answers']:,} answers of {facts['rankings']:,} rankings"
    return title, columns, rows


def _expected(one: Mapping[str, Any]) -> str:
    return "stay" if one["expected"] == "same" else "fall"


def battery_lines(facts: Mapping[str, Any]) -> list[str]:
    """Which perturbations have which verdict, the worst first."""
    by_verdict: dict[str, list[str]] = {}
    for one in facts["perturbations"]:
        by_verdict.setdefault(one.get("verdict", "not measured"), []).append(one["name"])
    return [f"{word}: {', '.join(by_verdict[word])}" for word in (*VERDICTS, "not measured") if word in by_verdict]
