"""What this machine can run, what will be used, and why."""

from __future__ import annotations

from typing import Any

import torch

from fastalign.training.record import device_name, kernels, versions
from fastalign_kernels import pooled_info_nce


def doctor() -> dict[str, Any]:
    """Versions, the device, and which kernels the alignment step gets there, tried on a small batch.

    Returns:
        versions: of Python and of the packages that decide, None where one is missing. device: its name. kernels:
        `backend` (`triton` or `torch`), `why`, and `problem`: None, or how the trial failed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions(),
        "device": device_name(device),
        "kernels": {**kernels(device), "problem": _trial(device)},
    }


def _trial(device: torch.device) -> str | None:
    """Loss and gradient of a small batch of token states against the same in fp64 on the CPU."""
    hidden = torch.randn(16, 12, 256, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.arange(1, 17).unsqueeze(1)).long()
    try:
        found = _loss_and_gradient(hidden.to(device), mask.to(device))
        expected = _loss_and_gradient(hidden.double(), mask)
    except Exception as error:  # whatever it is, it is what the user came here to learn
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    errors = [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return None if max(errors) < 1e-4 else f"wrong results: off by {max(errors):.1e}"


def _loss_and_gradient(hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.detach().requires_grad_()
    loss = pooled_info_nce(hidden, mask, temperature=0.1, skip_first=True, symmetric=True)
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad
