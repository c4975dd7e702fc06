"""Near-duplicate texts by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., "Mining of Massive
Datasets", chapter 3), each pair that is found compared in full.

Two texts are near when the Jaccard similarity of their sets of `WORDS` words in a row reaches the threshold, after
case, punctuation and spacing are taken away. 0.8 finds retyped and lightly edited texts. Of the pairs that are just
at the threshold about 1 in 10 is missed, of those 0.05 above it fewer than 1 in 50; none is found that is below it.
The same texts in the same order give the same answer.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy, np
from rlhf.data.schema import Prompt

if TYPE_CHECKING:
    import datasketch
else:
    datasketch = lazy("datasketch")

WORDS = 3
DEFAULT_THRESHOLD = 0.8
LOWEST_THRESHOLD = 0.5
PERMUTATIONS = 128
SEED = 1
MISS_WEIGHTS = (0.05, 0.95)
"""What a needless comparison and a missed pair cost when the bands are chosen: comparisons are cheap."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
"""A word, or one character of a script that puts no space between words (Chinese, Japanese, Thai, Khmer, ...)."""
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplying by it modulo 2**64 loses nothing


def prompt_text(record: Prompt) -> str:
    """The text by which prompts are compared: all turns."""
    return "\n".join(message.content for message in record.messages)


def near_groups(texts: Iterable[tuple[str, str]], threshold: float = DEFAULT_THRESHOLD) -> dict[str, str]:
    """Group near texts. A text joins a group if it is near to one member, so two members may be less similar.

    Args:
        texts: (key, text) pairs, streamed; a repeated key is skipped.
        threshold: Jaccard similarity from which two texts are near, 0.5 to 1.

    Returns:
        Every key -> its group's representative, the key of the group that came first. A text that is near to no
        other represents itself. About 1 kB of memory a key.

    Raises:
        UserError: The threshold is out of range.
    """
    found = _Signed.of(texts, threshold)
    sets = Sets()
    for run in found.runs():
        _unite(run, sets, found)
    return {key: found.keys[sets.find(index)] for index, key in enumerate(found.keys)}


def near_matches(
    texts: Iterable[tuple[str, str]], others: Iterable[tuple[str, str]], threshold: float = DEFAULT_THRESHOLD
) -> dict[str, str]:
    """Which texts are near to one of `others`: key -> the other's key. Texts that are near to none are left out.

    A text under the key of one of `others` matches that one: keys are taken as names of the content.

    Raises:
        UserError: The threshold is out of range.
    """
    theirs: set[str] = set()
    same: dict[str, str] = {}

    def both() -> Iterator[tuple[str, str]]:
        for key, text in others:
            theirs.add(key)
            yield key, text
        for key, text in texts:
            if key in theirs:
                same[key] = key
            else:
                yield key, text

    found = _Signed.of(both(), threshold)
    match: dict[int, int] = {}
    for run in found.runs():
        known = [index for index in run if index < len(theirs)]
        for index in run[len(known) :]:
            if index not in match:
                near = next((other for other in known if found.are_near(index, other)), None)
                match |= {} if near is None else {index: near}
    return same | {found.keys[index]: found.keys[other] for index, other in sorted(match.items())}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' shingles, 0 to 1: the number that is compared with the threshold."""
    return _jaccard(_shingles(one), _shingles(other))


# ---- texts as sets of shingles ------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _shingles(text: str) -> np.ndarray:
    """Sorted distinct 32-bit hashes of the runs of `WORDS` words; of all words together where there are fewer."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).lower()) or [text.strip()]
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    length = min(WORDS, len(words))
    rolled = np.zeros(len(words) - length + 1, np.uint64)
    for start in range(length):
        rolled = rolled * np.uint64(_MULTIPLIER) + hashes[start : start + len(rolled)]
    return np.unique((rolled >> np.uint64(32)).astype(np.uint32))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    both = np.concatenate((one, other))
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))  # as numpy's intersect1d, in half the time
    return shared / (len(one) + len(other) - shared)


@cache
def _plan(threshold: float) -> datasketch.MinHashLSH:
    """How many bands of how many hashes fit the threshold best; finding them takes a twentieth of a second."""
    return datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=MISS_WEIGHTS)


class _Signed(NamedTuple):
    """Texts with their shingles, and the bands of their MinHash signatures."""

    keys: list[str]
    shingles: list[np.ndarray]
    bands: np.ndarray
    """(texts, bands) uint64: two texts with an equal number in any column are compared."""
    threshold: float

    @classmethod
    def of(cls, texts: Iterable[tuple[str, str]], threshold: float) -> _Signed:
        if not LOWEST_THRESHOLD <= threshold <= 1:
            why = "Below, texts that share no more than a phrase are near, and nearly all pairs are compared."
            raise UserError(f"a threshold of {threshold} is not from {LOWEST_THRESHOLD} to 1", why, "Try 0.8.")
        plan = _plan(threshold)
        first: dict[str, np.ndarray] = {}
        bands = []

        def fresh() -> Iterator[np.ndarray]:
            for key, text in texts:
                if key not in first:
                    first[key] = _shingles(text)
                    yield first[key].tolist()

        used = plan.b * plan.r
        weights = np.uint64(_MULTIPLIER) ** np.arange(1, plan.r + 1, dtype=np.uint64)
        for minhash in datasketch.MinHash.generator(fresh(), num_perm=used, seed=SEED, hashfunc=int):  # hashes already
            rows = minhash.hashvalues.astype(np.uint64).reshape(plan.b, plan.r)
            bands.append((rows * weights).sum(axis=1, dtype=np.uint64))
        table = np.stack(bands) if bands else np.zeros((0, plan.b), np.uint64)
        return cls(list(first), list(first.values()), table, threshold)

    def runs(self) -> Iterator[list[int]]:
        """Indices of texts that agree in a band, ascending; band by band."""
        for band in self.bands.T:
            order = np.argsort(band, kind="stable")
            edges = np.flatnonzero(np.diff(band[order])) + 1
            starts, ends = np.append(0, edges), np.append(edges, len(order))
            several = ends - starts > 1
            for start, end in zip(starts[several], ends[several]):
                yield order[start:end].tolist()

    def are_near(self, one: int, other: int) -> bool:
        first, second = self.shingles[one], self.shingles[other]
        few, many = sorted((len(first), len(second)))
        return few / many >= self.threshold and _jaccard(first, second) >= self.threshold


# ---- groups ---------------------------------------------------------------------------------------------------------


class Sets:
    """Disjoint sets of comparable items (union-find).

    Every item starts as its own set; a set is represented by its smallest item.
    """

    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        """The smallest item of the set."""
        while (above := self._above.get(item, item)) != item:
            self._above[item] = self._above.get(above, above)
            item = self._above[item]
        return item

    def join(self, one: Any, other: Any) -> Any:
        """Make two sets one; its smallest item."""
        first, second = sorted((self.find(one), self.find(other)))
        if first != second:
            self._above[second] = first
        return first


def _unite(run: list[int], sets: Sets, found: _Signed) -> None:
    """Join the near texts of a run. Only texts of different sets are compared, so a large set costs little."""
    members: dict[int, list[int]] = {}
    for index in run:
        own = sets.find(index)
        for other in [first for first in members if first != own]:
            if any(found.are_near(index, member) for member in members[other]):
                joined = members.pop(other) + members.pop(own, [])
                own = sets.join(own, other)
                members[own] = joined
        members.setdefault(own, []).append(index)
