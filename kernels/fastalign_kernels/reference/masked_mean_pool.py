"""Masked mean over tokens.

    pooled[n] = sum_t mask[n, t] * hidden[n, t] / sum_t mask[n, t]

Shapes: N rows, T tokens, D hidden size. Accumulates in fp32 whatever the input, because the states of middle layers
have outliers of several hundred next to values below one; no fp32 copy of `hidden` is made.
"""

from __future__ import annotations

import torch


def masked_mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the masked-in tokens of each row.

    Args:
        hidden: (N, T, D), floating point.
        mask: (N, T), any dtype; nonzero marks the tokens that count.

    Returns:
        (N, D) fp32 (fp64 for fp64 input). A row without a token gives zeros and a zero gradient. What stands in
        tokens that do not count, NaN included, has no influence.

    Raises:
        ValueError: the shapes do not fit. TypeError: `hidden` is not floating point.
    """
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"need hidden (N, T, D) and mask (N, T), got {tuple(hidden.shape)} and {tuple(mask.shape)}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, not {hidden.dtype}")
    keep = mask != 0
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.where(keep.unsqueeze(-1), hidden, 0).sum(dim=1, dtype=dtype)
    return total / keep.sum(dim=1, keepdim=True).clamp(min=1)
