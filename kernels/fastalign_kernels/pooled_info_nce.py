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
from fastalign_kernels.masked_mean_pool import backward, pool
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
    pairs = len(pooled) // 2
    make = torch.zeros_like if needs[0] != needs[1] else torch.empty_like  # one half may get nothing
    grad = make(pooled)
    alongs = None
    if regime(pairs, pairs, fast=fast) == "fused":
        alongs = make(fused.empty_alongs(pooled, 2 * pairs))
    order = -1 if reverse else 1
    anchors, candidates = pooled.chunk(2)[::order]
    anchor_ids, candidate_ids = (source_ids, target_ids)[::order]
    result, *_, slope = info_nce_and_gradients(
        anchors, candidates, temperature, symmetric=symmetric, target_offset=0, source_ids=anchor_ids,
        target_ids=candidate_ids, fast=fast, needs=(*needs[:2][::order], needs[2]), grads=grad.chunk(2)[::order],
        alongs=None if alongs is None else alongs.chunk(2, dim=2)[::order],
    )  # fmt: skip
    left = _nothing_left(pooled) if alongs is None else (pooled, alongs)
    return result, grad, counts, firsts, slope, *left


def _nothing_left(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of pooled rows and `alongs`, where the gradient is projected already."""
    return like.new_empty(0), like.new_empty(0)


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
    return found if triton else (*found, *_nothing_left(found[0]))  # type: ignore[return-value]


@_forward.register_fake
def _(
    hidden, mask, cu_seqlens, temperature, skip_first, symmetric, reverse, source_ids, target_ids, fast, needs, backend
):
    rows, width = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, hidden.shape[-1]
    grad = hidden.new_empty(rows, width, dtype=torch.promote_types(hidden.dtype, torch.float32))
    counts, firsts = (hidden.new_empty(rows, dtype=torch.int32) for _ in range(2))
    fused_here = use_triton(backend, hidden) and regime(rows // 2, rows // 2, fast=fast) == "fused"
    left = (torch.empty_like(grad), fused.empty_alongs(grad, rows)) if fused_here else _nothing_left(grad)
    return grad.new_empty(()), grad, counts, firsts, grad.new_empty(() if needs[2] else 0), *left


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
        unused = grad.new_empty(0)  # norms of normalised means
        grad_hidden = backward(
            grad, pooled, counts, firsts, unused, mask, cu_seqlens, *ctx.hidden, upstream, alongs, ctx.backend
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
