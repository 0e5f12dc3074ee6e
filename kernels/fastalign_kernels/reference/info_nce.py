"""InfoNCE on cosines: each source has to find its own target among all targets.

    loss = mean_i  logsumexp_j(c_ij / temperature) - c_i,own / temperature,   c = cosines, own = target_offset + i

(Liu & Niehues 2025, arXiv 2502.14830, the alignment loss; van den Oord et al. 2018, arXiv 1807.03748, eq. 4).
Shapes: N sources, M targets, D dimensions. Works in fp32 (fp64 for fp64 input). The (N, M) matrix is never held: its
rows are made in panels of at most `PANEL_BYTES`, and the gradient is made along with the loss, while a panel is there.
With p the softmax of a row, s and t the rows of length 1:

    d loss / d c_ij = (p_ij - [j = own]) / (N temperature)
    d loss / d x    = (g - (g . s) s) / |x|,   s = x / |x|, g = d loss / d s

Products: 6 N M D floating point operations; 8 N N D for `symmetric` with more than one panel, because the softmax of a
column is known only after the last row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastalign_kernels.reference import check_backend

PANEL_BYTES = 32 * 2**20  # from 16 to 64 MiB it is equally fast, on a CPU
_SOME = 256  # rows at a time, where a temporary is as wide as the input
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check(
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: float | torch.Tensor,
    symmetric: bool,
    target_offset: int,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    precision: str,
) -> None:
    """Raise ValueError or TypeError if the arguments do not fit together. Looks at no tensor's values."""
    shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
    if source.dim() != 2 or target.dim() != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(f"need source (N, D) and target (M, D), got {shapes}")
    if 0 in source.shape:
        raise ValueError(f"need source (N, D) and target (M, D) with N and D above 0, got {shapes}")
    if not (source.is_floating_point() and target.is_floating_point()):
        raise TypeError(f"source and target must be floating point, not {source.dtype} and {target.dtype}")
    if source.device != target.device:
        raise ValueError(f"source and target must be on one device, not {source.device} and {target.device}")
    size, targets = source.shape[0], target.shape[0]
    if targets < size:
        raise ValueError(f"need at least as many targets as sources, got {shapes}")
    if symmetric and targets != size:
        raise ValueError(f"symmetric needs as many targets as sources, got {shapes}")
    if not isinstance(target_offset, int) or isinstance(target_offset, bool):
        raise TypeError(f"target_offset must be an integer, not {type(target_offset).__name__}")
    if not 0 <= target_offset <= targets - size:
        raise ValueError(f"target_offset must be from 0 to M - N = {targets - size}, not {target_offset}")
    check_options(temperature, source_ids, target_ids, size, targets, precision, source.device)


def check_options(
    temperature: float | torch.Tensor,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    size: int,
    targets: int,
    precision: str,
    device: torch.device,
) -> None:
    """The part of `check` that pooled_info_nce shares."""
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
        if not temperature.is_floating_point():
            raise TypeError(f"a tensor as temperature must be floating point, not {temperature.dtype}")
        if temperature.device != device and temperature.device.type != "cpu":
            raise ValueError(f"temperature must be on the CPU or on {device}, not on {temperature.device}")
    elif not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"temperature must be a number or a tensor, not {type(temperature).__name__}")
    if (source_ids is None) != (target_ids is None):
        raise ValueError("give source_ids and target_ids, or neither")
    for name, ids, length in (("source_ids", source_ids, size), ("target_ids", target_ids, targets)):
        if ids is None:
            continue
        if tuple(ids.shape) != (length,):
            raise ValueError(f"{name} must be ({length},), got {tuple(ids.shape)}")
        if ids.dtype not in _INTEGERS:
            raise TypeError(f"{name} must be integers, not {ids.dtype}")
        if ids.device != device:
            raise ValueError(f"{name} must be on {device}, not on {ids.device}")
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision must be 'exact' or 'fast', not {precision!r}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is finite and above 0."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")


