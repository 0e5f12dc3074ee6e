"""The states that a causal language model gives its head, and the head as a function of any rows of them.

A head is more than a matrix: it is tied or has a bias, its logits are scaled (Cohere, Granite) or capped (Gemma). So no
formula is written down here. For its states the decoder is called alone, as `early_exit` does; for the logits of some
rows the causal model's own forward is called with a decoder that does nothing but give these rows.

A family may do something unforeseen. So on the first use of a model, logits made this way are compared with those of
its plain forward, on one short row, else ModelError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastalign.errors import ModelError
from fastalign.model.parts import (
    decoder_arguments,
    decoder_of,
    first_of,
    own_forward,
    replaced_forward,
    text_config_of,
    unwrap,
)

WHOLE = "set task.logits_memory: whole, which computes all logits"
_SHORT = 3  # tokens that the comparison is made on

# What the causal model's forward calls for its states, once that is verified. Kept beside the models: a copied or saved
# model must not carry it.
_called: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
T = TypeVar("T")


class Head:
    """Rows of final states (M, D) to their logits (M, V), as the model's own code makes them, in its dtype."""

    def __init__(self, forward: Callable[..., Any], called: nn.Module, kind: type):
        self._forward, self._called, self._kind = forward, called, kind

    def __call__(self, rows: Tensor) -> Tensor:
        states = rows.unsqueeze(0)
        if issubclass(self._kind, tuple):
            output: Any = (states,)
        else:
            output = states if issubclass(self._kind, Tensor) else self._kind(last_hidden_state=states)
        nothing = torch.zeros(states.shape[:2], dtype=torch.long, device=rows.device)
        with replaced_forward(self._called, lambda *_, **__: output):
            return _logits(self._forward(input_ids=nothing)).flatten(0, 1)


def through_head(model: nn.Module, use: Callable[[Tensor, Head], T], **inputs: Any) -> T:
    """What `use` makes of the final states and the head, inside a forward of `model`.

    Call it with the outermost wrapper. `use` is called within, so the head runs under the same autocast as ever, and
    DDP and DeepSpeed see the result. All of it is put back on the way out.

    Args:
        model: a causal language model, in whatever wraps it.
        use: of the states (N, T, D) after the final norm, in the dtype the model computes in and with gradients as
            usual, and the `Head`, which works until `use` returns. Gives a tensor.
        inputs: what the model takes: input_ids and attention_mask (N, T) and so on.

    Raises:
        ModelError: the model is no decoder-only causal LM, or its logits are not what decoder and head give.
    """
    causal = unwrap(model)
    config = text_config_of(causal)
    try:
        decoder = decoder_of(causal)
    except ModelError as error:
        raise ModelError(f"{error}, or {WHOLE}") from None
    own: Callable[..., Any] = own_forward(causal).get("forward") or type(causal).forward.__get__(causal)
    to_kwargs = decoder_arguments(causal, decoder, causal.config, config)
    check, then = _eagerly(_verified), _eagerly(use)
    ran = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran = True
        if causal not in _called:
            _called[causal] = check(causal, decoder, own, to_kwargs, args, kwargs)
        output = decoder(**to_kwargs(args, kwargs))
        return then(first_of(output), Head(own, _called[causal], type(output)))

    with replaced_forward(causal, forward):
        result = model(**inputs)
    if not ran:
        raise _unknown(causal, "what wraps it does not call the causal model's own forward")
    return result


@torch.no_grad()
def _verified(
    causal: nn.Module,
    decoder: nn.Module,
    own: Callable[..., Any],
    to_kwargs: Callable[[tuple, dict[str, Any]], dict[str, Any]],
    args: tuple,
    kwargs: dict[str, Any],
) -> nn.Module:
    """The module whose states the head takes: the decoder, or what is within it (OPT calls that).

    ModelError where logits from states are not those of the plain forward, on the first tokens and without dropout.
    """
    args, kwargs = tuple(map(_shortened, args)), {name: _shortened(part) for name, part in kwargs.items()}
    modes = [(module, module.training) for module in causal.modules()]
    try:
        for module, _ in modes:
            module.training = False  # not by eval(), which a module may have one of its own of
        plain = _logits(own(*args, **kwargs))[0]
        output = decoder(**to_kwargs(args, kwargs))
        # other rows, in another order: a head that mixes rows cannot be taken apart
        rows, wanted = first_of(output)[0].flip(0)[:2], plain.flip(0)[:2]
        for called in filter(None, (decoder, decoder._modules.get("decoder"))):
            if _same(Head(own, called, type(output))(rows), wanted):
                return called
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _unknown(causal, f"its forward fails without its decoder ({' '.join(str(error).split())})") from error
    finally:
        for module, training in modes:
            module.training = training
        torch.clear_autocast_cache()  # a weight that was cast without a gradient would be used for training
    raise _unknown(causal, "its logits are not those that its head makes of its decoder's states")


def _same(ours: Tensor, wanted: Tensor) -> bool:
    if ours.shape != wanted.shape:
        return False
    exact = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())  # two shapes may take two kernels
    return torch.allclose(ours, wanted, rtol=0.0, atol=exact, equal_nan=True)


def _eagerly(function: Any) -> Any:
    """Not traced, where the model is compiled: chunks and their gradients are many small graphs."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _shortened(part: Any) -> Any:
    return part[:1, :_SHORT] if isinstance(part, Tensor) and part.dim() > 1 else part


def _logits(output: Any) -> Tensor:
    return first_of(output) if isinstance(output, (tuple, Tensor)) else output.logits


def _unknown(causal: nn.Module, why: str) -> ModelError:
    name, kind = type(causal).__name__, getattr(causal.config, "model_type", "unknown type")
    return ModelError(f"{name} ({kind}) has a head that is not one we know: {why}; {WHOLE}")
