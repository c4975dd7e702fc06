"""The evaluation of `rlhf demo`: policies by the hidden rule and the reward model, the reward model by annotators."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.demo_world.datasets import WorldDatasets
from data_tools.demo_world.rules import POINTS, Verdict, agreement, judge
from rlhf.core.intervals import fraction_interval
from rlhf.data.encode_records import EncodingCounts
from rlhf.data.schema import Ranking, dense_ranks
from rlhf.data.store import open_dataset
from rlhf.inference.policy import open_policy
from rlhf.inference.reward_model import open_reward_model
from rlhf.inference.sampling import Sampled, sample
from rlhf.inference.scorer import open_scorer
from rlhf.policy_evaluation.measures import sequence_kl
from rlhf.reward.metrics import reward_metrics
from rlhf.rollout.types import SamplingParams


def evaluate(out: Path, data: WorldDatasets, params: SamplingParams) -> dict[str, Any]:
    """The summary of a demo, without the seconds.

    Args:
        out: The demo's folder, with its runs.
        data: Its datasets; the prompts of the split test are answered.
        params: How both policies are sampled.
    """
    asked = data.prompts("test")
    policies = {"sft": open_policy(out / "sft"), "ppo": open_policy(out / "export")}
    completions = {
        name: [found[0] for found in sample(policy, asked, params, data.seed)] for name, policy in policies.items()
    }
    scorer = open_scorer(str(out / "reward"), policies["sft"])
    verdicts = {name: [judge(one.prompt, one.text) for one in found] for name, found in completions.items()}
    rankings = list(open_dataset(data.folder / "rankings").records("test"))
    return {
        "seed": data.seed,
        "base": json.loads((out / "base" / "facts.json").read_text("utf-8")),
        "records": {
            name: open_dataset(data.folder / name).splits() for name in ("prompts", "demonstrations", "rankings")
        },
        "reward_model": _reward_model_metrics(out / "reward", rankings),
        "policies": {
            name: _policy_metrics(completions[name], verdicts[name], scorer(completions[name])) for name in policies
        },
        "comparison": _compare(verdicts["ppo"], verdicts["sft"]),
        "kl": statistics.fmean(sequence_kl(policies["ppo"], policies["sft"], completions["ppo"], temperature=1.0)[0]),
        "temperature": params.temperature,
        "samples": _first_of_each_kind(completions, verdicts),
        "export": str(out / "export"),
    }


def _reward_model_metrics(path: Path, rankings: Sequence[Ranking]) -> dict[str, Any]:
    """The reward model's metrics on rankings of test prompts, and the ceiling set by annotator noise."""
    reward = open_reward_model(path)
    by_model = reward.score([row for row in reward.encode(rankings, EncodingCounts()) if row is not None])
    points = [tuple(judge(r, c.text).points for c in r.candidates) for r in rankings]
    by_rule = [replace(item, scores=seen) for item, seen in zip(by_model, points)]
    true = [replace(item, ranks=dense_ranks(-p for p in seen)) for item, seen in zip(by_model, points)]
    model, rule = reward_metrics(by_model), reward_metrics(by_rule)
    agreed, pairs = (np.array(column) for column in zip(*agreement(rankings)))
    return {
        "accuracy": model["accuracy"],
        "accuracy_interval": model["accuracy_interval"],
        "pairs": model["pairs"],
        "longer_accuracy": model["longer_accuracy"],
        "agreement": float(agreed.sum() / pairs.sum()),
        "agreement_interval": fraction_interval(agreed, pairs),
        # Two annotators who are each right with probability q agree with probability q^2 + (1-q)^2: both are right or
        # both are wrong. Solved for q; over pairs of different difficulty this bounds the mean of q (Jensen).
        "ceiling": 0.5 + math.sqrt(max(0.0, float(agreed.sum() / pairs.sum()) - 0.5) / 2),
        "rule_accuracy": rule["accuracy"],
        "accuracy_by_rule": reward_metrics(true)["accuracy"],
        "tied_share": model["tied_pairs"] / (model["tied_pairs"] + model["pairs"]),
    }


def _policy_metrics(
    completions: Sequence[Sampled], verdicts: Sequence[Verdict], scores: Sequence[float]
) -> dict[str, float]:
    """Means over completions: points, rule checks, the reward model's score, tokens."""
    rows = [{"points": v.points, **{name: float(getattr(v, name)) for name in POINTS}} for v in verdicts]
    for row, one, score in zip(rows, completions, scores):
        row |= {"score": score, "tokens": float(len(one.completion.ids)), "ended": float(one.completion.ended)}
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _compare(after: Sequence[Verdict], before: Sequence[Verdict]) -> dict[str, Any]:
    """Win rate of the first policy by points on the same prompts, without ties."""
    gaps = np.array([a.points - b.points for a, b in zip(after, before)])
    decided = gaps[gaps != 0]
    return {
        "wins": int((decided > 0).sum()),
        "losses": int((decided < 0).sum()),
        "ties": int((gaps == 0).sum()),
        "win_rate": float((decided > 0).mean()) if len(decided) else None,
        "interval": fraction_interval(decided > 0, np.ones(len(decided), dtype=int)),
        "mean_difference": float(gaps.mean()),
    }


def _first_of_each_kind(
    completions: Mapping[str, Sequence[Sampled]], verdicts: Mapping[str, Sequence[Verdict]]
) -> list[dict[str, Any]]:
    """The first prompt of each kind of request, with both completions and their points."""
    first: dict[str | None, int] = {}
    for index, one in enumerate(completions["sft"]):
        first.setdefault(one.prompt.group, index)
    return [
        {
            "prompt": completions["sft"][i].prompt.messages[-1].content,
            **{n: {"answer": found[i].text, "points": verdicts[n][i].points} for n, found in completions.items()},
        }
        for i in first.values()
    ]
