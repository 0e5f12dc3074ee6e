"""The PyTorch twins: the CPU path, the baseline and the oracle of every kernel."""

from __future__ import annotations


def check_backend(backend: str) -> None:
    """A twin is the backend "torch" itself: it takes the word so that it can stand in for the public function."""
    if backend == "triton":
        raise ValueError("backend 'triton' is not available here: this is the PyTorch twin; use 'auto' or 'torch'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
