"""InfoNCE on cosines: each source has to find its own target among all targets of the batch.

    loss = mean_i  logsumexp_j(s_i . t_j / temperature) - s_i . t_i / temperature,   s, t of unit length

(Liu & Niehues 2025, arXiv 2502.14830, the alignment loss; van den Oord et al. 2018, arXiv 1807.03748, eq. 4).
Shapes: N pairs, D dimensions. Works in fp32 (fp64 for fp64 input). This version holds the (N, N) matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float,
    symmetric: bool = False,
    source_ids: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrastive loss of N pairs; row i of `source` belongs to row i of `target`.

    Args:
        source, target: (N, D), floating point, of any length: they are normalised here.
        temperature: above 0; the cosines are divided by it.
        symmetric: the mean of the losses in both directions instead of source to target only.
        source_ids, target_ids: (N,) integers that name the meaning. Where they are equal (off the diagonal), the
            target is no negative of the source. Both or neither.

    Returns:
        A scalar, the mean over the N pairs (and the directions).

    Raises:
        ValueError: the shapes do not fit, or the temperature is not above 0. TypeError: not floating point.
    """
    if source.dim() != 2 or source.shape != target.shape or 0 in source.shape:
        raise ValueError(
            f"need source and target (N, D), N and D above 0, got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    if not (source.is_floating_point() and target.is_floating_point()):
        raise TypeError(f"source and target must be floating point, not {source.dtype} and {target.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if (source_ids is None) != (target_ids is None):
        raise ValueError("give source_ids and target_ids, or neither")
    size = source.shape[0]
    for ids in (source_ids, target_ids):
        if ids is not None and ids.shape != (size,):
            raise ValueError(f"ids must be ({size},), got {tuple(ids.shape)}")
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    with torch.autocast(source.device.type, enabled=False):
        logits = _unit(source.to(dtype)) @ _unit(target.to(dtype)).T / temperature
    if source_ids is not None and target_ids is not None:
        same = source_ids.unsqueeze(1) == target_ids.unsqueeze(0)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
    positives = torch.arange(size, device=source.device)
    loss = F.cross_entropy(logits, positives)
    return (loss + F.cross_entropy(logits.T, positives)) / 2 if symmetric else loss


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, whatever their size. A row of zeros stays one, with a gradient as if its length were 1."""
    largest = rows.detach().abs().amax(dim=1, keepdim=True)  # its square may overflow or vanish, so scale first
    rows = rows / torch.where(largest > 0, largest, 1)
    squares = rows.square().sum(dim=1, keepdim=True)
    return rows / torch.where(squares > 0, squares, 1).sqrt()
