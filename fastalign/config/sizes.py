"""Sizes of memory, as users write them."""

from __future__ import annotations

import re

from fastalign.config.keys import TaskConfig
from fastalign.errors import ConfigError

UNITS = {"m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9, "gb": 10**9, "gib": 2**30, "tb": 10**12, "tib": 2**40}
_RULE = "a size from 100MB to 10TB such as 8GB, 24G or 12GiB"


def parse_memory(text: str, key: str, *, least: int = 10**8, rule: str = _RULE) -> int:
    """Bytes of ``8GB``, ``24G``, ``12GiB`` or ``8000MB``.

    Args:
        key: that the user has set. least: bytes that it must have. rule: what it must be, in words.

    Raises:
        ConfigError: it is no such size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    size = float(match[1]) * UNITS.get(match[2].lower(), 0) if match else 0
    if not least <= size <= 10**13:
        raise ConfigError(f"{key} must be {rule}, not {text!r}")
    return round(size)


def logits_bytes(task: TaskConfig) -> int | None:
    """Of `task.logits_memory`; None for `whole`. Raises ConfigError."""
    if task.logits_memory == "whole":
        return None
    rule = "a size from 1MB to 10TB such as 256MB or 1GiB, or 'whole'"
    return parse_memory(task.logits_memory, "task.logits_memory", least=10**6, rule=rule)
