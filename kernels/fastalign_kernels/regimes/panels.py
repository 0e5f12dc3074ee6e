"""Any size: library matrix products on panels of rows, and kernels for what lies between them.

Of a panel of R rows, `products` = s t^T comes from the GEMM library in fp32, `_panel` turns each row into its loss and
its row of W, and two more products make W t and, over the panels, W^T s. All rows in one panel is the dense case.
FLOPs: 6 N M D; with `symmetric` and several panels 8 N^2 D, because a column's sum is known only after its last row
and a pass before finds it. Panel memory: 4 + b bytes an element (b of W: 2 or 4).

Sums of exponentials are taken relative to the row's own positive: 2^((c - c_own) / (tau ln 2)). Cosines are within 1,
so down to FIXED_REFERENCE nothing overflows, no maximum is searched and the parts of a sum are simply added; below,
every lane keeps its own maximum. The positives' cosines come from `_own`, from the same operands as the products, and
stand in for theirs, so that a batch of one has loss 0 exactly.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch takes constexpr parameters and options such as num_warps in a way that types do not tell)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastalign_kernels.regimes import Problem, lengths, norm, project

FIXED_REFERENCE = 0.03  # exp(2 / 0.03) 2^30 still fits fp32
ROWS_PER_PART = 256  # of a column's sum
ACCUMULATED_COLUMNS = 1024  # of a product that is added to another: the size of its temporary
LN2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["N", "offset"])
def _own(
    source, target, source_norms, target_norms, own_cosines, N, D, source_row, target_row, offset, BLOCK_D: tl.constexpr
):
    """Norm of one target and, where it belongs to a source, that one's norm and their cosine."""
    j = tl.program_id(0).to(tl.int64)
    i = j - offset
    owned = (i >= 0) & (i < N)
    source_width = tl.where(owned, D, 0)
    dots = tl.zeros([BLOCK_D], tl.float32)
    source_squares = tl.zeros([BLOCK_D], tl.float32)
    target_squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        s = tl.load(source + i * source_row + d, mask=d < source_width, other=0).to(tl.float32)
        t = tl.load(target + j * target_row + d, mask=d < D, other=0).to(tl.float32)
        dots += s * t
        source_squares += s * s
        target_squares += t * t
    source_norm = norm(tl.sum(source_squares, 0))
    target_norm = norm(tl.sum(target_squares, 0))
    tl.store(target_norms + j, target_norm)
    tl.store(source_norms + i, source_norm, mask=owned)
    tl.store(own_cosines + i, tl.div_rn(tl.sum(dots, 0), lengths(source_norm, target_norm)), mask=owned)


@triton.jit
def _cosines(products, target_norms, source_ids, target_ids, i, j, M, inside, own, own_cosine, source_norm, with_ids):
    """Cosines of rows i and columns j, which of them count (NaN does), and |s| |t|. Everything broadcasts."""
    length = lengths(source_norm, tl.load(target_norms + j, mask=j < M, other=1))
    cosines = tl.where(j == own, own_cosine, tl.div_rn(tl.load(products, mask=inside, other=0), length))
    if with_ids != 0:
        equal = tl.load(source_ids + i) == tl.load(target_ids + j, mask=j < M, other=0)
        inside = inside & ((j == own) | (equal == 0) | (cosines != cosines))
    return cosines, inside, length


@triton.jit
def _add_power(highest, total, power, FIXED: tl.constexpr):
    """Every lane's sum of 2^(power - highest) with one term more; `highest` stays 0 if it is fixed."""
    if FIXED:
        return highest, total + tl.exp2(power)
    else:
        raised = tl.maximum(highest, power)
        return raised, total * tl.exp2(highest - raised) + tl.exp2(power - raised)


