"""Losses over whole rankings: K candidates of a prompt are scored once and compared with each other.

A loss takes the scores float [N] of the candidates and the `RankingBatch` that says how they were ranked. It is first
averaged within a ranking, so that one with many candidates has the weight of a binary comparison (InstructGPT,
arXiv:2203.02155, eq. 1). The caller averages over rankings: `loss.sum() / counted.sum()`, or with weights
`loss.sum() / (weights * counted).sum()`, both sums over all processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from rlhf.core.lazy import nn, torch
from rlhf.core.table import Table

if TYPE_CHECKING:
    from torch import Tensor

RANKING_LOSSES = Table("ranking loss")
"""Rows: `(scores, batch, *, options) -> RankingLoss`, with `scores` float [N] and `batch` a `RankingBatch`. Trait
`uses_ties`: whether ties contribute to the loss. Half-precision scores are cast to float32 first. Every
row raises ValueError where the shapes do not agree or `ranking` is not ascending."""


@dataclass(frozen=True)
class RankingBatch:
    """How the N candidates of B rankings of unequal size were ranked, all rankings one after the other."""

    ranks: Tensor
    """int64 [N], 1 = best, equal ranks in a ranking = tie, dense: 1, 2, 2, 3 (`rlhf.data.schema.dense_ranks`)."""
    ranking: Tensor
    """int64 [N], the ranking that each candidate belongs to, 0..B-1, ascending."""
    ratings: Tensor | None = None
    """Float [N], the annotator's rating of each candidate, higher = better, NaN where unknown."""
    weights: Tensor | None = None
    """Float [B], a factor on each ranking's loss; all 1 when left out."""


class RankingLoss(NamedTuple):
    """What every ranking loss returns."""

    loss: Tensor
    """Float [B]: the loss of each ranking, 0 (with zero gradient) where nothing in it could be compared."""
    counted: Tensor
    """Bool [B]: which rankings had something to compare."""


# ---- from flat to padded -----------------------------------------------------------------------------------------


def _sizes(ranking: Tensor, rankings: int | None = None) -> list[int]:
    """Candidates of each ranking."""
    if ranking.numel() and (ranking[0] < 0 or (ranking.diff() < 0).any()):
        raise ValueError("`ranking` must ascend from 0: the candidates of a ranking follow each other")
    sizes = torch.bincount(ranking, minlength=rankings or 0).tolist()
    if rankings is not None and len(sizes) > rankings:
        raise ValueError(f"`ranking` names ranking {len(sizes) - 1}, but there are weights for {rankings} only")
    return sizes


def _rows(values: Tensor, sizes: list[int]) -> Tensor:
    """[N] -> [B, K] with K of the longest ranking, zeros on padding; the gradient flows back to `values`."""
    return nn.utils.rnn.pad_sequence(values.split(sizes), batch_first=True) if sizes else values.reshape(0, 0)


@dataclass(frozen=True)
class _Padded:
    """A padded batch; `better` and `tied` are the pairs [B, K, K] of it, each pair once."""

    scores: Tensor
    ranks: Tensor
    valid: Tensor
    """Bool [B, K], False on padding."""
    ratings: Tensor | None
    better: Tensor
    """Bool: [b, i, j] is True where candidate i is ranked above candidate j."""
    tied: Tensor
    """Bool: [b, i, j] is True where i < j share a rank."""
    weights: Tensor | None

    @property
    def gaps(self) -> Tensor:
        """Float [B, K, K]: score of i minus score of j."""
        return _outer_difference(self.scores)


def _outer_difference(values: Tensor) -> Tensor:
    return values[:, :, None] - values[:, None, :]


def _pad(scores: Tensor, batch: RankingBatch) -> _Padded:
    columns = {"scores": scores, "ranks": batch.ranks, "ranking": batch.ranking}
    columns |= {"ratings": batch.ratings} if batch.ratings is not None else {}
    if scores.dim() != 1 or any(value.shape != scores.shape for value in columns.values()):
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in columns.items())
        raise ValueError(f"expected one value per candidate, all of one shape [N]; got {found}")
    scores = _at_least_float32(scores)
    sizes = _sizes(batch.ranking, None if batch.weights is None else len(batch.weights))
    ranks, valid = _rows(batch.ranks, sizes), _rows(torch.ones_like(batch.ranks, dtype=torch.bool), sizes)
    both = valid[:, :, None] & valid[:, None, :]
    return _Padded(
        scores=_rows(scores, sizes),
        ranks=ranks,
        valid=valid,
        ratings=None if batch.ratings is None else _rows(batch.ratings.to(scores.dtype), sizes),
        better=both & (ranks[:, :, None] < ranks[:, None, :]),
        tied=(both & (ranks[:, :, None] == ranks[:, None, :])).triu(1),
        weights=batch.weights,
    )


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _result(padded: _Padded, total: Tensor, terms: Tensor) -> RankingLoss:
    """Summed losses [B] and the number of terms in each [B] -> weighted means."""
    loss = total / terms.clamp(min=1)
    return RankingLoss(loss if padded.weights is None else loss * padded.weights, terms > 0)


