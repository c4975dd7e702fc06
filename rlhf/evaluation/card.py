"""The evaluation of a reward model on one dataset: accuracy, baselines, calibration, parts, whole rankings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, islice
from typing import Any

from rlhf.core.errors import UserError
from rlhf.data.encode_records import EncodingCounts
from rlhf.data.schema import Ranking
from rlhf.data.selection import chosen_records
from rlhf.data.store import Dataset
from rlhf.evaluation.baselines import MOST_RANKINGS, baselines
from rlhf.evaluation.benchmarks import benchmark_of, score_benchmark
from rlhf.evaluation.calibration import calibration
from rlhf.evaluation.estimates import clustered_mean, fraction
from rlhf.evaluation.listwise import listwise
from rlhf.evaluation.scored import AnswerScorer, RecordPairs, ScoredRecord, pairs_of
from rlhf.evaluation.slices import slices
from rlhf.reward.agreement import Agreement

READ_FOR_TRAINING = 4 * MOST_RANKINGS
"""Training rankings that are read at most, to choose those that a baseline learns from."""


def dataset_card(
    scorer: AnswerScorer, data: Dataset, records: Sequence[Ranking], human: Agreement | None,
    benchmark: str | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is measured on a dataset but the battery of perturbations.

    Args:
        data: The dataset; the rankings of its split `train` teach a baseline.
        records: The rankings to score.
        human: How far the annotators agree, if it is known.
        benchmark: The name of the benchmark that all records are from; None finds it by each record's `source`.
        seed: Of all random choices.

    Returns:
        `dataset`, `fingerprint`, `rankings` (scored), `prompts`, `skipped` (reason -> count), `benchmarks` (results of
        `score_benchmark`); for the records that are from no benchmark `pairs` (see `pair_facts`; None without one),
        `agreement` of the annotators (None if not known) and `listwise` (see there).

    Raises:
        UserError: No ranking can be scored.
    """
    counts = EncodingCounts()
    scored = scorer.rankings(records, counts)
    counts.report("rankings")
    if not scored:
        raise UserError(f"{data.path}: no ranking fits in the tokens of {scorer.name}")
    by_benchmark: dict[str | None, list[ScoredRecord]] = {}
    for one in scored:
        by_benchmark.setdefault(benchmark or benchmark_of(one.record.source), []).append(one)
    own = by_benchmark.pop(None, [])
    pairs = pairs_of(own)
    known = "train" in data.splits() and not benchmark
    train = list(islice(chosen_records(data, "train"), READ_FOR_TRAINING)) if known else []
    return {
        "dataset": str(data.path), "fingerprint": data.fingerprint, "rankings": len(scored),
        "prompts": len({one.record.prompt_id for one in scored}), "skipped": dict(counts.skipped),
        "benchmarks": [score_benchmark(name, rows) for name, rows in by_benchmark.items() if name is not None],
        "pairs": pair_facts(pairs, own, train, seed) if len(pairs) else None,
        "agreement": human.metrics() if human and own else None,
        "listwise": listwise(own),
    }  # fmt: skip


def pair_facts(
    pairs: RecordPairs, scored: Sequence[ScoredRecord], train: Sequence[Ranking], seed: int
) -> dict[str, Any]:  # fmt: skip
    """Of the pairs that the annotators did not tie.

    Returns:
        `accuracy` as `fraction` gives it, clustered by prompt; `log_loss` as `clustered_mean` gives it; `score_ties`
        (pairs with equal scores); `tied_pairs` (by the annotator, left out of everything); `baselines`, `calibration`
        and `slices`, see there.
    """
    return {
        "accuracy": fraction(pairs.correct, pairs.prompt),
        "log_loss": clustered_mean(pairs.log_loss, pairs.prompt),
        "score_ties": int((pairs.gap == 0).sum()),
        "tied_pairs": sum(one[0] == other[0] for record in scored for one, other in combinations(record.known, 2)),
        "baselines": baselines(pairs, scored, train, seed),
        "calibration": calibration(pairs, seed),
        "slices": slices(pairs, scored),
    }
