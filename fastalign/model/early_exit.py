"""Run a causal language model up to a middle layer and get that layer's states, exactly and at no extra cost.

Layer index, everywhere: `l` is the output of block `l` before the final norm, 1 <= l <= L; 0 would be the
embeddings and is not a layer to exit from.

What is swapped inside the `with`, on the live model and without copying a weight: the decoder's list of
blocks (for one of its first l), its final norm (for the identity) and the causal model's `forward` (for an
instance attribute that calls the decoder alone, so no head, logit scaling or soft-capping runs). The caller
keeps calling the outermost wrapper (PEFT, DDP, DeepSpeed): what that does around a forward still happens.
All three are put back on the way out, however the `with` is left.

Why not otherwise: an exception thrown from a hook skips the post-hooks of every enclosing module (DeepSpeed
needs them); a hook that only listens stops nothing; and many families ignore `config.num_hidden_layers` once
built, so that lowering it silently runs every block.

A family may still do something unforeseen. On the first use of a model, a layer and a mode (train or eval)
the blocks are watched: each of 1..l must run once, none above, and the state that comes back must be what
block l gave, else ModelError. Afterwards no hook is left (but those that tap lower layers), nothing checked.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError, ModelError

_FINAL_NORMS = {"norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm", "final_norm"}
_FINAL_NORMS |= {"layer_norm", "embedding_norm"}  # XGLM and BioGPT, LFM2
# Asked for one of these, transformers hooks the modules it finds, once and for good. Inside the `with` that
# would be half a model, and later full forwards would lack the upper half: so never inside.
_RECORDERS = ("output_hidden_states", "output_attentions", "output_router_logits")

# Kept beside the models: a copied or saved model must not carry any of it.
_verified: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()
_open: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # causal models inside a `with`, and their L


@dataclass(frozen=True)
class _Parts:
    """Where things are; `owner` is the module at or below `decoder` that holds the list of blocks."""

    causal: nn.Module
    decoder: nn.Module
    owner: nn.Module
    list_name: str
    blocks: list[nn.Module]


def num_layers(model: nn.Module) -> int:
    """Number of blocks L of the causal LM in `model`: plain, or inside PEFT, DDP, DeepSpeed, torch.compile.

    Raises ModelError if that is not a decoder-only causal LM with one recognisable list of blocks.
    """
    causal = _unwrap(model)
    return _open[causal] if causal in _open else len(_locate(causal).blocks)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of the causal LM in `model`, from below. Raises ModelError as `num_layers` does."""
    return _locate(_unwrap(model)).blocks


@contextmanager
def shortened(model: nn.Module, count: int) -> Iterator[None]:
    """Inside the `with`, the model consists of its first `count` blocks, final norm and head; else nothing changes."""
    parts = _locate(_unwrap(model))
    configs: list[Any] = [parts.causal.config.get_text_config(), getattr(parts.owner, "config", None)]  # type: ignore[union-attr]
    configs = [config for config in configs if hasattr(config, "num_hidden_layers")]
    depths = [config.num_hidden_layers for config in configs]
    whole = parts.owner._modules[parts.list_name]
    try:
        parts.owner._modules[parts.list_name] = nn.ModuleList(parts.blocks[:count])
        for config in configs:
            config.num_hidden_layers = count
        yield
    finally:
        parts.owner._modules[parts.list_name] = whole
        for config, depth in zip(configs, depths, strict=True):
            config.num_hidden_layers = depth


@contextmanager
def early_exit(model: nn.Module, layer: int) -> Iterator[None]:
    """Inside the `with`, calling `model` runs blocks 1..layer only, without final norm and head.

    Call `model` itself, the outermost wrapper, as ever: `model(input_ids=..., attention_mask=...)`. It gives
    the decoder's output, whose `last_hidden_state` (N, T, D), in the dtype the blocks compute in, is the
    output of block `layer`. Arguments only the causal model knows (labels, logits_to_keep) and `output_*` are
    dropped; `use_cache` is False unless given. An instance attribute `forward` on the causal model is not
    run, but the autocast that accelerate puts there is. Do not call train(), eval() or state_dict() inside.

    Raises ConfigError if `layer` is not an int in 1..L; ModelError if the model is no decoder-only causal LM,
    if (at the first call) its architecture does not give the exact state, or if an exit is already open.
    """
    parts = _locate(_unwrap(model))
    _check_layer(parts, layer)
    with _patched(parts, (layer,), lambda norms, kwargs: _run(parts, (layer,), norms, kwargs)[0]):
        yield


