"""Agreement of several annotators: corrected for chance, and over whole rankings. Pure functions of arrays."""

from __future__ import annotations

import numpy as np

from data_tools.statistics.columns import Columns
from data_tools.statistics.judgements import AnnotatorVotes, mixed

# ---- Krippendorff's alpha -------------------------------------------------------------------------------------------


def coincidence_sums(votes: AnnotatorVotes) -> np.ndarray:
    """(prompts, 9): each prompt's part in the 3 x 3 coincidence matrix of `alpha_of_coincidences`.

    The units are pairs of answers, the values first better < tie < second better. A pair with n votes, n_c of them c,
    adds n_c (n_k - [c = k]) / (n - 1) to cell (c, k), and the mirror image, since which answer is the first must not
    matter. Ranks are not used as values: with rankings of different K (rank 5 exists in some only) alpha of random
    clicks would be above 0.
    """
    counts = votes.counts().astype(float)
    cells = counts[:, :, None] * (counts[:, None, :] - np.eye(3)) / (counts.sum(axis=1) - 1)[:, None, None]
    return votes.per_prompt((cells + cells[:, ::-1, ::-1]).reshape(-1, 9))


def alpha_of_coincidences(sums: np.ndarray) -> np.ndarray:
    """Krippendorff's ordinal alpha (Krippendorff 2004, 11.3): 1 = full agreement, 0 = chance.

    alpha = 1 - (n - 1) Σ o_ck δ²_ck / Σ n_c n_k δ²_ck with δ_ck = Σ_{g=c..k} n_g - (n_c + n_k) / 2.

    Args:
        sums: (any, 9) coincidence matrices, flattened.

    Returns:
        (any,), NaN if only one value occurs.
    """
    cells = sums.reshape(-1, 3, 3)
    each = cells.sum(axis=2)
    before = np.cumsum(each, axis=1) - each / 2  # δ_ck is the distance of the values' mid-ranks
    distance = np.square(before[:, :, None] - before[:, None, :])
    expected = (each[:, :, None] * each[:, None, :] * distance).sum(axis=(1, 2))
    observed = (cells * distance).sum(axis=(1, 2)) * (each.sum(axis=1) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)


# ---- whole rankings -------------------------------------------------------------------------------------------------


def kendall_sums(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's tau-b and W of rankings of the same K >= 3 answers to a prompt by two or more named annotators.

    With two answers, both say the same as the pairwise agreement. An annotator's first ranking of the same answers
    counts.

    Returns:
        Two arrays (blocks, 2), for tau-b and for W: the value and 1; blocks without a value are left out. A block is a
        prompt with a set of answers; its tau-b is the mean over its pairs of annotators.
    """
    tau, w = [np.zeros((0, 2))], [np.zeros((0, 2))]
    for size in np.unique(columns.sizes):
        rows = np.flatnonzero((columns.sizes == size) & columns.by_named_annotator)
        if size < 3 or len(rows) < 2:
            continue
        block, ranks = _blocks(columns, rows, int(size))
        for kept, values in ((tau, tau_b_of_blocks(ranks, block)), (w, w_of_blocks(ranks, block))):
            values = values[~np.isnan(values)]
            kept.append(np.stack([values, np.ones(len(values))], axis=1))
    return np.concatenate(tau), np.concatenate(w)


def _blocks(columns: Columns, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) ascending block indices and (R, K) ranks in one order of the answers, of rows in blocks of two or more."""
    at = columns.start[rows][:, None] + np.arange(size)
    answers = columns.answer[at]
    order = np.argsort(answers, axis=1)
    ranks = np.take_along_axis(columns.rank[at], order, axis=1)
    name = mixed(columns.prompt[rows]) ^ mixed(answers).sum(axis=1, dtype=np.uint64)
    place = np.lexsort((rows, columns.annotator[rows], name))
    name, annotator, ranks = name[place], columns.annotator[rows][place], ranks[place]
    first = np.ones(len(name), bool)
    first[1:] = (name[1:] != name[:-1]) | (annotator[1:] != annotator[:-1])
    _, block, times = np.unique(name[first], return_inverse=True, return_counts=True)
    several = times[block] > 1
    return np.unique(block[several], return_inverse=True)[1], ranks[first][several]


def tau_b_of_blocks(ranks: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Mean Kendall's tau-b over the pairs of annotators of each block (Kendall 1945).

    tau-b = Σ s_a s_b / sqrt(Σ s_a² · Σ s_b²), s the signs of the rank differences over all pairs of answers; so with
    u = s / |s| the sum over the pairs of m annotators is (|Σ u|² - m) / 2. Annotators who tie everything are left out.
    (One array operation for all blocks; scipy.stats.kendalltau takes 0.2 ms a pair of annotators.)

    Args:
        ranks: (R, K), a row for each annotator.
        block: (R,) ascending from 0.

    Returns:
        (blocks,), NaN if fewer than two annotators have an order.
    """
    one, other = np.triu_indices(ranks.shape[1], 1)
    signs = np.sign(ranks[:, one] - ranks[:, other]).astype(float)
    norm = np.sqrt(np.square(signs).sum(axis=1))
    units = np.divide(signs, norm[:, None], out=np.zeros_like(signs), where=norm[:, None] > 0)
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    annotators = np.add.reduceat((norm > 0).astype(float), starts)
    total = np.square(np.add.reduceat(units, starts, axis=0)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(annotators > 1, (total - annotators) / (annotators * (annotators - 1)), np.nan)


def w_of_blocks(ranks: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Kendall's coefficient of concordance of each block, corrected for ties (Kendall and Babington Smith 1939).

    W = 12 S / (m² (K³ - K) - m Σ (t³ - t)), S the sum of squared deviations of the answers' rank sums, t the sizes of
    the ties. 1 = all rankings are equal; m annotators who click at random have 1/m on average.

    Args:
        ranks: (R, K), a row for each annotator.
        block: (R,) ascending from 0.

    Returns:
        (blocks,), NaN if all annotators tie everything.
    """
    size = ranks.shape[1]
    equal = (ranks[:, :, None] == ranks[:, None, :]).sum(axis=2)
    middle = (ranks[:, :, None] > ranks[:, None, :]).sum(axis=2) + (equal + 1) / 2
    tied = (np.square(equal) - 1).sum(axis=1)  # Σ over answers of t² - 1 = Σ over ties of t³ - t
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    annotators = np.diff(np.append(starts, len(block)))
    deviations = np.add.reduceat(middle, starts, axis=0) - (annotators * (size + 1) / 2)[:, None]
    possible = annotators**2 * (size**3 - size) - annotators * np.add.reduceat(tied, starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(possible > 0, 12 * np.square(deviations).sum(axis=1) / possible, np.nan)
