"""InfoNCE between pooled translations, from token states to the loss in one step.

    pooled = masked_mean_pool(hidden, mask),   loss = info_nce(pooled[:N], pooled[N:])

Shapes: 2N rows (N pairs), T tokens, D hidden size. Between forward and backward it keeps the gradient of the pooled
rows, (2N, D), and the counts; the gradient of `hidden` is written once, in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastalign_kernels.reference import check_backend
from fastalign_kernels.reference import info_nce as loss
from fastalign_kernels.reference import masked_mean_pool as pool


def check(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    temperature: float | torch.Tensor,
    detach: str | None,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    precision: str,
) -> None:
    """Raise ValueError or TypeError if the arguments do not fit together. Looks at no tensor's values."""
    pool.check(hidden, mask, cu_seqlens)
    rows = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows % 2:
        raise ValueError(f"need 2N rows, the N sources and then their N targets, got {rows}")
    if detach not in (None, "source", "target"):
        raise ValueError(f"detach must be None, 'source' or 'target', not {detach!r}")
    loss.check_options(temperature, source_ids, target_ids, rows // 2, rows // 2, precision, hidden.device)


@torch.no_grad()
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
    """The loss and what its gradient needs. Arguments as in `pooled_info_nce`, checked before.

    Args:
        fast: `precision`. needs: which of the first half, the second half and the temperature need a gradient.

    Returns:
        loss: scalar. grad: (2N, D), of the pooled rows, zeros where not needed. count, first: as the pool gives them.
        grad_temperature: scalar, no elements if not needed.
    """
    pooled, count, first, _ = pool.forward(hidden, mask, cu_seqlens, skip_first, normalize=False)
    order = -1 if reverse else 1
    anchors, candidates = pooled.chunk(2)[::order]
    anchor_ids, candidate_ids = (source_ids, target_ids)[::order]
    needs_of_roles = needs[:2][::order]
    result, *grads, grad_temperature = loss.loss_and_gradients(
        anchors,
        candidates,
        temperature,
        symmetric=symmetric,
        target_offset=0,
        source_ids=anchor_ids,
        target_ids=candidate_ids,
        fast=fast,
        needs=(*needs_of_roles, needs[2]),
    )
    grads = [part if need else torch.zeros_like(anchors) for part, need in zip(grads, needs_of_roles, strict=True)]
    return result, torch.cat(grads[::order]), count, first, grad_temperature


class _PooledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, mask, cu_seqlens, temperature, value, needs, options):
        result, grad, count, first, grad_temperature = loss_and_gradients(
            hidden, mask, cu_seqlens, value, needs=needs, **options
        )
        ctx.save_for_backward(grad, count, first, mask, cu_seqlens, grad_temperature)
        ctx.like = (hidden.shape, hidden.dtype) if needs[0] or needs[1] else None
        ctx.temperature = (temperature.device, temperature.dtype, temperature.shape) if needs[2] else None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        grad, count, first, mask, cu_seqlens, grad_temperature = ctx.saved_tensors
        grad_hidden = None
        if ctx.like is not None:
            unused = grad.new_empty(0)  # of a normalised mean
            shape, dtype = ctx.like
            grad_hidden = pool.backward(grad, unused, count, first, unused, mask, cu_seqlens, shape, dtype, upstream[0])
        if ctx.temperature is not None:
            device, dtype, shape = ctx.temperature
            grad_temperature = (grad_temperature * upstream[0]).to(device, dtype).reshape(shape)
        else:
            grad_temperature = None
        return grad_hidden, None, None, grad_temperature, None, None, None


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
        temperature, symmetric, precision: as in `info_nce`.
        reverse: the targets look for their sources, instead of the sources for their targets.
        detach: "source" or "target": the half of the rows, by its place, that gets a zero gradient.
        source_ids, target_ids: (N,) integers that name the meaning of the first and of the second half, also with
            `reverse`. Where they are equal, the two are not told apart. Both or neither.
        backend: "auto" or "torch", this function.

    Returns:
        A scalar, fp32 (fp64 for fp64 input). NaN if there is a NaN or an infinity in a token that counts. Can be
        differentiated once.

    Raises:
        ValueError, TypeError: the arguments do not fit together; see `check`.
    """
    check_backend(backend)
    check(hidden, mask, cu_seqlens, temperature, detach, source_ids, target_ids, precision)
    value = float(temperature.detach() if isinstance(temperature, torch.Tensor) else temperature)
    loss.check_temperature(value)
    if cu_seqlens is not None:
        pool.check_values(cu_seqlens, hidden.shape[0])
    learns = torch.is_grad_enabled() and hidden.requires_grad
    heats = torch.is_grad_enabled() and isinstance(temperature, torch.Tensor) and temperature.requires_grad
    needs = (learns and detach != "source", learns and detach != "target", heats)
    options = {
        "skip_first": skip_first,
        "symmetric": symmetric,
        "reverse": reverse,
        "source_ids": source_ids,
        "target_ids": target_ids,
        "fast": precision == "fast",
    }
    return _PooledInfoNCE.apply(hidden, mask, cu_seqlens, temperature, value, needs, options)  # type: ignore[return-value]