@triton.jit(do_not_specialize=["first_row", "rows", "per_part", "with_ids"])
def _column_sums(
    products, source_norms, target_norms, own_cosines, source_ids, target_ids, log_sums,
    first_row, rows, M, per_part, sharpness, with_ids,
    FIXED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """log2 of the columns' sums of 2^((c[i, j] - c[j, j]) sharpness), over a part of a panel's rows. N = M."""
    part = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    own_of_columns = tl.load(own_cosines + j, mask=j < M, other=0)
    highest = tl.full([BLOCK_N, BLOCK_M], 0.0 if FIXED else -1e30, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    end = tl.minimum((part + 1) * per_part, rows)
    for start in range(part * per_part, end, BLOCK_N):
        local = start + tl.arange(0, BLOCK_N)[:, None]
        i = first_row + tl.minimum(local, rows - 1)  # a row too many is read again, and does not count
        own_cosine, source_norm = tl.load(own_cosines + i), tl.load(source_norms + i)
        cosines, counts, _ = _cosines(
            products + local.to(tl.int64) * M + j, target_norms, source_ids, target_ids, i, j, M,
            (local < end) & (j < M), i, own_cosine, source_norm, with_ids,
        )  # fmt: skip
        power = tl.where(counts & (local < end), (cosines - own_of_columns) * sharpness, float("-inf"))
        highest, total = _add_power(highest, total, power, FIXED)
    top = tl.max(highest, 0)
    total = tl.sum(total * tl.exp2(highest - top[None, :]), 0)
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(log_sums + part.to(tl.int64) * M + columns, top + tl.log2(total), mask=columns < M)


@triton.jit(do_not_specialize=["first_row", "offset", "with_ids", "symmetric", "for_gradients"])
def _panel(
    products, weights, source_norms, target_norms, own_cosines, column_log_sums, source_ids, target_ids, losses, slopes,
    first_row, M, offset, sharpness, with_ids, symmetric, for_gradients, FIXED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One row: its loss, its row of W, and sum_j G[i, j] c[i, j] sharpness."""
    i = first_row + tl.program_id(0)
    own = i + offset
    products += tl.program_id(0).to(tl.int64) * M
    weights += tl.program_id(0).to(tl.int64) * M
    own_cosine = tl.load(own_cosines + i)
    source_norm = tl.load(source_norms + i)
    highest = tl.full([BLOCK_M], 0.0 if FIXED else -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, M, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        cosines, counts, _ = _cosines(
            products + j, target_norms, source_ids, target_ids, i, j, M, j < M, own, own_cosine, source_norm, with_ids
        )  # fmt: skip
        power = tl.where(counts, (cosines - own_cosine) * sharpness, float("-inf"))
        highest, total = _add_power(highest, total, power, FIXED)
    top = tl.max(highest, 0)
    whole = tl.sum(total * tl.exp2(highest - top), 0)
    loss = top + tl.log2(whole)
    if symmetric != 0:
        loss += tl.load(column_log_sums + i)
    tl.store(losses + i, loss * LN2)

    if for_gradients != 0:
        slope = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, M, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            cosines, counts, length = _cosines(
                products + j, target_norms, source_ids, target_ids, i, j, M, j < M, own, own_cosine, source_norm,
                with_ids,
            )  # fmt: skip
            power = tl.where(counts, (cosines - own_cosine) * sharpness, float("-inf"))
            share = tl.exp2(power - top) / whole
            slope += tl.where(counts, share * power, 0.0)
            weight = tl.where(j == own, share - 1.0, share)
            if symmetric != 0:
                of_column = tl.load(own_cosines + j, mask=j < M, other=0)
                log_sum = tl.load(column_log_sums + j, mask=j < M, other=0)
                power = tl.where(counts, (cosines - of_column) * sharpness, float("-inf"))
                share = tl.exp2(power - log_sum)
                slope += tl.where(counts, share * power, 0.0)
                weight += tl.where(j == own, share - 1.0, share)
            tl.store(weights + j, (weight / length).to(weights.dtype.element_ty), mask=j < M)
        tl.store(slopes + i, tl.sum(slope, 0))


def run(p: Problem, panel_rows: int, operand: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and, where asked for, d loss / d temperature; the gradients of the rows go to where the problem says.

    `operand` is the dtype of what the products multiply.
    """
    (rows, width), targets = p.source.shape, len(p.target)
    source_norms, target_norms, own_cosines, losses, slopes, column_log_sums = (
        p.source.new_empty(size, dtype=torch.float32) for size in (rows, targets, rows, rows, rows, targets)
    )
    s, t = p.source.to(operand), p.target.to(operand)
    _own[(targets,)](
        s, t, source_norms, target_norms, own_cosines, rows, width, s.stride(0), t.stride(0), p.offset, BLOCK_D=1024
    )
    starts = range(0, rows, panel_rows)
    known = source_norms, target_norms, own_cosines
    sharpness, fixed = 1 / (p.temperature * math.log(2)), p.temperature >= FIXED_REFERENCE
    factor = 1 / (rows * p.temperature * (2 if p.symmetric else 1))
    gradients = p.for_source or p.for_target or p.for_temperature

    def products(first: int) -> torch.Tensor:
        return _product(s[first : first + panel_rows], t.T)

    def column_sums(panel: torch.Tensor, first: int) -> torch.Tensor:
        parts = triton.cdiv(len(panel), ROWS_PER_PART)
        log_sums = panel.new_empty(parts, targets)
        _column_sums[(triton.cdiv(targets, 128), parts)](
            panel, *known, p.source_ids, p.target_ids, log_sums, first, len(panel), targets, ROWS_PER_PART, sharpness,
            int(p.with_ids), FIXED=fixed, BLOCK_N=8, BLOCK_M=128, maxnreg=128,
        )  # fmt: skip
        return log_sums

    def weights_of(first: int) -> torch.Tensor:
        panel = products(first)
        if p.symmetric and len(starts) == 1:
            column_log_sums.copy_(_add_log_sums(column_sums(panel, first)))
        weights = panel.new_empty(panel.shape if gradients else 1, dtype=operand)
        _panel[(len(panel),)](
            panel, weights, *known, column_log_sums, p.source_ids, p.target_ids, losses, slopes, first, targets,
            p.offset, sharpness, int(p.with_ids), int(p.symmetric), int(gradients), FIXED=fixed, BLOCK_M=1024,
            maxnreg=128,  # as in fused.py
        )  # fmt: skip
        return weights

    if p.symmetric and len(starts) > 1:
        column_log_sums.fill_(-math.inf)
        for first in starts:
            of_panel = _add_log_sums(column_sums(products(first), first))
            column_log_sums.copy_(torch.logaddexp2(column_log_sums, of_panel))
    raw_target = source_norms.new_empty(0)
    for first in starts:
        weights = weights_of(first)
        if p.for_target:
            raw_target = _add_product(raw_target, weights.T, s[first : first + panel_rows])
        if p.for_source:
            raw = _product(weights, t)
            rows_of_panel = slice(first, first + panel_rows)
            project(raw, p.source[rows_of_panel], p.grad_source[rows_of_panel], factor)
        del weights  # before the next panel takes its memory
    if p.for_target:
        project(raw_target, p.target, p.grad_target, factor)
    return losses.sum() * (factor * p.temperature), slopes.sum() * (-math.log(2) * factor)


def _add_log_sums(parts: torch.Tensor) -> torch.Tensor:
    highest = parts.amax(dim=0)
    return highest + torch.exp2(parts - highest).sum(dim=0).log2()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Accumulated and returned in fp32, whatever the operands."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in fp32, in place but for the first; no second matrix of that size."""
    if total.numel() == 0:
        return _product(a, b)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    for start in range(0, b.shape[1], ACCUMULATED_COLUMNS):
        columns = slice(start, start + ACCUMULATED_COLUMNS)
        total[:, columns] += _product(a, b[:, columns])
    return total
