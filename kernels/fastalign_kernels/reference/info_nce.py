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
    if source.dim() != 2 or source.shape != target.shape:
        raise ValueError(f"need source and target (N, D), got {tuple(source.shape)} and {tuple(target.shape)}")
    if not (source.is_floating_point() and target.is_floating_point()):
        raise TypeError(f"source and target must be floating point, not {source.dtype} and {target.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if (source_ids is None) != (target_ids is None):
        raise ValueError("give source_ids and target_ids, or neither")
    size = source.shape[0]
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    with torch.autocast(source.device.type, enabled=False):
        logits = F.normalize(source.to(dtype), dim=1) @ F.normalize(target.to(dtype), dim=1).T / temperature
    if source_ids is not None and target_ids is not None:
        if source_ids.shape != (size,) or target_ids.shape != (size,):
            raise ValueError(f"ids must be ({size},), got {tuple(source_ids.shape)} and {tuple(target_ids.shape)}")
        same = source_ids.unsqueeze(1) == target_ids.unsqueeze(0)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
    positives = torch.arange(size, device=source.device)
    loss = F.cross_entropy(logits, positives)
    return (loss + F.cross_entropy(logits.T, positives)) / 2 if symmetric else loss
