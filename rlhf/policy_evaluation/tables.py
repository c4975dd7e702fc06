"""The evaluation of policies as lines and tables (title, columns, rows) for the console and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.core.console import format_number, say, table, warn
from rlhf.evaluation.tables import TableParts, percent, span

METRICS = {
    "records": ("answers in the data", "", ""),
    "loss": ("loss, nats a token", "", "of the data's answers; lower is better"),
    "perplexity": ("perplexity", "", "its exponential"),
    "prompts": ("prompts", "", ""),
    "refused": ("prompts refused by the chat template", "", ""),
    "score": ("mean score", "", "by the reward; higher is better"),
    "kl": ("KL to the reference, nats an answer", "", "estimator k1, as eval/kl of PPO"),
    "kl_k3": ("the same by k3", "", "never negative; should agree with k1"),
    "kl_per_token": ("KL a token", "", ""),
    "answer_tokens": ("answer length, tokens", "", ""),
    "eos_rate": ("answers that ended", "%", "the others were cut off"),
    "refusals": ("answers that refuse", "%", "by their first words"),
    "repetition": ("repeated 4-grams of words", "%", "within an answer; rises when a policy loops"),
    "distinct_1": ("distinct words", "%", "of all words"),
    "distinct_2": ("distinct pairs of words", "%", "of all pairs"),
    "self_bleu": ("self-BLEU", "", "0 to 100; high: the answers resemble each other"),
}
"""Key of a policy's metrics -> its name, `%` for a fraction, and what it means."""


def show(result: Mapping[str, Any]) -> None:
    """Print an evaluation's tables and sentences."""
    for part in (metric_table(result), *map(annotator_table, comparisons(result))):
        if part is not None:
            table(*part)
    for line in headlines(result):
        say(line)
    for one in comparisons(result):
        if one.get("unreadable"):
            warn(f"{one['unreadable']:,} comparisons without a readable verdict were left out")


def comparisons(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """All win rates of a result, each with the name of its opponent as `against`: from rankings several."""
    if "comparison" in result:
        return [{"against": result["against"]["model"], **result["comparison"]}]
    return result.get("comparisons", [])


def metric_rows(result: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """Name, values of each policy with their intervals, and meaning, of what was measured."""
    columns = [one for one in (result.get("policy"), result.get("against")) if one]
    return [
        (name, [_cell(column, key, unit) for column in columns], meaning)
        for key, (name, unit, meaning) in METRICS.items() if columns and key in columns[0]
    ]  # fmt: skip


def metric_table(result: Mapping[str, Any]) -> TableParts | None:
    """The metrics of one or two policies for the console."""
    rows = metric_rows(result)
    if not rows:
        return None
    names = [result["model"], *([result["against"]["model"]] if "against" in result else [])][: len(rows[0][1])]
    return f"Held-out: {result['dataset']}", ("", *names), [(name, *values) for name, values, _ in rows]


def _cell(metrics: Mapping[str, Any], key: str, unit: str) -> str:
    value = metrics.get(key)
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if unit:
        return percent(value)
    return format_number(value) + _bounds(metrics, key)


def _bounds(metrics: Mapping[str, Any], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return "" if low is None or high is None else f" ({format_number(low)} to {format_number(high)})"


def headlines(result: Mapping[str, Any]) -> list[str]:
    """The result in a few sentences."""
    return [*_wins(result), *_distance(result), *_tax(result)]


def _wins(result: Mapping[str, Any]) -> Iterator[str]:
    who = result["model"]
    for one in comparisons(result):
        rate = f"{one['win_rate']:.1%} (95% Wilson interval {span(*one['interval'])})"
        yield f"Win rate of {who} against {one['against']}: {rate}"
        counted = ", ".join(_counted(one[words], words) for words in ("wins", "ties", "losses"))
        counts = f"{counted}; a tie counts half"
        if "annotators" in one:
            named = f"{one['annotators']:,} named annotator{'s' * (one['annotators'] != 1)}"
            people = named if one["annotators"] else "annotators without a name"
            counts += f"; {one['prompts']:,} prompts ranked by {people}"
        yield counts
        controlled = f"{one['length_controlled']:.1%} ({span(*one['length_controlled_interval'])})"
        own, other = one["mean_lengths"]
        sizes = f"mean lengths {own:.0f} and {other:.0f} characters"
        yield f"Length-controlled: {controlled}; {sizes}"


def _counted(count: int, words: str) -> str:
    one = {"wins": "win", "ties": "tie", "losses": "loss"}[words]
    return f"{count:,} {one if count == 1 else words}"


def _distance(result: Mapping[str, Any]) -> Iterator[str]:
    policy = result.get("policy", {})
    if policy.get("kl") is None:
        return
    yield f"KL to {result['reference']}: {format_number(policy['kl'])} nats an answer{_bounds(policy, 'kl')}"
    bounds = [policy.get(key) for key in ("kl_low", "kl_high", "kl_k3_low", "kl_k3_high")]
    if None not in bounds and (bounds[0] > bounds[3] or bounds[1] < bounds[2]):
        yield (
            f"The estimator k3 gives {format_number(policy['kl_k3'])}{_bounds(policy, 'kl_k3')}:"
            " too few answers for one of the two; give --n or --limit a larger number"
        )


def _tax(result: Mapping[str, Any]) -> Iterator[str]:
    tax = result.get("loss_difference")
    if not tax:
        return
    bounds = "" if tax["low"] is None else f" ({span(tax['low'], tax['high'], '+.4f')})"
    yield f"Loss on the data's answers: {tax['value']:+.4f} nats a token{bounds} against {result['against']['model']}"


def annotator_table(comparison: Mapping[str, Any]) -> TableParts | None:
    """Win rates by each annotator of rankings; None where fewer than two are named."""
    found = comparison.get("by_annotator")
    if not found:
        return None
    rows: list[tuple[Any, ...]] = [
        (name, percent(one["win_rate"]), span(*one["interval"]), one["wins"], one["ties"], one["losses"])
        for name, one in found.items()
    ]
    title = f"Against {comparison['against']}, by annotator"
    return title, ("annotator", "win rate", "95% interval", "wins", "ties", "losses"), rows
