"""What a run computes on: the device's name, and which kernels the alignment step gets there."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fastalign_kernels import why_not_triton


def device_name(device: torch.device) -> str:
    """Of the GPU, or the kind of device and the machine's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{'CPU' if device.type == 'cpu' else device.type}, {platform.machine()}"


def kernels(device: torch.device) -> dict[str, Any]:
    """Which kernels the alignment step gets on a device: `backend` (``triton`` or ``torch``) and `why`."""
    obstacle = why_not_triton(device)
    if device.type == "cpu":
        return {"backend": "torch", "why": "no CUDA device: the PyTorch twins are the CPU path"}
    if obstacle:
        return {"backend": "torch", "why": obstacle}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"backend": "triton", "why": f"CUDA device of compute capability {capability}"}