def _mean_over_pairs(padded: _Padded, strict: Tensor, tie: Tensor | None) -> RankingLoss:
    """Average the losses [B, K, K] of strictly ordered pairs and, if given, of tied pairs."""
    loss, used = strict.where(padded.better, 0.0), padded.better
    if tie is not None:
        loss, used = loss + tie.where(padded.tied, 0.0), used | padded.tied
    return _result(padded, loss.sum((1, 2)), used.sum((1, 2)))


# ---- the losses --------------------------------------------------------------------------------------------------


@RANKING_LOSSES.row("bradley-terry", uses_ties=False)
def bradley_terry(
    scores: Tensor,
    batch: RankingBatch,
    *,
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
    margin: Literal["none", "rank", "rating"] = "none",
    margin_scale: Annotated[float, Field(ge=0)] = 1.0,
) -> RankingLoss:
    """Bradley & Terry (1952) over strictly ordered pairs; tied pairs are left out.

    -log sigmoid(s_i - s_j - m) for i ranked above j, averaged over such pairs of a ranking (InstructGPT eq. 1; the
    margin m as in Llama 2, arXiv:2307.09288, eq. 2).

    Args:
        label_smoothing: Probability that an annotator's label is flipped: (1-e) of the loss above plus e of the loss
            with its argument negated (Mitchell 2023, "A note on DPO with noisy preferences").
        margin: `rank`: margin_scale * (rank_j - rank_i - 1), so adjacent ranks, and therefore binary comparisons,
            have margin 0. `rating`: margin_scale * (rating_i - rating_j), 0 where a rating is unknown or contradicts
            the ranks.
        margin_scale: Score units per rank or per unit of rating.

    Raises:
        ValueError: margin `rating` without ratings.
    """
    padded = _pad(scores, batch)
    gaps = padded.gaps
    if margin == "rank":
        gaps = gaps - margin_scale * (-_outer_difference(padded.ranks) - 1)
    elif margin == "rating":
        if padded.ratings is None:
            raise ValueError("margin 'rating' needs the candidates' ratings, and the batch has none")
        gaps = gaps - margin_scale * _outer_difference(padded.ratings).nan_to_num(0.0).clamp(min=0)
    loss = -(1 - label_smoothing) * nn.functional.logsigmoid(gaps) - label_smoothing * nn.functional.logsigmoid(-gaps)
    return _mean_over_pairs(padded, loss, None)


@RANKING_LOSSES.row("hinge", uses_ties=False)
def hinge(
    scores: Tensor,
    batch: RankingBatch,
    *,
    margin: Annotated[float, Field(gt=0)] = 1.0,
) -> RankingLoss:
    """Hinge loss over strictly ordered pairs (ranking SVM, Joachims 2002); tied pairs are left out.

    max(0, margin - (s_i - s_j)) for i ranked above j, averaged over such pairs of a ranking: pairs with a larger
    gap than the margin have no loss. On implicit rewards of DPO this is SLiC (Zhao 2023, arXiv:2305.10425), TRL's
    `hinge`. `ratings` are not used.

    Args:
        margin: Score units, > 0.
    """
    padded = _pad(scores, batch)
    return _mean_over_pairs(padded, nn.functional.relu(margin - padded.gaps), None)


@RANKING_LOSSES.row("rao-kupper", uses_ties=True)
def rao_kupper(
    scores: Tensor,
    batch: RankingBatch,
    *,
    tie_threshold: Annotated[float, Field(gt=0, le=20)] = 0.5,
) -> RankingLoss:
    """Rao & Kupper (1967): a pair is a tie if the annotator perceives a difference below a threshold.

    With theta = exp(tie_threshold):
    p(i above j) = e^s_i / (e^s_i + theta e^s_j) = sigmoid(s_i - s_j - tie_threshold),
    p(tie) = (theta^2 - 1) e^s_i e^s_j / ((e^s_i + theta e^s_j) (theta e^s_i + e^s_j)).
    Averaged over all pairs of a ranking, tied ones included. `ratings` are not used.
    J. Amer. Statist. Assoc. 62, 194-204.

    Args:
        tie_threshold: Score units, > 0. Equal scores are a tie with probability tanh(tie_threshold / 2), 0.24 by
            default; choose it so that this is near the fraction of ties in the data.
    """
    padded = _pad(scores, batch)
    gaps = padded.gaps
    above, below = -nn.functional.logsigmoid(gaps - tie_threshold), -nn.functional.logsigmoid(-gaps - tie_threshold)
    return _mean_over_pairs(padded, above, above + below - math.log(math.expm1(2 * tie_threshold)))


