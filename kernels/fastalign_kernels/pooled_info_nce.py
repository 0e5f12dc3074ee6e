"""The whole alignment objective: token states in, loss out, and the gradient straight back to the tokens.

    pooled = masked_mean_pool(hidden, mask),   loss = info_nce(pooled[:N], pooled[N:])

Shapes: 2N rows (N sources, then their N targets) of T tokens, D hidden size; or flat. fp32 accumulation.
Up to 128 pairs it takes four launches: pool, share the products out, loss and gradient of the pooled rows
(`regimes/fused.py`), and, in the backward, one write of the gradient with the upstream factor in it. Larger batches use
the panels of `info_nce`; long rows are pooled in two launches.
Never made: anything of the states' size but their gradient. Kept between forward and backward: (2N, D) and counts.
Bytes, for b bytes an element: those of `masked_mean_pool`, and 3 reads and 2 writes of (2N, D) fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastalign_kernels._dispatch import use_triton
from fastalign_kernels.info_nce import loss_and_gradients as info_nce_and_gradients
from fastalign_kernels.masked_mean_pool import backward, pool
from fastalign_kernels.reference import info_nce as loss_twin
from fastalign_kernels.reference import masked_mean_pool as pooling_twin
from fastalign_kernels.reference import pooled_info_nce as reference


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward on Triton; same contract as the twin's."""
    pooled, counts, firsts, _ = pool(hidden, mask, cu_seqlens, skip_first, normalize=False)
    grad = torch.empty_like(pooled) if needs[0] and needs[1] else torch.zeros_like(pooled)
    order = -1 if reverse else 1
    anchors, candidates = pooled.chunk(2)[::order]
    anchor_ids, candidate_ids = (source_ids, target_ids)[::order]
    result, *_, slope = info_nce_and_gradients(
        anchors, candidates, temperature, symmetric=symmetric, target_offset=0, source_ids=anchor_ids,
        target_ids=candidate_ids, fast=fast, needs=(*needs[:2][::order], needs[2]), grads=grad.chunk(2)[::order],
    )  # fmt: skip
    return result, grad, counts, firsts, slope


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss_twin.check_temperature(tau := float(temperature))
    if cu_seqlens is not None:
        pooling_twin.check_values(cu_seqlens, hidden.shape[0])
    run = loss_and_gradients if use_triton(backend, hidden) else reference.loss_and_gradients
    return run(
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
        needs=(needs[0], needs[1], needs[2]),
    )


@_forward.register_fake
def _(hidden, mask, cu_seqlens, temperature, skip_first, symmetric, reverse, source_ids, target_ids, fast, needs, *_):
    rows = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pooled = hidden.new_empty(rows, hidden.shape[-1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    counts, firsts = (hidden.new_empty(rows, dtype=torch.int32) for _ in range(2))
    return pooled.new_empty(()), pooled, counts, firsts, pooled.new_empty(() if needs[2] else 0)


def _save(ctx, inputs, output):
    hidden, mask, cu_seqlens, temperature, *_, ctx.needs, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.hidden = hidden.shape, hidden.dtype
    ctx.temperature = temperature.shape, temperature.dtype, temperature.device
    ctx.save_for_backward(*output[1:], mask, cu_seqlens)


def _differentiate(ctx, upstream, *_):
    grad, counts, firsts, slope, mask, cu_seqlens = ctx.saved_tensors
    grad_hidden = grad_temperature = None
    if ctx.needs[0] or ctx.needs[1]:
        unused = grad.new_empty(0)  # of a normalised mean
        grad_hidden = backward(
            grad, unused, counts, firsts, unused, mask, cu_seqlens, *ctx.hidden, upstream, ctx.backend
        )
    if ctx.needs[2]:
        shape, dtype, device = ctx.temperature
        grad_temperature = (slope * upstream).to(device, dtype).reshape(shape)
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
