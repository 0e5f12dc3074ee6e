"""Masked mean over tokens, on request scaled to length 1.

    mean[n] = sum_t keep[n, t] * hidden[n, t] / sum_t keep[n, t],   pooled[n] = mean[n] or mean[n] / |mean[n]|

Shapes: N rows, T tokens, D hidden size. Accumulates in fp32 whatever the input, because the states of middle layers
have outliers of several hundred next to values below one. A copy of `hidden` is never made, only of chunks of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastalign_kernels.reference import check_backend

CHUNK_BYTES = 4 * 2**20


def check(hidden: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
    """Raise ValueError or TypeError if shapes, dtypes or devices do not fit. Looks at no tensor's values."""
    shape = tuple(hidden.shape)
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, not {hidden.dtype}")
    if cu_seqlens is None:
        if hidden.dim() != 3 or 0 in (shape[0], shape[2]):
            raise ValueError(f"need hidden (N, T, D), N and D above 0, or cu_seqlens; got hidden {shape}")
        if mask is None:
            return
        if tuple(mask.shape) != shape[:2]:
            raise ValueError(f"need hidden (N, T, D) and mask (N, T), got {shape} and {tuple(mask.shape)}")
        if mask.is_complex():
            raise TypeError(f"mask must be bool, integer or floating point, not {mask.dtype}")
        if mask.device != hidden.device:
            raise ValueError(f"mask must be on {hidden.device} like hidden, not on {mask.device}")
        return
    if mask is not None:
        raise ValueError("give a mask or cu_seqlens, not both")
    if hidden.dim() != 2 or shape[1] == 0:
        raise ValueError(f"with cu_seqlens, need hidden (tokens, D), D above 0, got {shape}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be (N + 1,), N above 0, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.device != hidden.device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens must be on the CPU or on {hidden.device}, not on {cu_seqlens.device}")


