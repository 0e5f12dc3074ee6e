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

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError, ModelError
from fastalign.model.parts import (
    decoder_arguments,
    decoder_of,
    first_of,
    open_exits,
    replaced_forward,
    text_config_of,
    unwrap,
)

FINAL_NORMS = {"norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm", "final_norm"}
FINAL_NORMS |= {"layer_norm", "embedding_norm"}  # XGLM and BioGPT, LFM2

# Kept beside the models: a copied or saved model must not carry any of it.
_verified: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Parts:
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
    causal = unwrap(model)
    return open_exits[causal] if causal in open_exits else len(locate(causal).blocks)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of the causal LM in `model`, from below. Raises ModelError as `num_layers` does."""
    return locate(unwrap(model)).blocks


@contextmanager
def first_blocks(model: nn.Module, count: int) -> Iterator[None]:
    """Inside the `with`, the model consists of its first `count` blocks, final norm and head; else nothing changes."""
    parts = locate(unwrap(model))
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
    parts = locate(unwrap(model))
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
    parts = locate(unwrap(model))
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


def locate(causal: nn.Module) -> Parts:
    """The parts of a causal LM that nothing wraps. Raises ModelError as `early_exit` does."""
    text_config, decoder = text_config_of(causal), decoder_of(causal)
    count = getattr(text_config, "num_hidden_layers", None)
    found = list(_lists_of_length(decoder, count))
    if len(found) != 1:
        where = f"{len(found)} lists of num_hidden_layers={count} blocks where early exit needs exactly one"
        raise ModelError(f"{type(causal).__name__} has {where}: use another model family")
    owner, list_name, blocks = found[0]
    return Parts(causal, decoder, owner, list_name, list(blocks))


def _lists_of_length(module: nn.Module, count: int | None) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            yield module, name, child  # and no deeper: a block's experts may be as many
        else:
            yield from _lists_of_length(child, count)


def _check_layer(parts: Parts, layer: object) -> None:
    total = len(parts.blocks)
    if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer <= total:
        raise ConfigError(f"layer must be an int in 1..{total} (the output of that block), got {layer!r}")
    if parts.owner.training and getattr(parts.owner, "layerdrop", None):
        raise ModelError(f"{type(parts.causal).__name__} skips blocks at random: set layerdrop to 0 to train it")


def _unsupported(parts: Parts, why: str) -> ModelError:
    name, kind = type(parts.causal).__name__, getattr(parts.causal.config, "model_type", "unknown type")
    return ModelError(f"{name} ({kind}) is not supported by early exit: {why}; use another model family")


def _is_verified(parts: Parts, layers: tuple[int, ...]) -> bool:
    return (layers, parts.owner.training) in _verified.get(parts.causal, ())


def _is_empty(parts: Parts) -> bool:
    """Whether the model is on the meta device, where no state has a content that could be compared."""
    return any(weight.is_meta for weight in parts.causal.parameters())


_Forward = Callable[[list[nn.Module], dict[str, Any]], Any]  # of (stand-ins of the norms, decoder arguments)


@contextmanager
def _patched(parts: Parts, layers: tuple[int, ...], forward: _Forward) -> Iterator[None]:
    """Swap the blocks above the last of `layers`, the final norm, and the causal model's forward."""
    causal, modules = parts.causal, parts.owner._modules  # set directly, not by setattr: the order stays
    saved = {n: m for n, m in modules.items() if m is not None and n in {*FINAL_NORMS, parts.list_name}}
    swapped: dict[str, nn.Module] = {n: nn.Identity() for n in saved if n != parts.list_name}
    norms = list(swapped.values())
    swapped[parts.list_name] = nn.ModuleList(parts.blocks[: layers[-1]])
    to_kwargs = decoder_arguments(causal, parts.decoder, causal.config, getattr(parts.owner, "config", None))

    def exit_forward(*args: Any, **kwargs: Any) -> Any:
        return forward(norms, to_kwargs(args, kwargs))

    hooks = len(layers) > 1 or not _is_verified(parts, layers)
    compiled = "torch._dynamo" in sys.modules  # compiled code does not notice new hooks
    eager = torch.compiler.set_stance("force_eager") if hooks and compiled else nullcontext()
    open_exits[causal] = len(parts.blocks)
    try:
        modules.update(swapped)
        with replaced_forward(causal, exit_forward), eager:
            yield
    finally:
        modules.update(saved)
        open_exits.pop(causal, None)


def _run(
    parts: Parts, layers: tuple[int, ...], norms: list[nn.Module], kwargs: dict[str, Any]
) -> tuple[Any, dict[int, Tensor]]:
    """Call the decoder: its output, and the states of `layers`; watched unless verified before."""
    last, states = layers[-1], {}
    watch = None if _is_verified(parts, layers) or _is_empty(parts) else _Watch(parts, layers)
    handles = watch.install(norms) if watch else []
    for tap in layers[:-1]:
        hook = lambda _m, _a, out, tap=tap: states.update({tap: first_of(out)})  # noqa: E731
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
    states[last] = first_of(output)
    if watch:
        watch.check(states)
        _verified.setdefault(parts.causal, set()).add((layers, parts.owner.training))
    return output, states


class _Watch:
    """In one forward, counts the calls of all blocks and keeps copies of the states of `layers`."""

    def __init__(self, parts: Parts, layers: tuple[int, ...]):
        self.parts, self.layers = parts, layers
        self.runs = [0] * len(parts.blocks)
        self.copies: dict[int, Tensor] = {}
        self.norm_too_early = False

    def install(self, norms: list[nn.Module]) -> list[Any]:
        def block_ran(index: int, output: Any) -> None:
            self.runs[index - 1] += 1
            if index in self.layers:  # a copy: the decoder may change the state in place
                self.copies[index] = first_of(output).detach().clone()

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
