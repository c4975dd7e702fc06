"""Statistics over the response tokens of a batch; padding never enters them.

Shared conventions of `rlhf.ppo.masked`, `rlhf.ppo.kl`, `rlhf.ppo.advantages` and `rlhf.ppo.losses`:

- A batch is float32 [N, T]: N episodes, each completion padded on the right to T tokens.
- `response_mask` is bool [N, T], True at response tokens. No mask is True at padding.
- Padding may hold anything, NaN included: it never reaches a result or a gradient, and outputs there are 0.
- Every rank holds the whole global batch where a statistic is taken, so nothing here communicates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.core.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def zero_padding(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with 0 where `mask` is False. Selects instead of multiplying, because 0 * NaN is NaN."""
    return torch.where(mask, values, 0.0)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the unmasked values: over everything (0-d), or along `dim`."""
    return zero_padding(values, mask).sum(dim)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked values, 0-d; NaN where all are masked."""
    return masked_sum(values, mask) / mask.sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divisor n, as TensorFlow's `moments`) of the unmasked values, 0-d."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), 0-d: 1 = perfect, 0 = no better than a constant, below 0 = worse.

    Defined as in OpenAI Baselines (baselines/common/math_util.py, `explained_variance`): a constant offset does not
    count. NaN if the returns do not vary.

    Args:
        values: The critic's predictions, [N, T].
        returns: The critic's targets, [N, T].
        mask: bool [N, T].
    """
    spread = masked_var(returns, mask)
    return torch.where(spread > 0, 1 - masked_var(returns - values, mask) / spread, torch.nan)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """Scale to standard deviation 1; `shift_mean=True` also moves the mean to 0, `shift_mean=False` KEEPS the mean.

    openai/lm-human-preferences@cbfd210 lm_human_preferences/utils/core.py:336-341, epsilon 1e-8 on the variance
    included. Advantages are whitened with the shift, rewards without it (train_policy.py:325,338). Some later
    libraries use the same argument name for the opposite.

    Args:
        values: [N, T].
        mask: bool [N, T].
        shift_mean: Whether the mean is removed.

    Returns:
        [N, T], 0 at padding.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return zero_padding(whitened if shift_mean else whitened + mean, mask)


def completion_lengths(response_mask: Tensor) -> Tensor:
    """Number of response tokens of every episode, int64 [N].

    Raises:
        ValueError: An episode has no response token, or padding before one of its tokens.
    """
    lengths = response_mask.sum(1)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    fits = (response_mask == (positions < lengths[:, None])).all(1) & (lengths > 0)
    if not fits.all():
        row = int(fits.int().argmin())
        raise ValueError(
            f"response_mask[{row}] = {response_mask[row].int().tolist()}: expected at least one response token, "
            "and padding on the right only"
        )
    return lengths


def unflatten(flat: Tensor, lengths: Tensor) -> Tensor:
    """[n] values, row after row, to [B, T] padded with 0; T is the longest of `lengths` [B], n their sum."""
    mask = torch.arange(int(lengths.max()), device=flat.device)[None] < lengths.to(flat.device)[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