def check_values(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` goes up from 0 or more to `tokens` or less. Reads it from the device."""
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > tokens:
        raise ValueError(f"cu_seqlens must stay within the {tokens} tokens, got {ends[0]} to {ends[-1]}")
    for row, (start, stop) in enumerate(pairwise(ends)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not decrease, but row {row} goes from {start} to {stop}")


@torch.no_grad()
def forward(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    skip_first: bool,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pooled rows and what the gradient needs. Arguments as in `masked_mean_pool`, checked before.

    Returns:
        pooled: (N, D). count: (N,) int32, tokens averaged. first: (N,) int32, position in the row of the token left
        out, or -1. norm: (N,) length of the mean; without `normalize` it has no elements. Floats are fp32 (fp64).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if cu_seqlens is None:
        total, count, first = _padded(hidden, mask, skip_first, dtype)
    else:
        total, count, first = _flat(hidden, cu_seqlens, skip_first, dtype)
    pooled = total.div_(count.clamp(min=1).unsqueeze(1))
    if not normalize:
        return pooled, count, first, pooled.new_empty(0)
    largest = torch.linalg.vector_norm(pooled, math.inf, dim=1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)  # the square of a length may overflow or vanish, so scale first
    length = torch.linalg.vector_norm(pooled.div_(largest), dim=1, keepdim=True)
    pooled.div_(torch.where(length == 0, 1, length))
    return pooled, count, first, (length * largest).squeeze(1)


@torch.no_grad()
def backward(
    grad: torch.Tensor,
    pooled: torch.Tensor,
    count: torch.Tensor,
    first: torch.Tensor,
    norm: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of `hidden`, contiguous, of `shape` and `dtype`.

    Args:
        grad: (N, D), with respect to the pooled rows.
        pooled, count, first, norm: from `forward`; `pooled` is not looked at where `norm` has no elements.
        mask, cu_seqlens: as given to `forward`.
        scale: None, or a tensor of one element that multiplies the gradient.
    """
    share = 1 / count.to(grad.dtype)  # infinite for a row without a token, where nobody looks it up
    if scale is not None:
        share = share * scale.reshape(()).to(grad.dtype)
    grad = through_norm(grad, pooled, norm)
    per_token = (grad * share.unsqueeze(1)).to(dtype)
    if cu_seqlens is not None:
        return _to_tokens(per_token, first, cu_seqlens.to(grad.device), shape[0])
    keep = torch.arange(shape[1], device=grad.device) != first.unsqueeze(1)
    if mask is not None:
        keep &= mask != 0
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    return torch.where(keep.unsqueeze(2), per_token.unsqueeze(1), per_token.new_zeros(()), out=out)


def through_norm(grad: torch.Tensor, pooled: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """From the gradient of mean / |mean| to that of the mean, (N, D); as it is where `norm` has no elements."""
    if norm.numel() == 0:
        return grad
    along = (grad * pooled).sum(1, keepdim=True)
    return torch.addcmul(grad, pooled, along, value=-1).div_(torch.where(norm == 0, 1, norm).unsqueeze(1))


def _padded(
    hidden: torch.Tensor, mask: torch.Tensor | None, skip_first: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size, tokens, width = hidden.shape
    keep = torch.ones(size, tokens, dtype=torch.bool, device=hidden.device) if mask is None else mask != 0
    count = keep.sum(1, dtype=torch.int32)
    first = torch.full_like(count, -1)
    if skip_first:
        before = (keep.cumsum(1, dtype=torch.int32) == 0).sum(1, dtype=torch.int32)
        first = torch.where(count > 1, before, first)
        count = count - (count > 1).int()
        keep = keep & (torch.arange(tokens, device=hidden.device) != first.unsqueeze(1))
    total = hidden.new_zeros((size, width), dtype=dtype)
    length = max(1, min(tokens, CHUNK_BYTES // (width * dtype.itemsize)))
    rows = max(1, CHUNK_BYTES // (length * width * dtype.itemsize))
    for n in range(0, size, rows):
        for start in range(0, tokens, length):
            part = slice(n, n + rows), slice(start, start + length)
            kept = hidden[part]
            if mask is not None or skip_first:
                kept = torch.where(keep[part].unsqueeze(2), kept, 0)
            total[n : n + rows] += kept.sum(1, dtype=dtype)
    return total, count, first


def _flat(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, skip_first: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ends = cu_seqlens.tolist()
    skipped = [skip_first and stop - start > 1 for start, stop in pairwise(ends)]
    total = hidden.new_zeros((len(skipped), hidden.shape[1]), dtype=dtype)
    step = max(1, CHUNK_BYTES // (hidden.shape[1] * dtype.itemsize))
    for row, skip in enumerate(skipped):
        for start in range(ends[row] + skip, ends[row + 1], step):
            total[row] += hidden[start : min(start + step, ends[row + 1])].sum(0, dtype=dtype)
    first = torch.tensor(skipped, dtype=torch.int32, device=hidden.device) - 1
    count = cu_seqlens.diff().to(hidden.device, torch.int32) - (first + 1)
    return total, count, first


def _to_tokens(per_token: torch.Tensor, first: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Row n of `per_token` at each of its tokens; tokens of no row, or left out, look up a row of zeros at the end."""
    nobody = per_token.shape[0]
    places = torch.arange(tokens + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    row.masked_fill_(places < cu_seqlens[0], nobody)
    left_out = torch.where(first >= 0, cu_seqlens[:-1] + first, tokens)
    row.index_fill_(0, left_out.long(), nobody)
    rows = torch.cat([per_token, per_token.new_zeros(1, per_token.shape[1])])
    return rows.index_select(0, row[:tokens])


class _MaskedMeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, mask, cu_seqlens, skip_first, normalize) -> torch.Tensor:
        pooled, count, first, norm = forward(hidden, mask, cu_seqlens, skip_first, normalize)
        ctx.save_for_backward(pooled if normalize else norm, count, first, norm, mask, cu_seqlens)
        ctx.like = hidden.shape, hidden.dtype
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return backward(grads[0], *ctx.saved_tensors, *ctx.like), None, None, None, None


def masked_mean_pool(
    hidden: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    skip_first: bool = False,
    normalize: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean of the tokens of each row that count.

    Args:
        hidden: (N, T, D), floating point; with `cu_seqlens` (tokens, D), the rows one after the other.
        mask: (N, T), bool, integer or floating point, on the device of `hidden`; what is not 0 (NaN is not) marks the
            tokens that count. None: all do.
        cu_seqlens: (N + 1,) int32 or int64, on the device of `hidden` or on the CPU, which saves reading it back: row n
            is the tokens from cu_seqlens[n] up to, without, cu_seqlens[n + 1]. Tokens outside all rows do not count.
        skip_first: leave out the first token that counts of each row that has another: the BOS, where attention sinks.
        normalize: divide each mean by its L2 norm. A mean of zeros stays, with a gradient as if its norm were 1.
        backend: "auto" or "torch", this function.

    Returns:
        (N, D) fp32 (fp64 for fp64 input). A row without a token (T may be 0) gives zeros and a zero gradient. What
        stands in tokens that do not count, NaN included, has no influence. Can be differentiated once.

    Raises:
        ValueError, TypeError: the arguments do not fit together; see `check` and `check_values`.
    """
    check_backend(backend)
    check(hidden, mask, cu_seqlens)
    if cu_seqlens is not None:
        check_values(cu_seqlens, hidden.shape[0])
    return _MaskedMeanPool.apply(hidden, mask, cu_seqlens, skip_first, normalize)  # type: ignore[return-value]