@RANKING_LOSSES.row("davidson", uses_ties=True)
def davidson(
    scores: Tensor,
    batch: RankingBatch,
    *,
    tie_prevalence: Annotated[float, Field(gt=0)] = 0.5,
) -> RankingLoss:
    """Davidson (1970): a tie is a third outcome, as likely as the geometric mean of the other two times a constant.

    With nu = tie_prevalence and Z = e^s_i + e^s_j + nu e^((s_i + s_j) / 2): p(i above j) = e^s_i / Z,
    p(tie) = nu e^((s_i + s_j) / 2) / Z. Averaged over all pairs of a ranking, tied ones included. `ratings` are not
    used. J. Amer. Statist. Assoc. 65, 317-328.

    Args:
        tie_prevalence: > 0. Equal scores are a tie with probability nu / (2 + nu), 0.2 by default; choose it so
            that this is near the fraction of ties in the data.
    """
    padded = _pad(scores, batch)
    gaps, log_nu = padded.gaps, math.log(tie_prevalence)
    # -log p = log(Z / numerator) as a logsumexp of differences, which cannot overflow.
    strict = torch.stack((torch.zeros_like(gaps), -gaps, log_nu - gaps / 2)).logsumexp(0)
    tie = torch.stack((torch.zeros_like(gaps), gaps / 2 - log_nu, -gaps / 2 - log_nu)).logsumexp(0)
    return _mean_over_pairs(padded, strict, tie)


@RANKING_LOSSES.row("plackett-luce", uses_ties=True)
def plackett_luce(
    scores: Tensor,
    batch: RankingBatch,
) -> RankingLoss:
    """Plackett (1975) and Luce (1959): the best is chosen from all, the next from the rest, and so on.

    -log of the product over candidates of e^s_i / (sum of e^s_j over those not yet chosen), divided by K - 1, the
    number of choices in an order of K: for K = 2 this is Bradley-Terry.

    A tie leaves the order of its m candidates open. The sum over its m! orders is approximated by Efron's method
    (J. Amer. Statist. Assoc. 72, 557-565, 1977): once l of them are chosen, (m - l) / m of their summed e^s is left in
    the denominator. It is exact where tied scores are equal, and pulls them together, which the exact sum would not do
    for a tie at the bottom: two tied candidates alone have the loss of Rao-Kupper's tie at theta -> 1, up to a
    constant. The loss is >= 0, and approaches 0 as ties become equal and the gaps
    between groups grow. `ratings` are not used.
    """
    padded = _pad(scores, batch)
    either = padded.tied | padded.tied.mT
    tied_with = either | torch.diag_embed(padded.valid)
    group = tied_with.sum(2, keepdim=True).clamp(min=1).to(padded.scores.dtype)  # m; 1 on padding
    unplaced = group - either.tril(-1).sum(2, keepdim=True)  # m - l
    # log m! is included term by term: stage l contributes log(m - l).
    terms = padded.scores[:, None, :] - torch.where(tied_with, group, unplaced).log()
    remaining = tied_with | padded.better
    log_denominator = terms.masked_fill(~remaining, torch.finfo(terms.dtype).min).logsumexp(2)
    loss = (log_denominator - padded.scores).where(padded.valid, 0.0).sum(1)
    return _result(padded, loss, (padded.valid.sum(1) - 1).clamp(min=0))


def centering_penalty(scores: Tensor, ranking: Tensor) -> Tensor:
    """Mean of (s_i + s_j)^2 over all pairs of a ranking, tied ones included: pulls the scores towards 0.

    A ranking loss determines scores only up to a constant per prompt. For K = 2 this is the regulariser of Eisenstein
    et al. (arXiv:2312.09244) that TRL multiplies by `center_rewards_coefficient`.

    Args:
        scores: Float [N].
        ranking: Int64 [N], ascending.

    Returns:
        Float [B], 0 for a ranking of one candidate.

    Raises:
        ValueError: The shapes do not agree or `ranking` is not ascending.
    """
    if scores.shape != ranking.shape:
        raise ValueError(f"scores {list(scores.shape)} and ranking {list(ranking.shape)} differ in shape")
    sizes = _sizes(ranking)
    padded, size = _rows(_at_least_float32(scores), sizes), torch.tensor(sizes, device=scores.device)
    # Over i < j, the sum of (s_i + s_j)^2 is (K - 2) sum(s^2) + (sum s)^2.
    total = (size - 2).clamp(min=0) * padded.square().sum(1) + padded.sum(1).square()
    return torch.where(size > 1, total / (size * (size - 1) / 2).clamp(min=1), 0.0)
