"""The alignment objective: InfoNCE on the cosines of pooled translations (Liu & Niehues 2025, arXiv 2502.14830)."""

from __future__ import annotations

from typing import Literal

import torch

from fastalign_kernels import info_nce, pooled_info_nce

Direction = Literal["source_to_target", "target_to_source", "symmetric"]
Side = Literal["source", "target"]


def alignment_loss(
    hidden: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float,
    direction: Direction = "symmetric",
    detach: Side | None = None,
    meaning: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrastive loss of a batch of translation pairs, from token states; mean over the pairs.

    Args:
        hidden: (2N, T, D) states of a layer; row N + i translates row i.
        mask: (2N, T), nonzero marks the tokens that are averaged. None: all are.
        temperature: of the softmax over cosines.
        direction: from the anchors to their candidates.
        detach: the side that gets a zero gradient.
        meaning: (N,) integers; pairs with equal ones are not each other's negatives. None: all are.

    Returns:
        A scalar, fp32.

    Raises:
        ValueError: a direction or a side that does not exist, or shapes that do not fit.
    """
    _check(direction, detach)
    return pooled_info_nce(
        hidden,
        mask,
        temperature=temperature,
        symmetric=direction == "symmetric",
        reverse=direction == "target_to_source",
        detach=detach,
        source_ids=meaning,
        target_ids=meaning,
    )


def alignment_loss_of_vectors(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float,
    direction: Direction = "symmetric",
    detach: Side | None = None,
    meaning: torch.Tensor | None = None,
) -> torch.Tensor:
    """`alignment_loss` of sentence vectors that are pooled already, but need not have unit length.

    Args:
        source, target: (N, D), floating point; target[i] translates source[i].
        temperature, direction, detach, meaning: as in `alignment_loss`.

    Returns:
        A scalar, fp32.

    Raises:
        ValueError: a direction or a side that does not exist, or shapes that do not fit.
    """
    _check(direction, detach)
    source = source.detach() if detach == "source" else source
    target = target.detach() if detach == "target" else target
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


def _check(direction: str, detach: str | None) -> None:
    if direction not in ("source_to_target", "target_to_source", "symmetric"):
        raise ValueError(f"direction must be source_to_target, target_to_source or symmetric, not {direction!r}")
    if detach not in (None, "source", "target"):
        raise ValueError(f"detach must be source, target or None, not {detach!r}")
