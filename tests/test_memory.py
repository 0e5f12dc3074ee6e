"""What counts as out of memory, what is free, and how sizes are said."""

from __future__ import annotations

import torch

from fastalign.errors import RunError
from fastalign.training.memory import free_bytes, gigabytes, is_out_of_memory


def test_what_counts_as_out_of_memory() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes"), ValueError("out of memory"), RunError("out of memory: said already")):
        assert not is_out_of_memory(error)


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert (gigabytes(1_234_000_000), gigabytes(56_700_000)) == ("1.23 GB", "57 MB")
