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

from fastalign_kernels.regimes import Problem, lengths

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
    gram, squares, source_ids, target_ids, target_norm, i, j, N, M, shares, padded, offset, sharpness, with_ids
):
    """Of some rows: cosines times sharpness, which of them count (NaN does), which are the rows' own, |s| |t|."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    products = _add_shares(gram + i[:, None] * padded + j[None, :], inside, padded * padded, shares)
    source_norm = tl.sqrt_rn(_add_shares(squares + i, i < N, 2 * padded, shares))
    length = lengths(source_norm[:, None], target_norm[None, :])
    power = tl.div_rn(products, length) * sharpness
    own = inside & (j[None, :] == i[:, None] + offset)
    if with_ids != 0:
        source_id = tl.load(source_ids + i, mask=i < N, other=0)
        target_id = tl.load(target_ids + j, mask=j < M, other=0)
        inside = inside & (own | (source_id[:, None] != target_id[None, :]) | (power != power))
    return power, inside, own, length


@triton.jit(do_not_specialize=["N", "M", "shares", "padded", "offset", "symmetric", "with_ids"])
def _weights(
    gram, squares, source_ids, target_ids, weights, loss, grad_temperature,
    N, M, shares, padded, offset, temperature, symmetric, with_ids, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Loss, its slope in the temperature, and W with the factor of the gradients in it."""
    sharpness = 1.0 / (temperature * LN2)
    j = tl.arange(0, BLOCK_M)
    target_norm = tl.sqrt_rn(_add_shares(squares + padded + j, j < M, 2 * padded, shares))
    column_high = tl.full([BLOCK_M], -1e30, tl.float32)
    column_total = tl.zeros([BLOCK_M], tl.float32)
    column_own = tl.zeros([BLOCK_M], tl.float32)
    if symmetric != 0:
        for start in range(0, N, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            power, counts, own, _ = _power(
                gram, squares, source_ids, target_ids, target_norm, i, j, N, M, shares, padded, offset, sharpness,
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
    scale = tl.where(symmetric != 0, 0.5, 1.0) / N
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        power, counts, own, length = _power(
            gram, squares, source_ids, target_ids, target_norm, i, j, N, M, shares, padded, offset, sharpness,
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
        weight *= (scale / temperature) / length
        tl.store(weights + i[:, None] * M + j[None, :], weight, mask=(i < N)[:, None] & (j < M)[None, :])
    tl.store(loss, total_loss * LN2 * scale)
    tl.store(grad_temperature, -tl.sum(slope, 0) * LN2 * scale / temperature)


@triton.jit(do_not_specialize=["N", "M", "first", "rows"])
def _gradients(
    source, target, weights, raw, alongs, N, M, D, source_row, target_row, first, rows,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of u = W t for TILE sources, or of v = W^T s for targets; their part of <u, s> and of <s, s>.

    Rows are counted through: sources are 0 to N - 1, targets follow. Those from `first` on get a gradient, `rows` of
    them; tiles do not cross the border.
    """
    block = tl.program_id(0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    source_tiles = tl.where(first == 0, tl.cdiv(N, TILE), 0)
    of_source = tl.program_id(1) < source_tiles
    if of_source:
        mine, mine_row, other, other_row, mine_rows, other_rows = source, source_row, target, target_row, N, M
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
        weight_row, weight_column, place = M, 1, i - first
    else:
        mine, mine_row, other, other_row, mine_rows, other_rows = target, target_row, source, source_row, M, N
        i = (tl.program_id(1) - source_tiles) * TILE + tl.arange(0, TILE)
        weight_row, weight_column, place = 1, M, i + N - first
    total = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, other_rows, TILE):
        k = start + tl.arange(0, TILE)
        weight = tl.load(
            weights + i[:, None] * weight_row + k[None, :] * weight_column,
            mask=(i < mine_rows)[:, None] & (k < other_rows)[None, :], other=0,
        )  # fmt: skip
        states = other + k.to(tl.int64)[:, None] * other_row + d[None, :]
        states = tl.load(states, mask=(k < other_rows)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        total = tl.dot(weight, states, total, input_precision="tf32x3")
    inside = (i < mine_rows)[:, None] & (d < D)[None, :]
    states = tl.load(mine + i.to(tl.int64)[:, None] * mine_row + d[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(raw + place.to(tl.int64)[:, None] * D + d[None, :], total, mask=inside)
    alongs += block * 2 * rows + place
    tl.store(alongs, tl.sum(total * states, 1), mask=i < mine_rows)
    tl.store(alongs + rows, tl.sum(states * states, 1), mask=i < mine_rows)


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
