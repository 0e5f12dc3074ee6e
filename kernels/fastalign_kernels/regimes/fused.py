"""Up to LIMIT rows a side: loss and gradients in three launches, and the projection.

`_gram` shares tiles and columns out: every program leaves its part of the products <s_i, t_j> of one tile and of the
squared norms. `_weights`, one program, adds the parts up and makes the loss and W. `_gradients` is two small products,
u = W t and v = W^T s, and parts of <u, s>, which the projection to unit length needs. That one is a launch of its own,
or, in `pooled_info_nce`, part of the write to the tokens. (<u_i, s_i> is also sum_j W[i, j] <s_i, t_j>, known before
u is. But where one dimension dominates all states, as in middle layers, the rounding of those products is as large as
the gradient.)

Bytes, for S shares: `_gram` reads s ceil(M / TILE) and t ceil(N / TILE) times and writes 4 S N M; `_weights` reads
those once (twice if symmetric) and writes 4 N M; `_gradients` reads W, s and t, and writes both gradients. But for the
inputs and the gradients it all stays in the L2 cache.
Always fp32-exact: a dot is three TF32 products of high and low halves, accumulated in fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch takes constexpr parameters and options such as num_warps in a way that types do not tell)
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastalign_kernels.regimes import Problem, lengths, norm, project

LIMIT = 256
TILE = 32
SHARE = 256  # columns at least in a program's share
PROGRAMS = 128  # of `_gram`, about: more parts take `_weights` longer to add up than they save
BLOCK_D = 64
REGISTERS = 255  # else the assembler spills some, to fit more programs on a multiprocessor than there are
LN2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["N", "M", "per_share", "padded"])
def _gram(
    source, target, gram, squares, N, M, D, source_row, target_row, per_share, padded,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products <s_i, t_j> of one tile and squared norms of its rows, over `per_share` columns."""
    share = tl.program_id(0)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = tl.program_id(2) * TILE + tl.arange(0, TILE)
    source_rows = source + i.to(tl.int64)[:, None] * source_row
    target_rows = target + j.to(tl.int64)[:, None] * target_row
    products = tl.zeros([TILE, TILE], tl.float32)
    source_squares = tl.zeros([TILE], tl.float32)
    target_squares = tl.zeros([TILE], tl.float32)
    for start in range(share * per_share, tl.minimum((share + 1) * per_share, D), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        s = tl.load(source_rows + d[None, :], mask=(i < N)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        t = tl.load(target_rows + d[None, :], mask=(j < M)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        products = tl.dot(s, tl.trans(t), products, input_precision="tf32x3")
        source_squares += tl.sum(s * s, 1)
        target_squares += tl.sum(t * t, 1)
    gram += share * padded * padded
    squares += share * 2 * padded
    tl.store(gram + i[:, None] * padded + j[None, :], products)
    if tl.program_id(2) == 0:
        tl.store(squares + i, source_squares)
    if tl.program_id(1) == 0:
        tl.store(squares + padded + j, target_squares)


@triton.jit
def _add_shares(part, inside, stride, shares):
    total = tl.load(part, mask=inside, other=0)
    for _ in range(1, shares):
        part += stride
        total += tl.load(part, mask=inside, other=0)
    return total


@triton.jit
def _cosines(gram, squares, source_ids, target_ids, target_norm, i, j, N, M, shares, padded, offset, with_ids):
    """Of some rows: cosines, which of them count (NaN does), which are the rows' own, |s| |t|."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    products = _add_shares(gram + i[:, None] * padded + j[None, :], inside, padded * padded, shares)
    source_norm = norm(_add_shares(squares + i, i < N, 2 * padded, shares))
    length = lengths(source_norm[:, None], target_norm[None, :])
    cosines = tl.div_rn(products, length)
    own = inside & (j[None, :] == i[:, None] + offset)
    if with_ids != 0:
        source_id = tl.load(source_ids + i, mask=i < N, other=0)
        target_id = tl.load(target_ids + j, mask=j < M, other=0)
        inside = inside & (own | (source_id[:, None] != target_id[None, :]) | (cosines != cosines))
    return cosines, inside, own, length


@triton.jit(do_not_specialize=["N", "M", "shares", "padded", "offset", "symmetric", "with_ids"])
def _weights(
    gram, squares, source_ids, target_ids, weights, loss, grad_temperature,
    N, M, shares, padded, offset, temperature, symmetric, with_ids, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Loss, its slope in the temperature, and W with the factor of the gradients in it."""
    sharpness = 1.0 / (temperature * LN2)
    j = tl.arange(0, BLOCK_M)
    target_norm = norm(_add_shares(squares + padded + j, j < M, 2 * padded, shares))
    column_high = tl.full([BLOCK_M], -2.0, tl.float32)  # below any cosine
    column_total = tl.zeros([BLOCK_M], tl.float32)
    column_own = tl.zeros([BLOCK_M], tl.float32)
    if symmetric != 0:
        for start in range(0, N, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            cosines, counts, own, _ = _cosines(
                gram, squares, source_ids, target_ids, target_norm, i, j, N, M, shares, padded, offset, with_ids
            )
            column_own += tl.sum(tl.where(own, cosines, 0.0), 0)
            cosines = tl.where(counts, cosines, float("-inf"))
            raised = tl.maximum(column_high, tl.max(cosines, 0))
            column_total *= tl.exp2((column_high - raised) * sharpness)
            column_total += tl.sum(tl.exp2((cosines - raised[None, :]) * sharpness), 0)
            column_high = raised
    column_total = tl.where(column_total == 0, 1.0, column_total)  # of a column outside; NaN stays
    terms = tl.where(j < M, (column_high - column_own) * sharpness + tl.log2(column_total), 0.0)
    total_loss = tl.where(symmetric != 0, tl.sum(terms, 0), 0.0)

    slope = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.where(symmetric != 0, 0.5, 1.0) / N
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        cosines, counts, own, length = _cosines(
            gram, squares, source_ids, target_ids, target_norm, i, j, N, M, shares, padded, offset, with_ids
        )
        row_own = tl.sum(tl.where(own, cosines, 0.0), 1)
        high = tl.max(tl.where(counts, cosines, -2.0), 1)
        softmax = tl.where(counts, tl.exp2((cosines - high[:, None]) * sharpness), 0.0)
        total = tl.sum(softmax, 1)
        total = tl.where(total == 0, 1.0, total)
        total_loss += tl.sum(tl.where(i < N, (high - row_own) * sharpness + tl.log2(total), 0.0), 0)
        softmax /= total[:, None]
        slope += tl.sum(tl.where(counts, softmax * (cosines - row_own[:, None]), 0.0), 0)
        weight = tl.where(own, softmax - 1.0, softmax)
        if symmetric != 0:
            softmax = tl.where(counts, tl.exp2((cosines - column_high[None, :]) * sharpness), 0.0)
            softmax /= column_total[None, :]
            slope += tl.sum(tl.where(counts, softmax * (cosines - column_own[None, :]), 0.0), 0)
            weight += tl.where(own, softmax - 1.0, softmax)
        weight *= (scale / temperature) / length
        tl.store(weights + i[:, None] * M + j[None, :], weight, mask=(i < N)[:, None] & (j < M)[None, :])
    tl.store(loss, total_loss * LN2 * scale)
    tl.store(grad_temperature, -tl.sum(slope, 0) * scale / (temperature * temperature))


@triton.jit(do_not_specialize=["N", "M", "for_source", "along_stride"])
def _gradients(
    source, target, weights, raw_source, raw_target, along_source, along_target,
    N, M, D, source_row, target_row, for_source, along_stride, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of u = W t for TILE sources or of v = W^T s for targets, and their part of <u, s> and <s, s>."""
    block = tl.program_id(0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    source_tiles = tl.cdiv(N, TILE) * for_source
    if tl.program_id(1) < source_tiles:
        mine, mine_row, rows, raw, along = source, source_row, N, raw_source, along_source
        other, other_row, others = target, target_row, M
        weight_row, weight_column = M, 1
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    else:
        mine, mine_row, rows, raw, along = target, target_row, M, raw_target, along_target
        other, other_row, others = source, source_row, N
        weight_row, weight_column = 1, M
        i = (tl.program_id(1) - source_tiles) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, others, TILE):
        k = start + tl.arange(0, TILE)
        weight = tl.load(
            weights + i[:, None] * weight_row + k[None, :] * weight_column,
            mask=(i < rows)[:, None] & (k < others)[None, :], other=0,
        )  # fmt: skip
        states = other + k.to(tl.int64)[:, None] * other_row + d[None, :]
        states = tl.load(states, mask=(k < others)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        total = tl.dot(weight, states, total, input_precision="tf32x3")
    inside = (i < rows)[:, None] & (d < D)[None, :]
    states = tl.load(mine + i.to(tl.int64)[:, None] * mine_row + d[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(raw + i.to(tl.int64)[:, None] * D + d[None, :], total, mask=inside)
    along += block * 2 * along_stride
    tl.store(along + i, tl.sum(total * states, 1), mask=i < rows)
    tl.store(along + along_stride + i, tl.sum(states * states, 1), mask=i < rows)


def run(p: Problem, alongs: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d temperature; the gradients of the rows go to where the problem says.

    With `alongs`, views of `empty_alongs` for the sources and for the targets, the gradients are left in fp32 before
    the projection, u and v, and whoever takes them on has <u, s> and <s, s> as well.
    """
    (rows, width), targets = p.source.shape, len(p.target)
    source_tiles, target_tiles = triton.cdiv(rows, TILE), triton.cdiv(targets, TILE)
    padded = max(source_tiles, target_tiles) * TILE
    shares = max(1, min(triton.cdiv(width, SHARE), PROGRAMS // (source_tiles * target_tiles)))
    per_share = triton.cdiv(width, shares * TILE) * TILE
    shares = triton.cdiv(width, per_share)  # none of them empty

    def fp32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=p.source.device)

    gram, squares = fp32(shares, padded, padded), fp32(shares, 2, padded)
    weights, loss, slope = fp32(rows, targets), fp32(), fp32()
    inputs, strides = (p.source, p.target), (p.source.stride(0), p.target.stride(0))
    _gram[(shares, source_tiles, target_tiles)](
        *inputs, gram, squares, rows, targets, width, *strides, per_share, padded,
        TILE=TILE, BLOCK_D=32, maxnreg=REGISTERS,
    )  # fmt: skip
    _weights[(1,)](
        gram, squares, p.source_ids, p.target_ids, weights, loss, slope,
        rows, targets, shares, padded, p.offset, p.temperature, int(p.symmetric), int(p.with_ids),
        BLOCK_N=16, BLOCK_M=max(32, triton.next_power_of_2(targets)), num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
    tiles = source_tiles * p.for_source + target_tiles * p.for_target
    if not tiles:
        return loss, slope
    grads = p.grad_source, p.grad_target
    raws = grads if alongs else (fp32(*p.grad_source.shape), fp32(*p.grad_target.shape))
    along_source, along_target = alongs or (empty_alongs(p.source, max(rows, targets)) for _ in range(2))
    _gradients[(triton.cdiv(width, BLOCK_D), tiles)](
        *inputs, weights, *raws, along_source, along_target, rows, targets, width, *strides,
        int(p.for_source), along_source.stride(1), TILE=TILE, BLOCK_D=BLOCK_D, maxnreg=REGISTERS,
    )  # fmt: skip
    if not alongs:
        for needed, raw, states, grad in zip((p.for_source, p.for_target), raws, inputs, grads, strict=True):
            if needed:
                project(raw, states, grad)
    return loss, slope


def empty_alongs(states: torch.Tensor, rows: int) -> torch.Tensor:
    """(blocks of columns, 2, rows) fp32, for the parts of <u, s> and <s, s>."""
    return torch.empty(triton.cdiv(states.shape[1], BLOCK_D), 2, rows, dtype=torch.float32, device=states.device)
