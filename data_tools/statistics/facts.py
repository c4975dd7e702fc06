"""What the metrics are computed from: a dataset's columns, pairs, votes and sampled texts, each computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.statistics import biases, consistency, duplicates, words
from data_tools.statistics.agreement import kendall_sums
from data_tools.statistics.annotators import AnnotatorReport, annotators_of
from data_tools.statistics.columns import Collector, Columns, as_shards, row_groups
from data_tools.statistics.duplicates import EvaluationSet, NearPrompts
from data_tools.statistics.intervals import Estimate
from data_tools.statistics.judgements import AnnotatorVotes, AnswerPairs, pairs_of, votes_of
from data_tools.statistics.sample import Texts, texts_of
from rlhf.data.jsonl import Reject
from rlhf.data.store import Dataset, open_dataset


@dataclass(frozen=True)
class Facts:
    """A dataset. What several metrics need is computed at its first use and kept."""

    dataset: Dataset
    shards: Dataset
    """The dataset, or the folder that a JSONL file was converted to."""
    columns: Columns
    near: bool
    """Near-duplicates are searched for."""
    evaluation: list[EvaluationSet]
    bad_rows: Counter[str] = field(default_factory=Counter)
    """Rows of a JSONL file that could not be used, by reason."""

    @cached_property
    def pairs(self) -> AnswerPairs:
        return pairs_of(self.columns)

    @cached_property
    def votes(self) -> AnnotatorVotes:
        return votes_of(self.columns, self.pairs)

    @cached_property
    def kendall(self) -> tuple[np.ndarray, np.ndarray]:
        return kendall_sums(self.columns)

    @cached_property
    def annotators(self) -> list[AnnotatorReport]:
        return annotators_of(self.columns, self.pairs, self.votes)

    @cached_property
    def authors(self) -> list[biases.WinRate]:
        return biases.author_win_rates(self.columns, self.pairs)

    @cached_property
    def repeats(self) -> tuple[Estimate, np.ndarray]:
        return duplicates.repeats(self.columns.id)

    @cached_property
    def split_leaks(self) -> tuple[Estimate, np.ndarray] | None:
        return duplicates.prompts_across_splits(self.columns)

    @cached_property
    def repeated_answers(self) -> tuple[Estimate, np.ndarray] | None:
        return duplicates.repeated_answers(self.columns)

    @cached_property
    def contaminated(self) -> tuple[Estimate, np.ndarray]:
        return duplicates.contaminated(self.columns, self.evaluation)

    @cached_property
    def contradicting(self) -> list[tuple[int, int]]:
        return consistency.contradicting(self.columns, self.pairs)

    @cached_property
    def texts(self) -> Texts:
        """The sampled texts, and those of the records that are shown as examples."""
        also = set(self.repeats[1][:5].tolist())
        also |= set(self.split_leaks[1][:5].tolist()) if self.split_leaks else set()
        also |= set(self.contaminated[1][:5].tolist()) if self.evaluation else set()
        also |= {self.row_of(at) for at in self.repeated_answers[1].tolist()} if self.repeated_answers else set()
        also |= {int(self.pairs.row[pair]) for two in self.contradicting for pair in two}
        return texts_of(self.shards, self.columns, self.near, also)

    @cached_property
    def near_prompts(self) -> NearPrompts:
        return duplicates.near_prompts(self.columns, self.texts)

    @cached_property
    def near_contaminated(self) -> tuple[Estimate, list[tuple[int, str]]]:
        return duplicates.near_contaminated(self.columns, self.texts, self.evaluation)

    @cached_property
    def languages(self) -> words.Languages:
        return words.languages(self.columns, self.texts)

    def is_sample(self, what: str) -> bool:
        """Whether the texts of prompts, records, pairs or languages are from a sample of the dataset."""
        return {
            "prompts": lambda: not self.texts.all_prompts,
            "records": lambda: not self.texts.all_records,
            "pairs": lambda: not self.texts.all_records or int(np.count_nonzero(self.pairs.order)) > words.MOST_PAIRS,
            "languages": lambda: len(self.columns) > words.MOST_NAMED,
        }[what]()

    def row_of(self, answer: int) -> int:
        """The record that an answer belongs to."""
        return int(np.searchsorted(self.columns.start, answer, side="right")) - 1


@contextmanager
def gathered(path: str | Path, against: Sequence[Path] = (), near: bool = True) -> Iterator[Facts]:
    """Read a dataset's columns. Its texts are read when a metric needs them, so use the facts within the block.

    Raises:
        UserError: A dataset cannot be opened or read.
    """
    dataset = open_dataset(path)
    sets = [EvaluationSet.read(one) for one in against]
    bad_rows: Counter[str] = Counter()

    def count(reject: Reject) -> None:
        bad_rows[reject.reason] += 1

    with as_shards(dataset, count) as shards:
        collector = Collector()
        columns = collector.columns(collector.arrays(group.read()) for group in row_groups(shards))
        yield Facts(dataset, shards, columns, near, sets, bad_rows)
