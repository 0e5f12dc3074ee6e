"""How memory goes up and down in one forward and backward, from a run of the model's own code without any content.

A skeleton (model/skeleton.py) runs on the meta device, where every operation gives a tensor of the right shape and
nothing in it. Each storage that is made or dropped is an event of so many bytes, and the model makes the same events
whatever the batch, so that a few small batches give each event's bytes as a polynomial in rows and width. From those
follow, for every batch and depth, what autograd keeps and the most that is held at once. Nothing is assumed about
the family: norms that compute in fp32, casts of the adapter's inputs, dropout, and attention that is not fused all
show as what they are.

What the meta device lacks is put in its place inside `_Meta`, and only there: fused attention, as GPUs and CPUs
compute it; autocast, which knows no meta device; and the answer that a batch has padding, hence an attention mask.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.errors import FastalignError, ModelError
from fastalign.model.early_exit import blocks_of, first_blocks, hidden_at
from fastalign.model.skeleton import Skeleton

# (rows, width) whose events give the polynomials; no side of 1, which some operations treat as if it were not there.
BATCHES = ((2, 64), (3, 64), (2, 128), (3, 128), (2, 192))
# What autocast computes in 16 bits; and in fp32, on a GPU only (PyTorch's lists, as far as decoders use them).
LOWERED = {"linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm", "conv1d", "scaled_dot_product_attention"}
RAISED = {"layer_norm", "group_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "log", "sum"}
RAISED |= {"cumsum", "norm", "softplus", "prod", "reciprocal"}


@dataclass(frozen=True)
class Mode:
    """How a run computes.

    Attributes:
        autocast: to which 16-bit format; None: not at all.
        on_gpu: whose autocast also computes norms and the like in fp32.
        checkpointing: each block is recomputed in the backward.
    """

    autocast: torch.dtype | None = None
    on_gpu: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Course:
    """Bytes of a forward and backward through the first blocks of a model, above its weights and gradients.

    Attributes:
        deltas: (events, 5), bytes that come or go, as polynomials in rows and width; see `_terms`.
        marks: events before each block's forward, and at the end of the whole forward.
        repeats: block that a block above those that ran is like, by number; as many as do not run.
    """

    deltas: torch.Tensor
    marks: tuple[int, ...]
    repeats: tuple[int, ...]

    def kept(self, rows: int, width: int) -> int:
        """What is held when the forward is over."""
        held = self._held(rows, width)
        return round(float(held[self.marks[-1]]) + self._above(held))

    def peak(self, rows: int, width: int) -> int:
        """The most that is held at once. What the upper blocks keep is there whenever that is."""
        held = self._held(rows, width)
        return round(float(held.max()) + self._above(held))

    def block(self, rows: int, width: int) -> int:
        """What the block that keeps most keeps; of several not the last that ran, which a final norm may follow."""
        held = self._held(rows, width)[list(self.marks)]
        gains = held[1:] - held[:-1]
        return round(float((gains[:-1] if len(gains) > 1 else gains).max()))

    def _held(self, rows: int, width: int) -> torch.Tensor:
        steps = self.deltas @ torch.tensor(_terms(rows, width), dtype=torch.float64)
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)])

    def _above(self, held: torch.Tensor) -> float:
        return sum(float(held[self.marks[i + 1]] - held[self.marks[i]]) for i in self.repeats)


def course(skeleton: Skeleton, blocks: int | None, mode: Mode) -> Course:
    """The course of the alignment stream's forward through `blocks` blocks, or (None) of the task's without the head.

    Raises:
        ModelError: the model cannot run without content, as where it looks at the values of its states.
    """
    model = skeleton.model.train()
    kinds = _kinds(skeleton)[:blocks]
    run = _prefix(kinds)
    repeats = tuple(kinds.index(kind) for kind in kinds[run:])
    collecting = gc.isenabled()
    gc.disable()  # it would drop things whenever it likes
    try:
        with first_blocks(model, run), _gradients(model), _dense(model):
            tracks = [_track(skeleton, blocks is not None, mode, *batch) for batch in BATCHES]
    except FastalignError:
        raise
    except Exception as error:  # the code of a model may do anything
        raise _unmeasured(skeleton, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    finally:
        if collecting:
            gc.enable()
    if len({(len(deltas), marks) for deltas, marks in tracks}) > 1:
        raise _unmeasured(skeleton, "what it does depends on the size of the batch")
    batches = torch.tensor([_terms(*batch) for batch in BATCHES], dtype=torch.float64)
    deltas = torch.tensor([deltas for deltas, _ in tracks], dtype=torch.float64)
    return Course(torch.linalg.solve(batches, deltas).T.contiguous(), tracks[0][1], repeats)


def _unmeasured(skeleton: Skeleton, why: str) -> ModelError:
    kind = skeleton.text_config.model_type
    return ModelError(f"the memory of this model ({kind}) cannot be predicted: it does not run without weights ({why})")


def _terms(rows: int, width: int) -> list[float]:
    tokens = rows * width
    return [1.0, width, width**2, tokens, tokens * width]


def _kinds(skeleton: Skeleton) -> list[Any]:
    """Of each block, what decides what it keeps: blocks of one kind keep the same."""
    types = getattr(skeleton.text_config, "layer_types", None) or ()
    kinds = []
    for i, block in enumerate(blocks_of(skeleton.model)):
        shapes = tuple((name, tuple(weight.shape), weight.dtype) for name, weight in block.named_parameters())
        kinds.append((type(block), shapes, types[i] if i < len(types) else None))
    return kinds


def _prefix(kinds: Sequence[Any]) -> int:
    """Blocks that must run: each kind once, and one more, since only what lies between two blocks is one's own."""
    return min(len(kinds), 1 + max(kinds.index(kind) for kind in set(kinds)) + 1)


