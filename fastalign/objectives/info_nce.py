"""The alignment objective: InfoNCE on the cosines of pooled translations (Liu & Niehues 2025, arXiv 2502.14830)."""

from __future__ import annotations

from typing import Literal

import torch

from fastalign_kernels import info_nce


def alignment_loss(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float,
    direction: Literal["source_to_target", "target_to_source", "symmetric"] = "symmetric",
    detach: Literal["source", "target"] | None = None,
    meaning: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrastive loss of a batch of translation pairs, mean over the pairs.

    Args:
        source, target: (N, D) pooled states; row i of the one translates row i of the other.
        temperature: of the softmax over cosines.
        direction: from the anchors to their candidates.
        detach: the side that gets no gradient.
        meaning: (N,) integers; pairs with equal ones are not each other's negatives. None: all are.

    Returns:
        A scalar, fp32.

    Raises:
        ValueError: a direction or a side that does not exist.
    """
    if direction not in ("source_to_target", "target_to_source", "symmetric"):
        raise ValueError(f"direction must be source_to_target, target_to_source or symmetric, not {direction!r}")
    if detach not in (None, "source", "target"):
        raise ValueError(f"detach must be source, target or None, not {detach!r}")
    if detach == "source":
        source = source.detach()
    elif detach == "target":
        target = target.detach()
    if direction == "target_to_source":
        source, target = target, source
    return info_nce(
        source,
        target,
        temperature=temperature,
        symmetric=direction == "symmetric",
        source_ids=meaning,
        target_ids=meaning,
    )