@torch.no_grad()
def loss_and_gradients(
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    *,
    symmetric: bool,
    target_offset: int,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    fast: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and its gradients for an upstream gradient of 1. Arguments as in `info_nce`, checked before.

    Args:
        fast: round the operands of every product to bf16 (not in fp64).
        needs: which of source, target and temperature need a gradient.

    Returns:
        loss: scalar, fp32 (fp64 for fp64 input). grad_source (N, D) and grad_target (M, D): bf16 for bf16 input, else
        fp32 (fp64). grad_temperature: scalar, in the dtype of the loss. What is not needed has no elements.
    """
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    fast = fast and dtype != torch.float64
    size, targets = source.shape[0], target.shape[0]
    need_source, need_target, need_temperature = needs
    directions = 2 if symmetric else 1
    bytes_per_logit = dtype.itemsize * directions + (source_ids is not None) + (2 if fast else 0)
    rows = min(size, max(1, PANEL_BYTES // (targets * bytes_per_logit)))
    panel = source.new_empty((rows, targets), dtype=dtype)
    other = torch.empty_like(panel) if symmetric else panel  # both softmaxes are made from the same logits
    losses = source.new_empty((2, size) if symmetric else (1, size), dtype=dtype)
    slopes = source.new_empty(size if need_temperature else 0, dtype=dtype)  # of row i: sum_j c_ij d loss / d c_ij
    grad_source = source.new_empty(source.shape if need_source else 0, dtype=gradient_dtype(source.dtype))
    sums = target.new_zeros(target.shape if need_target else 0, dtype=dtype)
    scale = 1 / (size * temperature * directions)

    def anchors_from(start: int) -> tuple[torch.Tensor, _Unit]:
        unit = _Unit.of(source[start : start + rows], dtype)
        return (_round(unit.rows.clone()) if fast else unit.rows), unit

    def logits_of(anchors: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.mm(anchors / temperature, candidates.T, out=panel[: len(anchors)])
        own = logits.diagonal(target_offset + start)
        positives = own.clone()
        if source_ids is not None and target_ids is not None:
            same = source_ids[start : start + rows].unsqueeze(1) == target_ids.unsqueeze(0)
            logits.masked_fill_(same, -math.inf)
            own.copy_(positives)
        return logits, positives

    def add_gradients(weights: torch.Tensor, start: int, anchors: torch.Tensor, unit: _Unit) -> None:
        weights.diagonal(target_offset + start).sub_(directions)
        part = grad_source[start : start + rows]
        product = part if need_source and part.dtype == dtype else torch.empty_like(anchors)
        if need_temperature:
            torch.mm(weights, candidates, out=product)
            slopes[start : start + rows] = (product * anchors).sum(1)
        if fast:
            _round(weights)
        if need_source:
            if fast or not need_temperature:
                torch.mm(weights, candidates, out=product)
            part.copy_(unit.backward_(product, scale))
        if need_target:
            sums.addmm_(weights.T, anchors)

    with torch.autocast(source.device.type, enabled=False):
        unit = _Unit.of(target, dtype)
        candidates = _round(unit.rows) if fast else unit.rows
        spoilt = unit.length.sum() * 0  # NaN also where the ids hide the NaN from every source
        highest = torch.full((targets,), torch.finfo(dtype).min, dtype=dtype, device=source.device)  # of each column
        totals = torch.zeros_like(highest)
        for start in range(0, size, rows):
            anchors, unit = anchors_from(start)
            logits, own = logits_of(anchors, start)
            weights = other[: len(logits)]
            if symmetric:
                losses[1, start : start + rows] = own
                raised = torch.maximum(highest, logits.amax(0))
                totals.mul_((highest - raised).exp_()).add_(torch.sub(logits, raised, out=weights).exp_().sum(0))
                highest = raised
            top = logits.amax(1, keepdim=True)
            total = torch.sub(logits, top, out=weights).exp_().sum(1, keepdim=True)
            losses[0, start : start + rows] = (top.squeeze(1) - own) + total.squeeze(1).log()
            if any(needs) and not symmetric:
                add_gradients(weights.div_(total), start, anchors, unit)
        if symmetric:
            losses[1] = (highest - losses[1]) + totals.log()
        for start in range(0, size if symmetric and any(needs) else 0, rows):
            anchors, unit = anchors_from(start)
            logits = panel if rows == size else logits_of(anchors, start)[0]
            weights = torch.sub(logits, logits.amax(1, keepdim=True), out=other[: len(logits)]).exp_()
            weights.div_(weights.sum(1, keepdim=True)).add_(logits.sub_(highest).exp_().div_(totals))
            add_gradients(weights, start, anchors, unit)
        kept = gradient_dtype(target.dtype)
        grad_target = sums if kept == dtype else torch.empty_like(sums, dtype=kept)
        for start in range(0, targets if need_target else 0, _SOME):
            part = slice(start, start + _SOME)
            grad_target[part] = _Unit.of(target[part], dtype).backward_(sums[part], scale)
        if need_temperature:
            slopes = slopes.sum() * (-scale / temperature)
    return losses.mean() + spoilt, grad_source, grad_target, slopes


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """A gradient waits for its upstream factor in fp32: in fp16 it could vanish before a loss scale saves it."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def _round(rows: torch.Tensor) -> torch.Tensor:
    return rows.copy_(rows.bfloat16())


class _Unit(NamedTuple):
    """Rows of length 1, and the two factors, (rows, 1), of the lengths they had."""

    rows: torch.Tensor
    length: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, dtype: torch.dtype) -> _Unit:
        """Whatever the size of the rows; a row of zeros stays one, of length 1."""
        largest = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True).to(dtype)
        largest = torch.where(largest == 0, 1, largest)  # the square of a length may overflow or vanish, so scale first
        unit = rows / largest
        length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        length = torch.where(length == 0, 1, length)
        return cls(unit.div_(length), length, largest)

    def backward_(self, grad: torch.Tensor, scale: float) -> torch.Tensor:
        """`scale` times the gradient of the rows as they were, in place of the gradient of the unit rows."""
        for g, s in zip(grad.split(_SOME), self.rows.split(_SOME), strict=True):
            g.addcmul_(s, (g * s).sum(1, keepdim=True), value=-1)
        return grad.mul_(scale / self.length).div_(self.largest)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source, target, temperature, value, needs, options) -> torch.Tensor:
        loss, *gradients = loss_and_gradients(source, target, value, needs=needs, **options)
        ctx.save_for_backward(*gradients)
        like = (source, target, temperature)
        ctx.like = [(x.dtype, x.shape, x.device) if need else None for x, need in zip(like, needs, strict=True)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        grads = []
        for gradient, like in zip(ctx.saved_tensors, ctx.like, strict=True):
            if like is None:
                grads.append(None)
            else:
                dtype, shape, device = like
                grads.append((gradient * upstream[0]).to(device, dtype).reshape(shape))
        return *grads, None, None, None


def info_nce(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    symmetric: bool = False,
    target_offset: int = 0,
    source_ids: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
) -> torch.Tensor:
    """Contrastive loss of N sources; source i belongs to target `target_offset` + i of M.

    Args:
        source, target: (N, D) and (M, D), M >= N, floating point, of any length: they are normalised here. A row of
            zeros has cosine 0 with everything and a gradient as if its length were 1.
        temperature: finite and above 0; the cosines are divided by it. A tensor of one element may ask for a gradient
            and may stay on the CPU.
        symmetric: the mean of the losses in both directions instead of source to target only. Needs M = N.
        target_offset: where the targets of these sources begin, from 0 to M - N.
        source_ids, target_ids: (N,) and (M,) integers that name the meaning. Where they are equal, the target is no
            negative of the source, nor the source of the target. Both or neither.
        precision: "exact", or "fast": the operands of every matrix product (rows of length 1, softmax weights) are
            rounded to bf16. fp64 input is always exact.
        backend: "auto" or "torch", this function.

    Returns:
        A scalar, fp32 (fp64 for fp64 input), the mean over the N sources (and the directions). NaN if there is a NaN
        or an infinity in the input. Can be differentiated once.

    Raises:
        ValueError, TypeError: the arguments do not fit together; see `check`.
    """
    check_backend(backend)
    check(source, target, temperature, symmetric, target_offset, source_ids, target_ids, precision)
    value = float(temperature.detach() if isinstance(temperature, torch.Tensor) else temperature)
    check_temperature(value)
    options = {
        "symmetric": symmetric,
        "target_offset": target_offset,
        "source_ids": source_ids,
        "target_ids": target_ids,
        "fast": precision == "fast",
    }
    wanted = torch.is_grad_enabled()
    learns = isinstance(temperature, torch.Tensor) and temperature.requires_grad
    needs = (wanted and source.requires_grad, wanted and target.requires_grad, wanted and learns)
    return _InfoNCE.apply(source, target, temperature, value, needs, options)  # type: ignore[return-value]
