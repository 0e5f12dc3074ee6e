"""The versions that a run was made with, for summary.json."""

from __future__ import annotations

import importlib.metadata
import platform

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
