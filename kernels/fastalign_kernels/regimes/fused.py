"""Up to LIMIT rows a side: loss and gradients in three launches.

`_gram` shares tiles and columns out: every program leaves its part of the products <s_i, t_j> of one tile and of the
squared norms. `_weights`, one program, adds the parts up and makes the loss, W, and what unit length takes away again:
the part of u_i along s_i is <u_i, s_i> = sum_j W[i, j] <s_i, t_j>, known from W and the products. `_gradients` is then
two small products, W t and W^T s, less that part.

Bytes, for S shares: `_gram` reads s ceil(M / TILE) and t ceil(N / TILE) times and writes 4 S N M; `_weights` reads
those once (twice if symmetric) and writes 4 N M; `_gradients` reads W, s and t, and writes both gradients. But for the
inputs and the gradients it all stays in the L2 cache.
Always fp32-exact: a dot is three TF32 products of high and low halves, accumulated in fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch takes constexpr parameters and options such as num_warps in a way that types do not tell)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastalign_kernels.regimes import Problem, inverse

LIMIT = 256
TILE = 32
SHARE = 256  # columns at least in a program's share
PROGRAMS = 128  # of `_gram`, about: more parts take `_weights` longer to add up than they save
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
def _power(
    gram, squares, source_ids, target_ids, target_inverse, i, j, N, M, shares, padded, offset, sharpness, with_ids
):
    """Of some rows: products, 1 / |s|, cosines times sharpness, which of them count, which are the rows' own."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    products = _add_shares(gram + i[:, None] * padded + j[None, :], inside, padded * padded, shares)
    source_inverse = inverse(tl.sqrt(_add_shares(squares + i, i < N, 2 * padded, shares)))
    power = products * source_inverse[:, None] * target_inverse[None, :] * sharpness
    own = inside & (j[None, :] == i[:, None] + offset)
    if with_ids != 0:
        source_id = tl.load(source_ids + i, mask=i < N, other=0)
        target_id = tl.load(target_ids + j, mask=j < M, other=0)
        inside = inside & (own | (source_id[:, None] != target_id[None, :]))
    return products, source_inverse, power, inside, own