@overload
def hidden_at(model: nn.Module, layer: int, **inputs: Any) -> Tensor: ...
@overload
def hidden_at(model: nn.Module, layer: Sequence[int], **inputs: Any) -> list[Tensor]: ...
def hidden_at(model: nn.Module, layer: int | Sequence[int], **inputs: Any) -> Tensor | list[Tensor]:
    """States (N, T, D) of one layer, or a list of those of several, in one forward that ends at the deepest.

    `inputs` are what the model takes: input_ids and attention_mask (N, T) and so on. States have the dtype
    the blocks compute in and carry gradients as usual; at padding they hold arbitrary values.

    Raises ConfigError and ModelError as `early_exit` does.
    """
    wanted: list[int] = list(layer) if isinstance(layer, Sequence) else [layer]
    parts = _locate(_unwrap(model))
    for one in wanted or [layer]:
        _check_layer(parts, one)
    layers = tuple(sorted({*wanted}))
    ran = False

    def forward(norms: list[nn.Module], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        nonlocal ran
        ran = True
        states = _run(parts, layers, norms, kwargs)[1]
        return tuple(states[one] for one in wanted)  # through the wrappers: DDP must see every state

    with _patched(parts, layers, forward):
        states = model(**inputs)
    if not ran:
        raise _unsupported(parts, "what wraps it does not call the causal model's own forward")
    return list(states) if isinstance(layer, Sequence) else states[0]


def _unwrap(model: Any) -> nn.Module:
    """The causal LM inside any number of wrappers."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a causal language model, got {type(model).__name__}: pass an nn.Module")
    for name in ("module", "_orig_mod"):  # DDP and DeepSpeed, torch.compile
        if model._modules.get(name) is not None:
            return _unwrap(model._modules[name])
    get_base = getattr(model, "get_base_model", None)  # PEFT
    return _unwrap(get_base()) if callable(get_base) else model


def _locate(causal: nn.Module) -> _Parts:
    name = type(causal).__name__
    if causal in _open:
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
    # never get_decoder(), which some families answer with the model itself; Llama 4 misnames its "model"
    prefix = getattr(causal, "base_model_prefix", "")
    decoder = next((m for n in (prefix, "model") if (m := causal._modules.get(n)) is not None), None)
    if decoder is None:
        raise ModelError(f"{name} has no base decoder below a head: load it with AutoModelForCausalLM")
    count = getattr(text_config, "num_hidden_layers", None)
    found = list(_lists_of_length(decoder, count))
    if len(found) != 1:
        where = f"{len(found)} lists of num_hidden_layers={count} blocks where early exit needs exactly one"
        raise ModelError(f"{name} has {where}: use another model family")
    owner, list_name, blocks = found[0]
    return _Parts(causal, decoder, owner, list_name, list(blocks))


def _lists_of_length(module: nn.Module, count: int | None) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            yield module, name, child  # and no deeper: a block's experts may be as many
        else:
            yield from _lists_of_length(child, count)


def _check_layer(parts: _Parts, layer: object) -> None:
    total = len(parts.blocks)
    if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer <= total:
        raise ConfigError(f"layer must be an int in 1..{total} (the output of that block), got {layer!r}")
    if parts.owner.training and getattr(parts.owner, "layerdrop", None):
        raise ModelError(f"{type(parts.causal).__name__} skips blocks at random: set layerdrop to 0 to train it")


def _unsupported(parts: _Parts, why: str) -> ModelError:
    name, kind = type(parts.causal).__name__, getattr(parts.causal.config, "model_type", "unknown type")
    return ModelError(f"{name} ({kind}) is not supported by early exit: {why}; use another model family")


def _is_verified(parts: _Parts, layers: tuple[int, ...]) -> bool:
    return (layers, parts.owner.training) in _verified.get(parts.causal, ())


def _is_empty(parts: _Parts) -> bool:
    """Whether the model is on the meta device, where no state has a content that could be compared."""
    return any(weight.is_meta for weight in parts.causal.parameters())


_Forward = Callable[[list[nn.Module], dict[str, Any]], Any]  # of (stand-ins of the norms, decoder arguments)


@contextmanager
def _patched(parts: _Parts, layers: tuple[int, ...], forward: _Forward) -> Iterator[None]:
    """Swap the blocks above the last of `layers`, the final norm, and the causal model's forward."""
    causal, modules = parts.causal, parts.owner._modules  # set directly, not by setattr: the order stays
    saved = {n: m for n, m in modules.items() if m is not None and n in {*_FINAL_NORMS, parts.list_name}}
    swapped: dict[str, nn.Module] = {n: nn.Identity() for n in saved if n != parts.list_name}
    norms = list(swapped.values())
    swapped[parts.list_name] = nn.ModuleList(parts.blocks[: layers[-1]])
    saved_forward = {n: f for n, f in vars(causal).items() if n == "forward"}
    autocast = _autocast_of(saved_forward.get("forward"))
    to_kwargs = _kwargs_filter(parts)

    def exit_forward(*args: Any, **kwargs: Any) -> Any:
        with autocast:
            return forward(norms, to_kwargs(args, kwargs))

    hooks = len(layers) > 1 or not _is_verified(parts, layers)
    compiled = "torch._dynamo" in sys.modules  # compiled code does not notice new hooks
    eager = torch.compiler.set_stance("force_eager") if hooks and compiled else nullcontext()
    _open[causal] = len(parts.blocks)
    try:
        modules.update(swapped)
        vars(causal)["forward"] = exit_forward
        with eager:
            yield
    finally:
        modules.update(saved)
        vars(causal).pop("forward", None)
        vars(causal).update(saved_forward)
        _open.pop(causal, None)


def _kwargs_filter(parts: _Parts) -> Callable[[tuple, dict[str, Any]], dict[str, Any]]:
    """A function from the arguments of the causal model to those of its decoder."""
    ours = inspect.signature(type(parts.causal).forward).parameters
    theirs = inspect.signature(type(parts.decoder).forward).parameters
    ours_open, theirs_open = (any(p.kind is p.VAR_KEYWORD for p in s.values()) for s in (ours, theirs))
    configs = (parts.causal.config, getattr(parts.owner, "config", None))
    fixed = {n: False for n in _RECORDERS if any(getattr(c, n, None) for c in configs)}
    fixed = {n: v for n, v in fixed.items() if n in theirs or theirs_open}
    default = {"use_cache": False} if "use_cache" in theirs else {}

    def takes(name: str) -> bool:  # what neither side knows stays in, to be the error it would be elsewhere
        return name in theirs or (name not in ours and (theirs_open or not ours_open))

    def to_kwargs(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(zip(list(ours)[1:], args, strict=False)) | kwargs
        return default | {n: v for n, v in given.items() if takes(n) and not n.startswith("output_")} | fixed

    return to_kwargs


def _autocast_of(forward: Any) -> AbstractContextManager:
    """The autocast that accelerate wrapped around `forward`, where a closure is the only place to find it."""
    while forward is not None:
        for cell in getattr(forward, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.autocast):
                return cell.cell_contents
        forward = getattr(forward, "__wrapped__", None)
    return nullcontext()


def _run(
    parts: _Parts, layers: tuple[int, ...], norms: list[nn.Module], kwargs: dict[str, Any]
) -> tuple[Any, dict[int, Tensor]]:
    """Call the decoder: its output, and the states of `layers`; watched unless verified before."""
    last, states = layers[-1], {}
    watch = None if _is_verified(parts, layers) or _is_empty(parts) else _Watch(parts, layers)
    handles = watch.install(norms) if watch else []
    for tap in layers[:-1]:
        hook = lambda _m, _a, out, tap=tap: states.update({tap: _state(out)})  # noqa: E731
        handles.append(parts.blocks[tap - 1].register_forward_hook(hook))
    try:
        output = parts.decoder(**kwargs)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        if watch and watch.runs[last - 1]:  # the blocks are through, so it stumbles over what is swapped
            raise _unsupported(parts, f"after block {last} its decoder fails with {error!r}") from error
        raise
    finally:
        for handle in handles:
            handle.remove()
    states[last] = _state(getattr(output, "last_hidden_state", output))
    if watch:
        watch.check(states)
        _verified.setdefault(parts.causal, set()).add((layers, parts.owner.training))
    return output, states


def _state(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


class _Watch:
    """In one forward, counts the calls of all blocks and keeps copies of the states of `layers`."""

    def __init__(self, parts: _Parts, layers: tuple[int, ...]):
        self.parts, self.layers = parts, layers
        self.runs = [0] * len(parts.blocks)
        self.copies: dict[int, Tensor] = {}
        self.norm_too_early = False

    def install(self, norms: list[nn.Module]) -> list[Any]:
        def block_ran(index: int, output: Any) -> None:
            self.runs[index - 1] += 1
            if index in self.layers:  # a copy: the decoder may change the state in place
                self.copies[index] = _state(output).detach().clone()

        def norm_ran() -> None:
            self.norm_too_early |= not self.runs[self.layers[-1] - 1]

        blocks = enumerate(self.parts.blocks, start=1)
        handles = [b.register_forward_hook(lambda _m, _a, out, i=i: block_ran(i, out)) for i, b in blocks]
        return handles + [norm.register_forward_hook(lambda *_: norm_ran()) for norm in norms]

    def check(self, states: dict[int, Any]) -> None:
        last = self.layers[-1]
        expected = [int(index < last) for index in range(len(self.runs))]
        if self.runs != expected:
            raise _unsupported(self.parts, f"for layer {last} its blocks ran {self.runs} times, not {expected}")
        if self.norm_too_early:
            raise _unsupported(self.parts, "what looks like its final norm also runs before the last block")
        for index, copy in self.copies.items():
            state = states[index]
            same = isinstance(state, Tensor) and (state.shape, state.dtype) == (copy.shape, copy.dtype)
            # what is not a number (rows that are all padding) stays so
            if not same or not torch.equal(state.nan_to_num(), copy.to(state.device).nan_to_num()):
                raise _unsupported(self.parts, f"its decoder changes the state after block {index}")
