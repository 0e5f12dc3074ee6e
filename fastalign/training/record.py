"""The versions that a run was made with, for summary.json."""

from __future__ import annotations

import platform

from fastalign.config.checks import installed_version

PACKAGES = (
    "fastalign", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes",
    "deepspeed",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide what a run computes; None where one is not installed."""
    return {"python": platform.python_version(), **{package: installed_version(package) for package in PACKAGES}}
