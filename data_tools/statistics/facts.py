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
from data_tools.statistics.annotators import annotators_of
from data_tools.statistics.columns import Collector, Columns, as_shards, row_groups
from data_tools.statistics.duplicates import EvaluationSet
from data_tools.statistics.judgements import pairs_of, votes_of
from data_tools.statistics.sample import Texts, texts_of
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

    pairs = cached_property(lambda self: pairs_of(self.columns))
    votes = cached_property(lambda self: votes_of(self.pairs))
    kendall = cached_property(lambda self: kendall_sums(self.columns))
    annotators = cached_property(lambda self: annotators_of(self.pairs, self.votes))
    authors = cached_property(lambda self: biases.author_win_rates(self.pairs))
    repeats = cached_property(lambda self: duplicates.repeats(self.columns.id))
    split_leaks = cached_property(lambda self: duplicates.prompts_across_splits(self.columns))
    repeated_answers = cached_property(lambda self: duplicates.repeated_answers(self.columns))
    contaminated = cached_property(
        lambda self: duplicates.contaminated(self.columns, self.evaluation) if self.evaluation else None
    )
    contradicting = cached_property(lambda self: consistency.contradicting(self.pairs))
    near_prompts = cached_property(lambda self: duplicates.near_prompts(self.texts))
    near_contaminated = cached_property(lambda self: duplicates.near_contaminated(self.texts, self.evaluation))
    languages = cached_property(lambda self: words.languages(self.texts))

    @cached_property
    def texts(self) -> Texts:
        """The sampled texts, and those of the records that are shown as examples."""
        faults = [found[1][:5].tolist() for found in (self.repeats, self.split_leaks, self.contaminated) if found]
        also = {row for rows in faults for row in rows}
        also |= {self.row_of(at) for at in self.repeated_answers[1].tolist()} if self.repeated_answers else set()
        also |= {int(self.pairs.row[pair]) for two in self.contradicting for pair in two}
        return texts_of(self.shards, self.columns, self.near, also)

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
    with as_shards(dataset, lambda reject: bad_rows.update([reject.reason])) as shards:
        collector = Collector()
        columns = collector.columns(collector.arrays(group.read()) for group in row_groups(shards))
        yield Facts(dataset, shards, columns, near, sets, bad_rows)
