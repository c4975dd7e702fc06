"""The summary of `rlhf demo`, as tables on the console and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from data_tools.demo_world.rules import BEST, POINTS
from rlhf.core.console import format_number, say, table

RULE = {
    "answers": "states what was asked for, truly",
    "names": "names the animal as asked",
    "informs": "adds another fact",
    "courteous": "is courteous",
    "rude": "is rude",
    "false": "false statements",
    "repeated": "repetitions",
    "off_topic": "off-topic sentences",
    "garbled": "garbled sentences",
    "unfinished": "breaks off",
    "surplus": "sentences too many",
}
"""What the hidden rule checks, in words."""


class ReportTable(NamedTuple):
    """A table of the report."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def parts(summary: dict[str, Any]) -> list[ReportTable]:
    """The tables of a demo's summary."""
    return [
        _policies(summary),
        _rule(summary),
        _reward_model(summary["reward_model"]),
        _samples(summary),
        _time(summary),
    ]


def _policies(summary: dict[str, Any]) -> ReportTable:
    before, after, compared = summary["policies"]["sft"], summary["policies"]["ppo"], summary["comparison"]
    count = compared["wins"] + compared["losses"] + compared["ties"]
    rows: list[tuple[Any, ...]] = [
        (f"points by the hidden rule, mean (at most {format_number(BEST)})", before["points"], after["points"]),
        ("score by the reward model, mean", before["score"], after["score"]),
        ("answer length, tokens", before["tokens"], after["tokens"]),
        ("answers that ended", _percent(before["ended"]), _percent(after["ended"])),
        ("KL from the SFT policy, nats an answer", 0.0, summary["kl"]),
        ("prompts won", compared["losses"], compared["wins"]),
        ("  tied", compared["ties"], compared["ties"]),
        ("  won among the decided, with 95% interval", "", _percent(compared["win_rate"], compared["interval"])),
    ]
    title = (
        f"The policies on {count} prompts that no stage has read (temperature {format_number(summary['temperature'])})"
    )
    return ReportTable(title, ("", "SFT", "PPO"), rows)


def _rule(summary: dict[str, Any]) -> ReportTable:
    before, after = summary["policies"]["sft"], summary["policies"]["ppo"]
    rows = [(words, POINTS[name], before[name], after[name]) for name, words in RULE.items()]
    return ReportTable("What the hidden rule found in them, mean an answer", ("", "points", "SFT", "PPO"), rows)


def _reward_model(found: dict[str, Any]) -> ReportTable:
    rows: list[tuple[Any, ...]] = [
        ("the reward model, against an annotator", _percent(found["accuracy"], found["accuracy_interval"])),
        ("one annotator, against another", _percent(found["agreement"], found["agreement_interval"])),
        ("most that anyone can reach, by their agreement", _percent(found["ceiling"])),
        ("the hidden rule itself, against an annotator", _percent(found["rule_accuracy"])),
        ("the longer answer, against an annotator", _percent(found["longer_accuracy"])),
        ("the reward model, against the hidden rule", _percent(found["accuracy_by_rule"])),
    ]
    title = (
        f"Which of two answers is better: {found['pairs']:,} held-out pairs, {_percent(found['tied_share'])} more tied"
    )
    return ReportTable(title, ("who says it", "right, with 95% interval"), rows)


def _samples(summary: dict[str, Any]) -> ReportTable:
    rows = [
        (
            sample["prompt"],
            *(f"{sample[name]['answer']} ({format_number(sample[name]['points'])})" for name in ("sft", "ppo")),
        )
        for sample in summary["samples"]
    ]
    return ReportTable("The first prompt of each kind, and the points of its answers", ("prompt", "SFT", "PPO"), rows)


def _time(summary: dict[str, Any]) -> ReportTable:
    rows = [(step, round(seconds, 1)) for step, seconds in summary["seconds"].items()]
    return ReportTable("Time", ("step", "seconds"), [*rows, ("in all", round(sum(seconds for _, seconds in rows), 1))])


def _percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A fraction in per cent, with its interval."""
    if value is None:
        return "-"
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _intro(summary: dict[str, Any]) -> str:
    counts = {
        name: ", ".join(f"{count:,} {split}" for split, count in splits.items() if count)
        for name, splits in summary["records"].items()
    }
    data = "; ".join(f"{name}: {splits}" for name, splits in counts.items())
    return f"Seed {summary['seed']}. Base model: {summary['base']['parameters']:,} parameters. Data: {data}."


def _next(summary: dict[str, Any]) -> list[str]:
    export = summary["export"]
    return [
        f"The policy, for plain transformers: {export}",
        f"Chat with it: rlhf chat {quote(export)}",
        "Ask it, for example: " + summary["samples"][0]["prompt"],
    ]


def show(summary: dict[str, Any]) -> None:
    """Print the summary."""
    say("")
    say(_intro(summary))
    for part in parts(summary):
        say("")
        table(*part)
    say("")
    for line in _next(summary):
        say(line)


def write_markdown(summary: dict[str, Any], path: Path) -> None:
    """Write the summary as Markdown."""
    lines = ["# rlhf demo", "", _intro(summary)]
    for part in parts(summary):
        lines += ["", f"## {part.title}", "", _row(part.columns), _row("---" for _ in part.columns)]
        lines += [_row(map(format_number, row)) for row in part.rows]
    path.write_text("\n".join([*lines, "", *_next(summary)]) + "\n", "utf-8")


def _row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