def _track(skeleton: Skeleton, exits: bool, mode: Mode, rows: int, width: int) -> tuple[list[int], tuple[int, ...]]:
    """The events of one forward and backward, and where in them the blocks begin and the forward ends.

    Args:
        exits: whether the forward ends with the last block: else the final norm follows.
    """
    model, events, meta = skeleton.model, _Events(), _Meta(mode)
    blocks = blocks_of(model)
    ids = torch.zeros((rows, width), dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if skeleton.masked else None}
    marks: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda *_: marks.append(len(events.deltas))) for block in blocks]
    events.leave_out([*model.parameters(), *model.buffers(), *(weight.grad for weight in model.parameters())])
    try:
        with _checkpointed(model, meta if mode.checkpointing else None), meta.autocast_known(), meta, events:
            states = hidden_at(model, len(blocks), **inputs) if exits else _decoded(model, inputs)
            marks = [*marks, len(events.deltas)]  # a recomputed block is none
            torch.autograd.backward(states, torch.empty_like(states))
            del states
    finally:
        for hook in hooks:
            hook.remove()
    return events.deltas, tuple(marks)


def _decoded(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The states that the head of the task gets."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    causal.set_output_embeddings(nn.Identity())
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        causal.set_output_embeddings(head)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """The trainable weights have gradients already: these are counted elsewhere."""
    for weight in model.parameters():
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    try:
        yield
    finally:
        for weight in model.parameters():
            weight.grad = None


@contextmanager
def _checkpointed(model: Any, again: _Meta | None) -> Iterator[None]:
    """Each block is recomputed in the backward, inside `again`, which the backward has left."""
    if again is not None:
        contexts = {"context_fn": lambda: (contextlib.nullcontext(), again)}
        model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
    try:
        yield
    finally:
        if again is not None:
            model.gradient_checkpointing_disable()


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """Layers in 4 bits, whose weights are not there to unpack, compute with an unpacked weight that comes and goes."""
    packed: list[Any] = [part for part in model.modules() if hasattr(part._parameters.get("weight"), "quant_type")]
    for part in packed:
        part.forward = lambda x, part=part: _unpacked(part, x)
    try:
        yield
    finally:
        for part in packed:
            del part.forward


def _unpacked(layer: Any, x: torch.Tensor) -> torch.Tensor:
    computed: Any = _Unpacked.apply(x.to(layer.compute_dtype), layer.out_features)
    return (computed if layer.bias is None else computed + layer.bias).to(x.dtype)


class _Unpacked(torch.autograd.Function):
    """A frozen linear layer that keeps nothing but its packed weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int) -> torch.Tensor:
        ctx.shape = size, x.shape[-1]
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None


class _Attention(torch.autograd.Function):
    """Fused attention: keeps its inputs, its output, a number for each row of the scores, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        rows, heads, width, _ = query.shape
        out = query.new_empty((rows, width, heads, value.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty((rows, heads, width), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Grouped(torch.autograd.Function):
    """The product of the tokens of several experts with their weights; on the meta device PyTorch has it for bf16."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens if weights.requires_grad else None, weights)
        ctx.shape = tokens.shape
        return tokens.new_empty((*tokens.shape[:-1], weights.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights = ctx.saved_tensors[1]
        return grads[0].new_empty(ctx.shape), torch.empty_like(weights) if ctx.needs_input_grad[1] else None


class _Meta(TorchFunctionMode):
    """Stands in for what the meta device lacks; to be used inside `autocast_known`."""

    def __init__(self, mode: Mode):
        super().__init__()
        self._mode, self._active = mode, mode.autocast is not None

    @contextmanager
    def autocast_known(self) -> Iterator[None]:
        """Models switch autocast off for a while, and PyTorch's own does not know the meta device."""
        meta, real, enabled = self, torch.autocast, torch.is_autocast_enabled()

        class Autocast(torch.autocast):
            def __init__(self, device_type: str, *args: Any, enabled: bool = True, **kwargs: Any):
                self.ours, self.wanted = device_type == "meta", enabled
                if not self.ours:
                    super().__init__(device_type, *args, enabled=enabled, **kwargs)

            def __enter__(self) -> Any:
                if not self.ours:
                    return super().__enter__()
                self.before, meta._active = meta._active, meta._active and self.wanted

            def __exit__(self, *error: Any) -> Any:
                if not self.ours:
                    return super().__exit__(*error)
                meta._active = self.before

        torch.autocast = Autocast  # type: ignore[misc]
        torch.set_autocast_enabled("cuda", self._active and self._mode.on_gpu)  # PEFT looks at it
        try:
            yield
        finally:
            torch.autocast = real  # type: ignore[misc]
            torch.set_autocast_enabled("cuda", enabled)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__bool__" and args[0].is_meta:
            return False  # "is the mask all ones?"
        if self._active and name in LOWERED:
            args, kwargs = _cast(args, kwargs, self._mode.autocast)
        elif self._active and self._mode.on_gpu and name in RAISED:
            args, kwargs = _cast(args, kwargs, torch.float32)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm") and args[0].dim() == 2 and args[1].dim() == 3:
            return _Grouped.apply(*args[:2])
        return func(*args, **kwargs)

    @staticmethod
    def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **kwargs: Any) -> Any:
        if attn_mask is None:
            attn_mask = kwargs.get("mask")
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # PyTorch adds it to the scores
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return _Attention.apply(query, key, value, attn_mask)


def _cast(args: Any, kwargs: dict[str, Any], dtype: Any) -> tuple[Any, dict[str, Any]]:
    def cast(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if half else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


class _Events(TorchDispatchMode):
    """Bytes of each storage that comes (above 0) or goes (below 0) inside the `with`, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas: list[int] = []
        self._known: dict[int, Any] = {}

    def leave_out(self, tensors: Sequence[Any]) -> None:
        """Storages that are there before."""
        for tensor in filter(lambda tensor: tensor is not None, tensors):
            self._known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self.deltas.append(size)
                    self._known[key] = weakref.finalize(storage, self._dropped, key, size)
        return out

    def _dropped(self, key: int, size: int) -> None:
        self.deltas.append(-size)
        self._known.pop(key, None)
