"""Masked mean over tokens in one read of the states, its gradient in one write.

    pooled[n] = sum_t keep[n, t] * hidden[n, t] / sum_t keep[n, t]          normalize: pooled[n] / |pooled[n]|
    d hidden[n, t] = keep[n, t] * d pooled[n] / sum_t keep[n, t]

Shapes: N rows, T tokens, D hidden size; flat input is (tokens, D) with N + 1 row starts.
Accumulates in fp32 whatever the input. Never made: a masked or upcast copy of the states, a mask of (N, T, D), the
product of the two; between forward and backward only (N, D) and counts are kept.
Bytes, for b bytes an element: forward b * kept tokens * D + 4 N D, backward b * N T D + 4 N D. About one addition per
element, so both are bound by memory: the roof is the bandwidth of a copy.

A program owns BLOCK_D columns of one row, or of one of `splits` parts of its tokens where rows alone do not fill the
GPU; then a second kernel adds the parts in a fixed order. Programs of one row are neighbours, so that together they
read whole tokens. Nothing is atomic: the same input gives the same bits.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch takes constexpr parameters and options such as num_warps in a way that types do not tell)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastalign_kernels._dispatch import multiprocessors, on_device, use_triton
from fastalign_kernels.reference import masked_mean_pool as reference

BLOCK_T = 16
BLOCK_BYTES = 512  # of one token in a program: a warp's worth of 16-byte loads
WARPS = tl.constexpr(4)  # of a program, Triton's default: token t of a block is in warp t % 4, and adds up there
SCAN = tl.constexpr(512)  # mask entries looked at together
REGISTERS = 128  # a bound that no kernel reaches: without one the assembler spills some to fit more programs
PROGRAMS_PER_SM = 8  # below that, rows are split
TOKENS_PER_SPLIT = 64  # a smaller part would not pay for the second kernel


@triton.jit
def _row(cu_seqlens, row, T, FLAT: tl.constexpr):
    """First token of a row in the flat array (0 if padded) and its number of tokens."""
    if FLAT:
        start = tl.load(cu_seqlens + row)
        return start, (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    else:
        return row * 0, T


@triton.jit
def _scan(mask, length, stride, MASKED: tl.constexpr):
    """Number of tokens that count, position of the first and one past the last."""
    if MASKED:
        counts = tl.zeros([SCAN], tl.int32)  # a lane each, brought together once: a reduction waits for all warps
        firsts = tl.full([SCAN], 2**31 - 1, tl.int32)
        ends = tl.zeros([SCAN], tl.int32)
        for start in range(0, length, SCAN):
            t = start + tl.arange(0, SCAN)
            keep = tl.load(mask + t.to(tl.int64) * stride, mask=t < length, other=0) != 0
            counts += keep.to(tl.int32)
            firsts = tl.where(keep, tl.minimum(firsts, t), firsts)
            ends = tl.where(keep, t + 1, ends)
        count, end = tl.sum(counts, 0), tl.max(ends, 0)
        first = tl.minimum(tl.min(firsts, 0), length)
        return count, first, end
    else:
        return length, length * 0, length


@triton.jit(do_not_specialize=["T", "splits", "skip_first", "mean_stride", "mask_row", "mask_token"])
def _pool(
    hidden, mask, cu_seqlens, mean, counts, firsts,
    T, D, hidden_row, hidden_token, mask_row, mask_token, mean_stride, splits, skip_first,
    MASKED: tl.constexpr, FLAT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of the kept tokens, or one part's share of it, for BLOCK_D columns of one row."""
    column_blocks = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    part = program // column_blocks % splits
    row = (program // column_blocks // splits).to(tl.int64)
    d = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    start, length = _row(cu_seqlens, row, T, FLAT)
    hidden += row * hidden_row + start * hidden_token
    if MASKED:
        mask += row * mask_row

    count, first, end = _scan(mask, length, mask_token, MASKED)
    dropped = tl.where((skip_first != 0) & (count > 1), first, -1)
    count -= (dropped >= 0).to(tl.int32)
    per_part = tl.cdiv(tl.maximum(end - first, 0), splits)
    begin = first + part * per_part
    end = tl.minimum(begin + per_part, end)

    total = tl.zeros([WARPS, BLOCK_D], tl.float32)  # not BLOCK_T rows: the registers are for loads in flight
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        keep = (t < end) & (t != dropped)
        if MASKED:
            keep = keep & (tl.load(mask + t.to(tl.int64) * mask_token, mask=keep, other=0) != 0)
        states = hidden + t.to(tl.int64)[:, None] * hidden_token + d[None, :]
        tile = tl.load(states, mask=keep[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        total += tl.sum(tl.reshape(tile, [BLOCK_T // WARPS, WARPS, BLOCK_D]), 0)
    tl.store(mean + part * mean_stride + row * D + d, tl.sum(total, 0) / tl.maximum(count, 1), mask=d < D)
    if program % (column_blocks * splits) == 0:
        tl.store(counts + row, count)
        tl.store(firsts + row, dropped)


@triton.jit(do_not_specialize=["parts_stride", "splits", "normalize"])
def _finish(parts, pooled, norms, D, parts_stride, splits, normalize, BLOCK_D: tl.constexpr):
    """Add the parts of a row in order; divide by the norm of the sum."""
    row = tl.program_id(0).to(tl.int64)
    parts += row * D
    norm = 1.0
    if normalize != 0:
        highest = tl.zeros([BLOCK_D], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            highest = tl.maximum(highest, tl.abs(_sum_parts(parts + d, d < D, parts_stride, splits, BLOCK_D)))
        scale = tl.max(highest, 0)  # the squares alone may overflow or vanish
        scale = tl.where(scale == 0, 1.0, scale)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mean = _sum_parts(parts + d, d < D, parts_stride, splits, BLOCK_D) / scale
            squares += mean * mean
        norm = tl.sqrt_rn(tl.sum(squares, 0)) * scale
        tl.store(norms + row, norm)
        norm = tl.where(norm == 0, 1.0, norm)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mean = _sum_parts(parts + d, d < D, parts_stride, splits, BLOCK_D)
        tl.store(pooled + row * D + d, tl.div_rn(mean, norm), mask=d < D)


@triton.jit
def _sum_parts(part, inside, stride, splits, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_D], tl.float32)
    for _ in range(splits):
        total += tl.load(part, mask=inside, other=0)
        part += stride
    return total


@triton.jit(
    do_not_specialize=[
        "N",
        "T",
        "tokens",
        "splits",
        "blocks",
        "scaled",
        "mask_row",
        "mask_token",
        "grad_row",
        "grad_column",
    ]
)
def _spread(
    grad, means, alongs, counts, firsts, mask, cu_seqlens, scale, out,
    N, T, D, tokens, grad_row, grad_column, mask_row, mask_token, splits, blocks, scaled,
    MASKED: tl.constexpr, FLAT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write d pooled[row] / count to every kept token of (a part of) the row, and zeros to the others.

    With `blocks`, d pooled lacks the projection of `info_nce`: its share along the row itself is taken out here.
    """
    column_blocks = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    part = program // column_blocks % splits
    row = (program // column_blocks // splits).to(tl.int64)
    d = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    start, length = _row(cu_seqlens, row, T, FLAT)
    begin, end = length * 0, length
    if FLAT:  # what lies before the first and behind the last row belongs to none, and gets its zeros from them
        begin = tl.where(row == 0, -start, begin).to(tl.int32)
        end = tl.where(row == N - 1, tokens - start, end).to(tl.int32)
    out += (row * T * (1 - FLAT) + start) * D
    if MASKED:
        mask += row * mask_row

    value = tl.load(grad + row * grad_row + d.to(tl.int64) * grad_column, mask=d < D, other=0).to(tl.float32)
    if blocks != 0:
        along, square = 0.0, 0.0
        for start_block in range(0, blocks, BLOCK_T):
            block = start_block + tl.arange(0, BLOCK_T)
            dots = alongs + block * 2 * N + row
            along += tl.sum(tl.load(dots, mask=block < blocks, other=0), 0)
            square += tl.sum(tl.load(dots + N, mask=block < blocks, other=0), 0)
        share = along / tl.where(square == 0, 1.0, square)
        value -= share * tl.load(means + row * D + d, mask=d < D, other=0)
    if scaled != 0:
        value *= tl.load(scale).to(tl.float32)
    value = (value / tl.maximum(tl.load(counts + row), 1))[None, :]
    dropped = tl.load(firsts + row)
    per_part = tl.cdiv(end - begin, splits)
    begin += part * per_part
    end = tl.minimum(begin + per_part, end)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        keep = (t >= 0) & (t < length) & (t != dropped)
        if MASKED:
            keep = keep & (tl.load(mask + t.to(tl.int64) * mask_token, mask=keep, other=0) != 0)
        tile = tl.where(keep[:, None], value, 0.0)
        inside = (t < end)[:, None] & (d < D)[None, :]
        tl.store(out + t.to(tl.int64)[:, None] * D + d[None, :], tile.to(out.dtype.element_ty), mask=inside)


class _Plan(NamedTuple):
    """What both directions launch: a grid over rows, parts of a row and column blocks; tensors as kernels take them."""

    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    rows: int
    tokens: int  # of a padded row
    width: int
    splits: int
    grid: tuple[int]
    constants: dict[str, Any]


def _plan(states: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> _Plan:
    if cu_seqlens is None:
        rows, tokens, width = states.shape
        average = tokens
    else:
        cu_seqlens = cu_seqlens.to(states.device, torch.int64).contiguous()
        rows, tokens, width = len(cu_seqlens) - 1, 0, states.shape[1]
        average = states.shape[0] // rows
    if mask is not None and mask.dtype not in (torch.uint8, torch.int64):
        mask = (mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8)
    block_d = BLOCK_BYTES // states.element_size()
    programs = rows * triton.cdiv(width, block_d)
    wanted = triton.cdiv(PROGRAMS_PER_SM * multiprocessors(states.device), programs)
    splits = max(1, min(wanted, average // TOKENS_PER_SPLIT))
    constants = {
        "MASKED": mask is not None,
        "FLAT": cu_seqlens is not None,
        "BLOCK_T": BLOCK_T,
        "BLOCK_D": block_d,
    }
    return _Plan(mask, cu_seqlens, rows, tokens, width, splits, (programs * splits,), constants)


def pool(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    skip_first: bool,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward on Triton: (N, D) fp32 means, and per row the tokens averaged, the one left out or -1, the norm."""
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    plan = _plan(hidden, mask, cu_seqlens)
    mask, rows, width = plan.mask, plan.rows, plan.width
    counts, firsts = (torch.empty(rows, dtype=torch.int32, device=hidden.device) for _ in range(2))
    norms = torch.empty(rows if normalize else 0, dtype=torch.float32, device=hidden.device)
    pooled = torch.empty(rows, width, dtype=torch.float32, device=hidden.device)
    finish = plan.splits > 1 or normalize
    parts = torch.empty(plan.splits, *pooled.shape, dtype=pooled.dtype, device=hidden.device) if finish else pooled
    with on_device(hidden):
        _pool[plan.grid](
            hidden, mask, plan.cu_seqlens, parts, counts, firsts,
            plan.tokens, width, 0 if plan.cu_seqlens is not None else hidden.stride(0), hidden.stride(-2),
            *_strides(mask), rows * width, plan.splits, int(skip_first), **plan.constants, maxnreg=REGISTERS,
        )  # fmt: skip
        if finish:
            _finish[(rows,)](
                parts, pooled, norms, width, rows * width, plan.splits, int(normalize), BLOCK_D=1024, maxnreg=REGISTERS
            )
    return pooled, counts, firsts, norms


def spread(
    grad: torch.Tensor,
    pooled: torch.Tensor,
    counts: torch.Tensor,
    firsts: torch.Tensor,
    norms: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    alongs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The backward on Triton; same contract as the twin's.

    `alongs`: parts of <grad, pooled> and <pooled, pooled>, (blocks, 2, N), to project the gradient on the way. None or
    without elements: it is projected already.
    """
    blocks = 0 if alongs is None or alongs.numel() == 0 else len(alongs)
    grad = reference.through_norm(grad, pooled, norms)
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    plan = _plan(out, mask, cu_seqlens)
    with on_device(out):
        _spread[plan.grid](
            grad, *((pooled, alongs) if blocks else (grad, grad)), counts, firsts, plan.mask, plan.cu_seqlens,
            grad if scale is None else scale, out,
            plan.rows, plan.tokens, plan.width, shape[0], *grad.stride(), *_strides(plan.mask), plan.splits,
            blocks, int(scale is not None), **plan.constants, maxnreg=REGISTERS,
        )  # fmt: skip
    return out


def _strides(mask: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


@torch.library.custom_op("fastalign::masked_mean_pool", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    skip_first: bool,
    normalize: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if cu_seqlens is not None:
        reference.check_values(cu_seqlens, hidden.shape[0])
    run = pool if use_triton(backend, hidden) else reference.forward
    return run(hidden, mask, cu_seqlens, skip_first, normalize)


@_forward.register_fake
def _(hidden, mask, cu_seqlens, skip_first, normalize, backend):
    rows = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counts, firsts = (hidden.new_empty(rows, dtype=torch.int32) for _ in range(2))
    pooled = hidden.new_empty(rows, hidden.shape[-1], dtype=dtype)
    return pooled, counts, firsts, hidden.new_empty(rows if normalize else 0, dtype=dtype)


@torch.library.custom_op("fastalign::masked_mean_pool_backward", mutates_args=())
def backward(
    grad: torch.Tensor,
    pooled: torch.Tensor,
    counts: torch.Tensor,
    firsts: torch.Tensor,
    norms: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    alongs: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Gradient of the states from that of the pooled rows, times `scale`, which is one number or None.

    `alongs`: see `spread`; only Triton leaves a gradient to be projected.
    """
    arguments = grad, pooled, counts, firsts, norms, mask, cu_seqlens, shape, dtype, scale
    if use_triton(backend, torch.empty(0, dtype=dtype, device=grad.device)):
        return spread(*arguments, alongs)
    return reference.backward(*arguments)


@backward.register_fake
def _(grad, pooled, counts, firsts, norms, mask, cu_seqlens, shape, dtype, scale, alongs, backend):
    return grad.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else every output without a gradient gets one, of zeros, in the backward
    hidden, mask, cu_seqlens, _, normalize, ctx.backend = inputs
    pooled, counts, firsts, norms = output
    ctx.mark_non_differentiable(counts, firsts, norms)
    ctx.hidden = hidden.shape, hidden.dtype
    ctx.save_for_backward(pooled if normalize else norms, counts, firsts, norms, mask, cu_seqlens)


def _differentiate(ctx, grad, *_):
    if grad is None:  # the means were not used
        return (None,) * 6
    return backward(grad, *ctx.saved_tensors, *ctx.hidden, None, None, ctx.backend), *[None] * 5


_forward.register_autograd(_differentiate, setup_context=_save)


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
        hidden: (N, T, D) padded, or (tokens, D) flat; floating point.
        mask: (N, T), for padded rows: any bool, integer or float dtype, nonzero marks a token that counts. None:
            all do.
        cu_seqlens: (N + 1,) int32 or int64, for flat rows: row n is tokens cu_seqlens[n] to cu_seqlens[n + 1]. Its
            values are checked: free on the CPU, on a GPU they are read back, which waits for it.
        skip_first: leave the first token that counts out, unless it is the only one of its row.
        normalize: divide each mean by its L2 norm.
        backend: `triton`, `torch` (the twin), or `auto`: Triton where it runs.

    Returns:
        (N, D) fp32 (fp64 for fp64 input, by the twin). A row without a token gives zeros and a zero gradient. What
        stands in tokens that do not count, NaN included, has no influence.

    Raises:
        ValueError: shapes, devices or `cu_seqlens` do not fit, or Triton cannot run here. TypeError: wrong dtypes.
    """
    reference.check(hidden, mask, cu_seqlens)
    return _forward(hidden, mask, cu_seqlens, skip_first, normalize, backend)[0]
