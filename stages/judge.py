"""`rlhf judge`: how often a judge on a server agrees with human rankings, measured before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rlhf.cli import options
from rlhf.core.console import print_json, say, table, warn
from rlhf.core.errors import UserError
from rlhf.core.files import check_writable
from rlhf.data.selection import chosen_records
from rlhf.data.store import open_dataset
from rlhf.judging.agreement import agreement_metrics, by_rating, pairs_of
from rlhf.judging.config import read_judge
from rlhf.judging.judge import Judge
from rlhf.judging.prompt import TO_BE_READABLE

ROWS = {
    "strict_pairs": "pairs that the annotators order",
    "agreement": "agreement with the annotators",
    "interval": "  95% interval",
    "judge_ties": "pairs that the judge ties",
    "agreement_without_ties": "agreement without these",
    "human_ties": "pairs that the annotators tie",
    "tie_agreement": "  of which the judge ties",
    "consistent": "same verdict in both orders",
    "first_position": "verdicts for the answer shown first",
    "first_position_interval": "  95% interval",
    "unreadable": "pairs without a readable verdict",
}


def command(
    judge: str,
    dataset: Path,
    *,
    kind: Literal["pairwise", "rating"] = "pairwise",
    split: options.Split = None,
    limit: options.Limit = None,
    pairs: options.Positive = 3,
    seed: options.NotNegative = 0,
    output: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Measure how often a judge agrees with human rankings: agreement, ties, position bias.

    Args:
        judge (URL|FILE|{...}): A server such as http://localhost:8000/v1, a file or a mapping.
        dataset (DATASET): Rankings by people.
        kind: pairwise: which of two answers is better, in both orders; rating: 1 to 10, as PPO uses it.
        pairs: Most pairs of each ranking.
        seed: Seed for the choice and the order of pairs.
        output: Write the result to this JSON file; PPO's reward `judge` reads it.
    """
    check_writable(output, "--out")
    config, data = read_judge(judge), open_dataset(dataset)
    if data.kind != "ranking":
        what = f"{data.path}: holds {data.kind}s; a judge is measured on rankings"
        raise UserError(what, remedy="Name a dataset of rankings; `rlhf data import` makes one.")
    chosen = list(pairs_of(chosen_records(data, split, limit), pairs, seed))
    with Judge(config, kind) as opened:
        items = (pair.item() for pair in chosen)
        verdicts = list(opened.compare(items)) if kind == "pairwise" else by_rating(opened, chosen)
        metrics = agreement_metrics(chosen, verdicts, swapped=kind == "pairwise")
        if metrics["unreadable"] == len(chosen):
            what = f"{opened.config.url}: none of {len(chosen):,} pairs has a readable verdict"
            raise UserError(what, opened.why_unreadable(), TO_BE_READABLE)
        facts, failures, usage, cost = opened.facts(), dict(opened.failures), opened.server.usage, opened.server.cost
    result: dict[str, Any] = {
        "judge": facts, "dataset": str(dataset), "fingerprint": data.fingerprint, "split": split, "seed": seed,
        "metrics": metrics, "failures": failures, "usage": usage.as_dict(), "cost": cost,
    }  # fmt: skip
    found = [(label, metrics[name]) for name, label in ROWS.items() if name in metrics]
    shown = [(label, f"{one[0]:.3f} to {one[1]:.3f}" if isinstance(one, list) else one) for label, one in found]
    title = f"{facts['model']} ({facts['prompt']}) on {metrics['pairs']:,} pairs of {metrics['rankings']:,} rankings"
    table(title, ("", ""), shown)
    for reason, count in failures.items():
        warn(f"{count:,} requests without a reply: {reason}")
    if opened.example:
        warn(f"the first reply without a verdict: {opened.example!r}")
    low = (metrics["interval"] or [0.0])[0]
    if low <= 0.5:
        say("The agreement may be no better than chance: do not train or decide by this judge.")
    if output is not None:
        options.write_json(output, result)
    if as_json:
        print_json(result)
