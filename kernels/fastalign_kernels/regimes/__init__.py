"""How InfoNCE is computed at different sizes; `fastalign_kernels.info_nce` says what, and picks one."""

# pyright: reportArgumentType=false
# (a launch takes constexpr parameters in a way that types do not tell)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Problem(NamedTuple):
    """One call of InfoNCE: N sources, M targets, D dimensions, and where the gradients go."""

    source: torch.Tensor  # (N, D), the last stride 1
    target: torch.Tensor  # (M, D), of the same dtype
    source_ids: torch.Tensor  # (N,) int64; never read without with_ids
    target_ids: torch.Tensor  # (M,)
    with_ids: bool
    grad_source: torch.Tensor  # (N, D) contiguous
    grad_target: torch.Tensor  # (M, D)
    for_source: bool
    for_target: bool
    for_temperature: bool
    temperature: float
    symmetric: bool
    offset: int


@triton.jit
def norm(squares):
    """|x| from |x|^2; 0 where that is too small for fp32 to tell from a row of zeros, NaN where it is beyond fp32."""
    root = tl.sqrt_rn(tl.where(squares < 1e-30, 0.0, squares))
    return tl.where(root == float("inf"), float("nan"), root)


@triton.jit
def lengths(source_norm, target_norm):
    """|s| |t|, with 1 for a row of zeros."""
    return tl.where(source_norm == 0, 1.0, source_norm) * tl.where(target_norm == 0, 1.0, target_norm)


@triton.jit
def _project(raw, states, grad, D, states_row, factor, BLOCK_D: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    raw += i * D
    states += i * states_row
    along = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(states + d, mask=d < D, other=0).to(tl.float32)
        along += tl.load(raw + d, mask=d < D, other=0) * x
        squares += x * x
    square = tl.sum(squares, 0)
    share = tl.sum(along, 0) / tl.where(square == 0, 1.0, square)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(states + d, mask=d < D, other=0).to(tl.float32)
        u = tl.load(raw + d, mask=d < D, other=0)
        tl.store(grad + i * D + d, (factor * (u - share * x)).to(grad.dtype.element_ty), mask=d < D)


def project(raw: torch.Tensor, states: torch.Tensor, grad: torch.Tensor, factor: float = 1.0) -> None:
    """Through the normalisation: grad = factor * (u - <u, x> x / |x|^2), for every row u of `raw` and x of `states`."""
    rows, width = raw.shape
    _project[(rows,)](raw, states, grad, width, states.stride(0), factor, BLOCK_D=1024)
