"""What is known before any row is read: the model, and the machine that will train it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.config import ModelConfig
from fastalign.config.hub import may_ask_hub
from fastalign.errors import ModelError
from fastalign.model.loading import compute_dtype, load_model_config, load_tokenizer
from fastalign.training.memory import gigabytes, parse_memory

# What a hub raises that cannot be reached; it has no base class of its own that all of them share.
AWAY = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ConnectionError"}


@dataclass(frozen=True)
class Model:
    """What is known of the model: nothing, where it is not named or its hub is away."""

    name: str
    hf_config: Any = None
    tokenizer: Any = None

    @property
    def context(self) -> int | None:
        if self.hf_config is None:
            return None
        return getattr(self.hf_config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Machine:
    """`memory` in bytes of the GPU, or of the computer where there is none; `where` it is said so."""

    on_gpu: bool
    memory: int
    dtype: torch.dtype
    where: str


def find_machine(gpu_memory: str | None) -> Machine:
    """The GPU of that size, the one here, or the CPU. Raises ConfigError for a size that is none."""
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if here.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses otherwise, with a warning
    if gpu_memory is None and here.type == "cpu":
        import psutil

        memory = int(psutil.virtual_memory().total)
        return Machine(False, memory, torch.float32, f"the CPU, {gigabytes(memory)}")
    # For a GPU elsewhere: one that has bfloat16, as all have since 2020.
    dtype = compute_dtype(ModelConfig(), here) if here.type == "cuda" else torch.bfloat16
    if gpu_memory is None:
        memory = torch.cuda.get_device_properties(here).total_memory
        return Machine(True, memory, dtype, f"the GPU here, {gigabytes(memory)}")
    memory = parse_memory(gpu_memory, "--gpu-memory")
    return Machine(True, memory, dtype, f"a GPU of {gigabytes(memory)}")


def find_model(name: str) -> Model:
    """Its config and tokenizer. Raises ModelError and ConfigError, unless it is its hub that is away."""
    if not name:
        return Model("")
    settings = ModelConfig(name_or_path=name)
    try:
        return Model(name, load_model_config(settings), load_tokenizer(settings))
    except ModelError as error:
        if not _hub_is_away(name, error):
            raise
        return Model(name)


def _hub_is_away(name: str, error: BaseException) -> bool:
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return False
    causes = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 10:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    return bool(kinds & AWAY) or any("couldn't connect" in str(cause) for cause in causes) or not may_ask_hub()
