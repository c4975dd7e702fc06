"""ROUGE-L between a new instruction and all that are there, without comparing it with each of them."""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from typing import Any

from rlhf.core.errors import UserError


class Novelty:
    """Finds instructions that say nearly the same.

    The measure is ROUGE-L's F (Lin 2004) by the package rouge-score: 2 LCS / (m + n) for texts of m and n words with a
    longest common subsequence of LCS words. An instruction shares at least LCS words with another, so those that share
    too few of them are left out before the subsequences are computed.

    Args:
        limit: An instruction with this F or more to another one is not new; 0.7 in Self-Instruct.

    Raises:
        UserError: rouge-score is not installed.
    """

    def __init__(self, limit: float) -> None:
        try:
            scorer = importlib.import_module("rouge_score.rouge_scorer")
        except ImportError:
            what = "comparing instructions needs the package rouge-score, which is not installed"
            raise UserError(what, remedy="Install it: pip install 'rlhf-rankings[tasks]'") from None
        self._limit = limit
        self._scorer: Any = scorer.RougeScorer(["rougeL"], use_stemmer=False)
        self._tokenize = scorer.tokenizers.DefaultTokenizer(use_stemmer=False).tokenize
        self._texts: list[str] = []
        self._lengths: list[int] = []
        self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """Word -> the instructions that have it, and how often."""

    def add(self, text: str) -> None:
        """Add an instruction to those that new ones are compared with."""
        words = self._tokenize(text)
        for word, count in Counter(words).items():
            self._places[word].append((len(self._texts), count))
        self._texts.append(text)
        self._lengths.append(len(words))

    def closest(self, text: str) -> tuple[float, str] | None:
        """The highest F at or above the limit, and the instruction that has it; None if the text is new.

        A text without letters and digits is like every other one without them, so it is like none here.
        """
        words = self._tokenize(text)
        shared: Counter[int] = Counter()
        for word, count in Counter(words).items():
            for index, other in self._places.get(word, ()):
                shared[index] += min(count, other)
        best: tuple[float, str] | None = None
        for index, most in shared.items():
            bound = 2 * most / (len(words) + self._lengths[index])
            if bound >= max(self._limit, best[0] if best else 0):
                found = self._scorer.score(self._texts[index], text)["rougeL"].fmeasure
                if found >= self._limit and (best is None or found > best[0]):
                    best = (found, self._texts[index])
        return best
