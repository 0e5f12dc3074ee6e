"""fastalign: fine-tune a decoder LLM on a task while pulling translations together at a middle layer.

The public names below are loaded when they are first used, so that ``import fastalign`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastalign.config import Config as Config
    from fastalign.config import load_config as load_config
    from fastalign.errors import ConfigError as ConfigError
    from fastalign.errors import DataError as DataError
    from fastalign.errors import ModelError as ModelError
    from fastalign.errors import RunError as RunError
    from fastalign.model.early_exit import early_exit as early_exit
    from fastalign.model.early_exit import hidden_at as hidden_at
    from fastalign.model.encode import encode as encode
    from fastalign.training.run import train as train
    from fastalign.training.trainer import AlignTrainer as AlignTrainer

__version__ = "0.1.0"

_HOMES = {
    "Config": "fastalign.config",
    "load_config": "fastalign.config",
    "ConfigError": "fastalign.errors",
    "DataError": "fastalign.errors",
    "ModelError": "fastalign.errors",
    "RunError": "fastalign.errors",
    "early_exit": "fastalign.model.early_exit",
    "hidden_at": "fastalign.model.early_exit",
    "encode": "fastalign.model.encode",
    "AlignTrainer": "fastalign.training.trainer",
    "train": "fastalign.training.run",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastalign' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
