"""ROUGE and BLEU by the packages that define them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.core.errors import UserError


def package(module: str, name: str) -> Any:
    """Import a module of the optional packages for tasks.

    Args:
        module: What to import.
        name: The package that holds it, as pip calls it.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"the metric needs the package {name}, which is not installed",
            remedy="Install it: pip install 'rlhf-rankings[tasks]'",
        ) from None


def rouge(
    kind: str, predictions: Sequence[str | None], references: Sequence[str], stem: bool, words: str
) -> np.ndarray:
    """float64 [records]: the F-measure, 0 to 1, of each answer; 0 where there is none.

    Args:
        kind: rouge1, rouge2 or rougeL.
        predictions: The model's answers.
        references: The right ones.
        stem: Compare stems of English words (Porter).
        words: `ascii`: rouge-score's own words, letters a to z and digits; `unicode`: words of any language.
    """
    scorer = package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(
        [kind], use_stemmer=stem, tokenizer=_Words() if words == "unicode" else None
    )
    pairs = zip(predictions, references)
    return np.array([0.0 if given is None else scorer.score(right, given)[kind].fmeasure for given, right in pairs])


class _Words:
    """A tokenizer for rouge-score: runs of letters and digits of any language, lower case."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


def bleu(
    predictions: Sequence[str | None], references: Sequence[str], tokenize: str
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Counts of n-grams per record, and BLEU (0 to 100) of their sums.

    Returns:
        float64 [records, 10]: matches and candidates of 1- to 4-grams, length of the answer and of the right one; and
        the function from sums of these columns to BLEU.
    """
    metric = package("sacrebleu.metrics", "sacrebleu").BLEU(tokenize=tokenize)
    rows = []
    for given, right in zip(predictions, references):
        one = metric.corpus_score([given or ""], [[right]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])

    def statistic(sums: np.ndarray) -> np.ndarray:
        scores = [
            metric.compute_bleu(
                correct=list(row[:4]), total=list(row[4:8]), sys_len=int(row[8]), ref_len=int(row[9]),
                smooth_method="exp", effective_order=False,
            ).score
            for row in sums
        ]  # fmt: skip
        return np.array(scores)

    return np.array(rows, float), statistic
