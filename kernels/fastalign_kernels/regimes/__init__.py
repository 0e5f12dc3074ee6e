"""How InfoNCE is computed at different sizes; `fastalign_kernels.info_nce` says what, and picks one."""

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
def lengths(source_norm, target_norm):
    """|s| |t|, with 1 for a row of zeros, and NaN where the squares were beyond fp32: no wrong cosine may come of it."""
    product = tl.where(source_norm == 0, 1.0, source_norm) * tl.where(target_norm == 0, 1.0, target_norm)
    return tl.where(product == float("inf"), float("nan"), product)