@triton.jit(do_not_specialize=["N", "M", "shares", "padded", "offset", "symmetric", "with_ids"])
def _weights(
    gram, squares, source_ids, target_ids, weights, alongs, loss, grad_temperature,
    N, M, shares, padded, offset, temperature, symmetric, with_ids, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Loss, its slope in the temperature, W, and the share of each gradient along its own row."""
    sharpness = 1.0 / (temperature * LN2)
    j = tl.arange(0, BLOCK_M)
    target_inverse = inverse(tl.sqrt(_add_shares(squares + padded + j, j < M, 2 * padded, shares)))
    column_high = tl.full([BLOCK_M], -1e30, tl.float32)
    column_total = tl.zeros([BLOCK_M], tl.float32)
    column_own = tl.zeros([BLOCK_M], tl.float32)
    if symmetric != 0:
        for start in range(0, N, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            _, _, power, counts, own = _power(
                gram, squares, source_ids, target_ids, target_inverse, i, j, N, M, shares, padded, offset, sharpness,
                with_ids,
            )  # fmt: skip
            power = tl.where(counts, power, float("-inf"))
            raised = tl.maximum(column_high, tl.max(power, 0))
            column_total = column_total * tl.exp2(column_high - raised) + tl.sum(tl.exp2(power - raised[None, :]), 0)
            column_high = raised
            column_own += tl.sum(tl.where(own, power, 0.0), 0)
    column_total = tl.where(column_total == 0, 1.0, column_total)  # of a column outside; NaN stays
    terms = tl.where(j < M, column_high + tl.log2(column_total) - column_own, 0.0)
    total_loss = tl.where(symmetric != 0, tl.sum(terms, 0), 0.0)

    slope = tl.zeros([BLOCK_M], tl.float32)
    along_target = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.where(symmetric != 0, 0.5, 1.0) / N
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        products, source_inverse, power, counts, own = _power(
            gram, squares, source_ids, target_ids, target_inverse, i, j, N, M, shares, padded, offset, sharpness,
            with_ids,
        )  # fmt: skip
        row_own = tl.sum(tl.where(own, power, 0.0), 1)
        high = tl.max(tl.where(counts, power, -1e30), 1)
        softmax = tl.where(counts, tl.exp2(power - high[:, None]), 0.0)
        total = tl.sum(softmax, 1)
        total = tl.where(total == 0, 1.0, total)
        total_loss += tl.sum(tl.where(i < N, high + tl.log2(total) - row_own, 0.0), 0)
        softmax /= total[:, None]
        slope += tl.sum(tl.where(counts, softmax * (power - row_own[:, None]), 0.0), 0)
        weight = tl.where(own, softmax - 1.0, softmax)
        if symmetric != 0:
            softmax = tl.where(counts, tl.exp2(power - column_high[None, :]), 0.0) / column_total[None, :]
            slope += tl.sum(tl.where(counts, softmax * (power - column_own[None, :]), 0.0), 0)
            weight += tl.where(own, softmax - 1.0, softmax)
        weight *= source_inverse[:, None] * target_inverse[None, :] * (scale / temperature)
        tl.store(weights + i[:, None] * M + j[None, :], weight, mask=(i < N)[:, None] & (j < M)[None, :])
        along = weight * products
        tl.store(alongs + i, tl.sum(along, 1) * source_inverse * source_inverse, mask=i < N)
        along_target += tl.sum(along, 0)
    tl.store(alongs + N + j, along_target * target_inverse * target_inverse, mask=j < M)
    tl.store(loss, total_loss * LN2 * scale)
    tl.store(grad_temperature, -tl.sum(slope, 0) * LN2 * scale / temperature)


@triton.jit(do_not_specialize=["N", "M", "for_source", "for_target"])
def _gradients(
    source, target, weights, alongs, grad_source, grad_target, N, M, D, source_row, target_row, for_source, for_target,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of the gradient of TILE rows: W t for sources, then W^T s for targets, less what lies along."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    source_tiles = tl.cdiv(N, TILE) * for_source
    of_source = tl.program_id(1) < source_tiles
    if of_source:
        mine, mine_row, other, other_row, grad, rows, others = source, source_row, target, target_row, grad_source, N, M
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
        weight_row, weight_column = M, 1
    else:
        mine, mine_row, other, other_row, grad, rows, others = target, target_row, source, source_row, grad_target, M, N
        i = (tl.program_id(1) - source_tiles) * TILE + tl.arange(0, TILE)
        weight_row, weight_column = 1, M
        alongs += N
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
    total -= tl.load(alongs + i, mask=i < rows, other=0)[:, None] * states
    tl.store(grad + i.to(tl.int64)[:, None] * D + d[None, :], total.to(grad.dtype.element_ty), mask=inside)


def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and d loss / d temperature; the gradients of the rows go to where the problem says."""
    (rows, width), targets = p.source.shape, len(p.target)
    source_tiles, target_tiles = triton.cdiv(rows, TILE), triton.cdiv(targets, TILE)
    padded = max(source_tiles, target_tiles) * TILE
    shares = max(1, min(triton.cdiv(width, SHARE), PROGRAMS // (source_tiles * target_tiles)))
    per_share = triton.cdiv(width, shares * TILE) * TILE
    shares = triton.cdiv(width, per_share)  # none of them empty

    def fp32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=p.source.device)

    gram, squares = fp32(shares, padded, padded), fp32(shares, 2, padded)
    weights, alongs, loss, slope = fp32(rows, targets), fp32(rows + targets), fp32(), fp32()
    inputs, strides = (p.source, p.target), (p.source.stride(0), p.target.stride(0))
    _gram[(shares, source_tiles, target_tiles)](
        *inputs,
        gram,
        squares,
        rows,
        targets,
        width,
        *strides,
        per_share,
        padded,
        TILE=TILE,
        BLOCK_D=32,
        maxnreg=REGISTERS,
    )
    _weights[(1,)](
        gram, squares, p.source_ids, p.target_ids, weights, alongs, loss, slope,
        rows, targets, shares, padded, p.offset, p.temperature, int(p.symmetric), int(p.with_ids),
        BLOCK_N=16, BLOCK_M=max(32, triton.next_power_of_2(targets)), num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
    tiles = source_tiles * p.for_source + target_tiles * p.for_target
    if tiles:
        _gradients[(triton.cdiv(width, 64), tiles)](
            *inputs, weights, alongs, p.grad_source, p.grad_target, rows, targets, width, *strides,
            int(p.for_source), int(p.for_target), TILE=TILE, BLOCK_D=64, maxnreg=REGISTERS,
        )  # fmt: skip
    return loss, slope
