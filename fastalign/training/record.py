"""What a run was made with: versions, device and kernels, for summary.json and the doctor."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastalign_kernels import why_not_triton

PACKAGES = (
    "fastalign", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes",
    "deepspeed",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide what a run computes; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: torch.device) -> str:
    """Of the GPU, or the CPU's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"


def kernels(device: torch.device) -> dict[str, Any]:
    """Which kernels the alignment step gets on a device: `backend` (``triton`` or ``torch``) and `why`."""
    obstacle = why_not_triton(device)
    if device.type == "cpu":
        return {"backend": "torch", "why": "no CUDA device: the PyTorch twins are the CPU path"}
    if obstacle:
        return {"backend": "torch", "why": obstacle}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"backend": "triton", "why": f"CUDA device of compute capability {capability}"}
