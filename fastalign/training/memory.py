"""What memory there is, how an error says that it has run out, and how sizes are said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastalign.errors import FastalignError


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still get: of the GPU, with what PyTorch holds back, or of the machine."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_back
    import psutil

    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a GPU or on the CPU; not one that was told already."""
    if isinstance(error, FastalignError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign.lower() in str(error).lower() for sign in signs)


@contextmanager
def told_out_of_memory(tell: Callable[[str], FastalignError]) -> Iterator[None]:
    """Raises what `tell` makes of the first line of the error where memory runs out; lets all else pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise tell(first_line(error)) from error


def gigabytes(count: float) -> str:
    """``1.23 GB``; below a gigabyte in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def first_line(error: BaseException) -> str:
    """The first sentence of an error, at most 100 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". GPU")[0].rstrip(".")[:100]
