"""Bases in 4 or 8 bits through bitsandbytes: made while loading, or as a checkpoint has them.

Only the linear layers of the blocks are packed. Embedding, head and norms keep the number format of the base, and
nothing makes a copy of them in fp32: what is frozen and read only needs none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastalign.config import ModelConfig
from fastalign.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

READABLE = ("nf4", "fp4", "int8")  # of bitsandbytes; tests/test_quantization.py trains on each


def stored_quantization(hf_config: PretrainedConfig) -> str | None:
    """How a checkpoint's weights are quantised: one of `READABLE`, or its method's name; None where they are not."""
    settings = _settings(hf_config)
    if not settings:
        return None
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type") or "fp4")
    method = settings.get("quant_method")
    return "int8" if settings.get("load_in_8bit") else str(getattr(method, "value", method))


def effective_quantization(config: ModelConfig, hf_config: PretrainedConfig) -> str:
    """How the base is held: as its checkpoint is quantised, else as configured."""
    return stored_quantization(hf_config) or config.quantization


def require_quantization(config: ModelConfig, hf_config: PretrainedConfig, device: torch.device) -> list[str]:
    """What has to be said of how the base is held, before any weight is read.

    Raises:
        ModelError: the checkpoint is quantised in a way that cannot be trained on here.
        ConfigError: it needs bitsandbytes, which is missing or does not work on the device.
    """
    stored = stored_quantization(hf_config)
    if stored is not None and stored not in READABLE:
        raise ModelError(
            f"model.name_or_path: {config.name_or_path!r} is quantised with {stored}, which adapters cannot be trained "
            "on here; take its unquantised version, with model.quantization: nf4 to save memory, or a bitsandbytes one"
        )
    held = effective_quantization(config, hf_config)
    if held == "none":
        return []
    asked = f"the checkpoint is quantised ({stored})" if stored else "model.quantization: nf4"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(*quantize_4bit(torch.ones(64, device=device), quant_type="nf4"))
    except Exception as error:  # a library without its native code raises anything at all
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        why = "not installed" if missing else f"broken ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"
        remedy = "pip install bitsandbytes" if missing else "pip install --force-reinstall --no-deps bitsandbytes"
        other = "take an unquantised model" if stored else "set model.quantization: none"
        raise ConfigError(f"{asked} needs bitsandbytes, which is {why}; {remedy}, or {other}") from error
    if stored == "int8":  # it warns at every product that it rounds to 16 bits
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if stored is not None and config.quantization not in ("none", stored):
        return [f"model.quantization: {config.quantization} has no effect: the checkpoint is {stored}, and stays it"]
    return []


def nf4(dtype: torch.dtype, *, sharded: bool, skipped: Sequence[str] | None = None) -> Any:
    """The settings of a base in NF4: quantised scales (0.37 bits less a weight), computing in `dtype`.

    Args:
        sharded: as for `quant_storage`.
        skipped: modules that are not packed; None: the head, as transformers finds it.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=quant_storage(dtype, sharded=sharded),
        llm_int8_skip_modules=None if skipped is None else [*skipped],
    )


def quant_storage(dtype: torch.dtype, *, sharded: bool) -> torch.dtype:
    """The number format that packed weights pose as; the bits are the same.

    On one process, under DDP and ZeRO-1/2 each rank holds whole parameters: bytes (uint8). Where parameters are
    sharded over the ranks (ZeRO-3), those of one format are gathered together, so that packed weights pose as `dtype`,
    as all others. (A checkpoint that is stored as bytes works there, too, with more and smaller messages.)
    """
    return dtype if sharded else torch.uint8


def computing_in(
    hf_config: PretrainedConfig, dtype: torch.dtype, skipped: Sequence[str] | None = None
) -> dict[str, Any]:
    """The settings of a quantised checkpoint, with the number format that this run computes in.

    Args:
        skipped: as for `nf4`, where the checkpoint does not say.
    """
    settings = {**_settings(hf_config), "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    if skipped is not None and settings.get("llm_int8_skip_modules") is None:
        settings["llm_int8_skip_modules"] = [*skipped]
    return settings


def _settings(hf_config: Any) -> Mapping[str, Any]:
    for part in (hf_config, hf_config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            return settings if isinstance(settings, Mapping) else settings.to_dict()
    return {}
