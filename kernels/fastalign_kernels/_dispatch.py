"""Triton or the PyTorch twin: the one place that decides, and says once why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging

import torch

BACKENDS = ("auto", "triton", "torch")
OLDEST = (8, 0)  # compute capability; older ones are not in the table of `fastalign_kernels.compile`
HAS_TRITON = importlib.util.find_spec("triton") is not None

logger = logging.getLogger("fastalign_kernels")


def use_triton(backend: str, tensor: torch.Tensor) -> bool:
    """Whether the kernels run on this tensor; what they cannot do, the twin does.

    Args:
        backend: `auto`, `triton` or `torch`.
        tensor: the one that holds the states; its device and dtype decide.

    Raises:
        ValueError: no such backend, or `triton` is asked for where it cannot be.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "torch":
        return False
    obstacle = why_not_triton(tensor.device, tensor.dtype)
    if obstacle is None:
        # The interpreter is for tests that ask for it: it is slower than the twin by far.
        return backend == "triton" or tensor.device.type == "cuda"
    if backend == "triton":
        raise ValueError(
            f"backend='triton' cannot be used here: {obstacle}; leave it at 'auto' to run the PyTorch twin"
        )
    if tensor.device.type == "cuda":
        _say_once(obstacle)
    return False


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What keeps the kernels from running on tensors of this device and dtype; None if nothing does."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take fp32, bf16 and fp16, not {dtype}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.hip:
            return "the kernels were never tried on ROCm"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"this GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
        return None
    return None if device.type == "cpu" and interpreting() else f"Triton needs a CUDA device, the tensor is on {device}"


def interpreting() -> bool:
    """Whether Triton runs its kernels one by one in NumPy (TRITON_INTERPRET=1), which works without a GPU."""
    if not HAS_TRITON:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches on that, whatever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """How many programs' worth of hardware there is, to share long rows out."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _say_once(obstacle: str) -> None:
    logger.warning("PyTorch twins instead of Triton kernels: %s", obstacle)
