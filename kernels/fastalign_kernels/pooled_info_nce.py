"""The whole alignment objective: token states in, loss out, and the gradient straight back to the tokens.

    pooled = masked_mean_pool(hidden, mask),   loss = info_nce(pooled[:N], pooled[N:])

Shapes: 2N rows (N sources, then their N targets) of T tokens, D hidden size; or flat. fp32 accumulation.
Up to 256 pairs it takes five launches: pool; products, weights, gradient of the pooled rows (`regimes/fused.py`); and,
in the backward, one write to the tokens with the projection to unit length and the upstream factor in it. Larger
batches use the panels of `info_nce`; long rows are pooled in two launches, `detach` fills two tensors with zeros.
Never made: anything of the states' size but their gradient. Kept between forward and backward: the pooled rows and
their gradient, (2N, D) each, and counts.
Bytes, for b bytes an element: those of `masked_mean_pool`, and some passes over (2N, D) in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastalign_kernels._dispatch import use_triton
from fastalign_kernels.info_nce import loss_and_gradients as info_nce_and_gradients
from fastalign_kernels.info_nce import regime, scaled
from fastalign_kernels.masked_mean_pool import pool, spread
from fastalign_kernels.reference import info_nce as loss_twin
from fastalign_kernels.reference import masked_mean_pool as pooling_twin
from fastalign_kernels.reference import pooled_info_nce as reference
from fastalign_kernels.regimes import fused


def loss_and_gradients(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    temperature: float,
    *,
    skip_first: bool,
    symmetric: bool,
    reverse: bool,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    fast: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The forward on Triton: what the twin gives; pooled rows and `alongs` where the projection is left to `spread`."""
    pooled, counts, firsts, _ = pool(hidden, mask, cu_seqlens, skip_first, normalize=False)
    rows = len(pooled)
    both = needs[0] and needs[1]
    grad = torch.empty_like(pooled) if both else torch.zeros_like(pooled)
    alongs = fused.empty_alongs(pooled, rows if regime(rows // 2, rows // 2, fast=fast) == "fused" else 0)
    alongs = alongs if both else alongs.zero_()
    order = -1 if reverse else 1
    anchors, candidates = pooled.chunk(2)[::order]
    anchor_ids, candidate_ids = (source_ids, target_ids)[::order]
    result, *_, slope = info_nce_and_gradients(
        anchors, candidates, temperature, symmetric=symmetric, target_offset=0, source_ids=anchor_ids,
        target_ids=candidate_ids, fast=fast, needs=(*needs[:2][::order], needs[2]), grads=grad.chunk(2)[::order],
        alongs=alongs.chunk(2, dim=2)[::order] if alongs.numel() else None,
    )  # fmt: skip
    return result, grad, counts, firsts, slope, pooled if alongs.numel() else pooled.new_empty(0), alongs


@torch.library.custom_op("fastalign::pooled_info_nce", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    temperature: torch.Tensor,
    skip_first: bool,
    symmetric: bool,
    reverse: bool,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    fast: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # loss, gradient of the pooled rows and, for the backward: counts, firsts, slope, pooled, alongs
    loss_twin.check_temperature(tau := float(temperature))
    if cu_seqlens is not None:
        pooling_twin.check_values(cu_seqlens, hidden.shape[0])
    triton = use_triton(backend, hidden)
    found = (loss_and_gradients if triton else reference.loss_and_gradients)(
        hidden,
        mask,
        cu_seqlens,
        tau,
        skip_first=skip_first,
        symmetric=symmetric,
        reverse=reverse,
        source_ids=source_ids,
        target_ids=target_ids,
        fast=fast,
        needs=needs,
    )
    return found if triton else (*found, found[0].new_empty(0), found[0].new_empty(0))  # type: ignore[return-value]


@_forward.register_fake
def _(
    hidden, mask, cu_seqlens, temperature, skip_first, symmetric, reverse, source_ids, target_ids, fast, needs, backend
):
    rows, width = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, hidden.shape[-1]
    grad = hidden.new_empty(rows, width, dtype=torch.promote_types(hidden.dtype, torch.float32))
    counts, firsts = (hidden.new_empty(rows, dtype=torch.int32) for _ in range(2))
    left = use_triton(backend, hidden) and regime(rows // 2, rows // 2, fast=fast) == "fused"
    pooled = torch.empty_like(grad) if left else grad.new_empty(0)
    alongs = fused.empty_alongs(grad, rows if left else 0) if left else grad.new_empty(0)
    return grad.new_empty(()), grad, counts, firsts, grad.new_empty(() if needs[2] else 0), pooled, alongs


@torch.library.custom_op("fastalign::pooled_info_nce_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    pooled: torch.Tensor,
    alongs: torch.Tensor,
    counts: torch.Tensor,
    firsts: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    upstream: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    unused = grad.new_empty(0)  # of a normalised mean
    if not use_triton(backend, torch.empty(0, dtype=dtype, device=grad.device)):
        return pooling_twin.backward(grad, unused, counts, firsts, unused, mask, cu_seqlens, shape, dtype, upstream)
    along = (pooled, alongs) if alongs.numel() else None
    return spread(grad, unused, counts, firsts, unused, mask, cu_seqlens, shape, dtype, upstream, along)


@_backward.register_fake
def _(grad, pooled, alongs, counts, firsts, mask, cu_seqlens, shape, dtype, upstream, backend):
    return grad.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else every output without a gradient gets one, of zeros, in the backward
    hidden, mask, cu_seqlens, temperature, *_, ctx.needs, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.hidden = hidden.shape, hidden.dtype
    ctx.temperature = temperature.shape, temperature.dtype, temperature.device
    ctx.save_for_backward(*output[1:], mask, cu_seqlens)


def _differentiate(ctx, upstream, *_):
    if upstream is None:  # the loss was not used
        return (None,) * 12
    grad, counts, firsts, slope, pooled, alongs, mask, cu_seqlens = ctx.saved_tensors
    grad_hidden = grad_temperature = None
    if ctx.needs[0] or ctx.needs[1]:
        grad_hidden = _backward(
            grad, pooled, alongs, counts, firsts, mask, cu_seqlens, *ctx.hidden, upstream, ctx.backend
        )
    if ctx.needs[2]:
        shape, dtype, device = ctx.temperature
        grad_temperature = scaled(slope, upstream, dtype).to(device).reshape(shape)
    return grad_hidden, None, None, grad_temperature, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)


def pooled_info_nce(
    hidden: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    skip_first: bool = False,
    symmetric: bool = False,
    reverse: bool = False,
    detach: str | None = None,
    source_ids: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
) -> torch.Tensor:
    """Contrastive loss of N pairs whose token states stand in one tensor: the N sources, then their N targets.

    Args:
        hidden, mask, cu_seqlens, skip_first: 2N rows, as in `masked_mean_pool`.
        temperature, symmetric, precision, backend: as in `info_nce`.
        reverse: the targets look for their sources, instead of the sources for their targets.
        detach: "source" or "target": the half of the rows, by its place, that gets a zero gradient.
        source_ids, target_ids: (N,) integers that name the meaning of the first and of the second half, also with
            `reverse`. Where they are equal, the two are not told apart. Both or neither.

    Returns:
        A scalar in fp32 (fp64 for fp64 input, by the twin). NaN if a token that counts holds NaN or infinity.
        Can be differentiated once.

    Raises:
        ValueError: shapes, devices, ids or the temperature do not fit, or Triton cannot run here. TypeError: wrong
            dtypes. All before any kernel is launched.
    """
    reference.check(hidden, mask, cu_seqlens, temperature, detach, source_ids, target_ids, precision)
    temperature = torch.as_tensor(temperature, dtype=None if torch.is_tensor(temperature) else torch.float64)
    learns = torch.is_grad_enabled() and hidden.requires_grad
    needs = [
        learns and detach != "source",
        learns and detach != "target",
        torch.is_grad_enabled() and temperature.requires_grad,
    ]
    options = skip_first, symmetric, reverse, source_ids, target_ids, precision == "fast", needs, backend
    return _forward(hidden, mask, cu_seqlens, temperature, *options)[0]
