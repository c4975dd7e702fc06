"""How the scores of an ensemble's members become one: the table COMBINATIONS, and the members' disagreement."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, NonNegativeFloat

from rlhf.core.lazy import torch
from rlhf.core.table import Table

COMBINATIONS = Table("combination of scores")
"""A row takes the members' scores, float32 [B, M], and returns one score per answer, float32 [B]."""


def disagreement(members: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each answer's scores over the members (divisor M): float32 [B, M] -> [B]."""
    return members.std(1, correction=0)


@COMBINATIONS.row("mean")
def mean(members: torch.Tensor) -> torch.Tensor:
    """The mean of the members' scores."""
    return members.mean(1)


@COMBINATIONS.row("min")
def minimum(members: torch.Tensor) -> torch.Tensor:
    """The lowest of the members' scores: worst-case optimisation (Coste et al. 2023, arXiv:2310.02743)."""
    return members.amin(1)


@COMBINATIONS.row("mean-minus-std")
def mean_minus_std(members: torch.Tensor, *, coef: NonNegativeFloat = 1.0) -> torch.Tensor:
    """The mean minus `coef` times the standard deviation over the members."""
    return members.mean(1) - coef * disagreement(members)


@COMBINATIONS.row("mean-minus-variance")
def mean_minus_variance(members: torch.Tensor, *, coef: NonNegativeFloat = 0.5) -> torch.Tensor:
    """The mean minus `coef` times the variance over the members.

    Uncertainty-weighted optimisation (Coste et al. 2023, arXiv:2310.02743).
    """
    return members.mean(1) - coef * members.var(1, correction=0)


def _checked(spec: Any) -> Any:
    COMBINATIONS.pick(spec)
    return spec


Combination = Annotated[str | dict[str, Any], AfterValidator(_checked)]
"""The type of an option: the name of a row, or a mapping with `name` and the row's options."""
