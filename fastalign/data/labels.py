"""Class labels of `datasets`: a file holds their numbers, and its features their names, which are what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def decoder(features: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """From a row to the same with names instead of the numbers of class labels, alone, in lists and in nested columns.

    Args:
        features: `datasets.Features`, or None.
    """
    decoders = {name: decode for name, feature in (features or {}).items() if (decode := _decoder(feature))}
    if not decoders:
        return lambda row: row
    return lambda row: {k: decoders[k](value) if k in decoders else value for k, value in row.items()}


def _decoder(feature: Any) -> Callable[[Any], Any] | None:
    """None where a feature holds no class label."""
    names = getattr(feature, "names", None)
    if isinstance(names, list):
        return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else value
    if isinstance(feature, dict):
        if not any(map(_decoder, feature.values())):
            return None
        inside = decoder(feature)
        return lambda row: inside(row) if isinstance(row, dict) else row
    inner = getattr(feature, "feature", None)
    decode = None if inner is None else _decoder(inner)
    if decode is None:
        return None
    return lambda values: [decode(value) for value in values] if isinstance(values, list) else values
