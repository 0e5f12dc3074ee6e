"""The causal model inside its wrappers, its decoder, and how the forward of either is replaced for a while.

The caller keeps calling the outermost wrapper (PEFT, DDP, DeepSpeed), so that what it does around a forward still
happens; what is replaced is an instance attribute deep inside, put back however the `with` is left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastalign.errors import ModelError

# Asked for one of these, transformers hooks the modules it finds, once and for good. Where a forward is replaced that
# would be a part of a model, and later full forwards would lack the rest: so never there.
_RECORDERS = ("output_hidden_states", "output_attentions", "output_router_logits")

open_exits: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Causal models inside a `with early_exit`, and their number of blocks. Beside them: no copy may carry it."""


def unwrap(model: Any) -> nn.Module:
    """The causal LM inside any number of wrappers. Raises ModelError if `model` is no module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a causal language model, got {type(model).__name__}: pass an nn.Module")
    for name in ("module", "_orig_mod"):  # DDP and DeepSpeed, torch.compile
        if model._modules.get(name) is not None:
            return unwrap(model._modules[name])
    get_base = getattr(model, "get_base_model", None)  # PEFT
    return unwrap(get_base()) if callable(get_base) else model


def text_config_of(causal: nn.Module) -> Any:
    """The configuration of its one text decoder. Raises ModelError if it is no decoder-only causal LM."""
    name = type(causal).__name__
    if causal in open_exits:
        raise ModelError(f"an early exit is already open on this {name}: leave it before opening another")
    config: Any = getattr(causal, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ModelError(f"{name} has no transformers config: load it with AutoModelForCausalLM")
    try:
        text_config = config.get_text_config()
    except ValueError as error:
        raise ModelError(f"{name} has no single text decoder, use a decoder-only model: {error}") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(text_config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder: use a decoder-only causal LM")
    return text_config


def decoder_of(causal: nn.Module) -> nn.Module:
    """What the causal model's forward calls before its head. Raises ModelError if there is nothing like that."""
    # never get_decoder(), which some families answer with the model itself; Llama 4 misnames its "model"
    prefix = getattr(causal, "base_model_prefix", "")
    decoder = next((m for n in (prefix, "model") if (m := causal._modules.get(n)) is not None), None)
    if decoder is None:
        raise ModelError(f"{type(causal).__name__} has no base decoder below a head: load it with AutoModelForCausalLM")
    return decoder


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the `with`, calling `module` runs `forward`, under the autocast that accelerate has put on its own."""
    saved = own_forward(module)
    autocast = _autocast_of(saved.get("forward"))

    def instead(*args: Any, **kwargs: Any) -> Any:
        with autocast:
            return forward(*args, **kwargs)

    try:
        vars(module)["forward"] = instead
        yield
    finally:
        vars(module).pop("forward", None)
        vars(module).update(saved)


def own_forward(module: nn.Module) -> dict[str, Any]:
    """The instance attribute `forward`, which hides that of the class; empty where there is none."""
    return {name: part for name, part in vars(module).items() if name == "forward"}


def decoder_arguments(
    causal: nn.Module, decoder: nn.Module, *configs: Any
) -> Callable[[tuple, dict[str, Any]], dict[str, Any]]:
    """A function from the arguments of the causal model to those of its decoder.

    Args:
        configs: those that may ask for a recorder of transformers.
    """
    ours = inspect.signature(type(causal).forward).parameters
    theirs = inspect.signature(type(decoder).forward).parameters
    ours_open, theirs_open = (any(p.kind is p.VAR_KEYWORD for p in s.values()) for s in (ours, theirs))
    fixed = {n: False for n in _RECORDERS if any(getattr(c, n, None) for c in configs)}
    fixed = {n: v for n, v in fixed.items() if n in theirs or theirs_open}
    default = {"use_cache": False} if "use_cache" in theirs else {}

    def takes(name: str) -> bool:  # what neither side knows stays in, to be the error it would be elsewhere
        return name in theirs or (name not in ours and (theirs_open or not ours_open))

    def to_kwargs(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(zip(list(ours)[1:], args, strict=False)) | kwargs
        return default | {n: v for n, v in given.items() if takes(n) and not n.startswith("output_")} | fixed

    return to_kwargs


def first_of(output: Any) -> Any:
    """The states in what a block or a decoder gives."""
    return output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)


def _autocast_of(forward: Any) -> AbstractContextManager:
    """The autocast that accelerate wrapped around `forward`, where a closure is the only place to find it."""
    while forward is not None:
        for cell in getattr(forward, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.autocast):
                return cell.cell_contents
        forward = getattr(forward, "__wrapped__", None)
    return nullcontext()
