"""Cross-entropy of a language model's head, without the logits of all rows.

The sum over rows of logsumexp(z) - z[label], with z = head(state) (V,), falls apart into chunks of rows. A chunk's
logits are made, turned into their own gradient softmax(z) - onehot(label) in one fp32 buffer, and taken back through
the head at once, so that only the gradient of the states (M, D) is kept, and the backward just multiplies it. What is
never there: (M, V), in any dtype. The head runs as often as without chunks, forward and backward.

The idea is that of Wijmans et al. 2024 (Cut Cross-Entropy, arXiv 2411.09009) and of Liger Kernel (Hsu et al. 2024,
arXiv 2410.10989), which take the matrix of the head and fuse; here the head is a function, so that every one will do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Head = Callable[[Tensor], Tensor]  # of rows (M, D); gives logits (M, V)

# A power of two, so exact. Gradients are taken before anything scales the loss up, and in fp16 small ones would vanish.
_UP = 256.0


class ChunkedCrossEntropy:
    """A function of states, labels and a head; remembers how much memory a row takes.

    Args:
        memory: bytes that tensors with a vocabulary's dimension may take at once: logits in the model's dtype, their
            fp32 copy, gradients, what the head keeps. A single row may take more.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self._row_bytes: dict[tuple, int] = {}

    def __call__(self, states: Tensor, labels: Tensor, head: Head) -> Tensor:
        """The sum over the rows, with exact gradients for the states and for what is trained in the head.

        Args:
            states: (M, D), floating point; M may be 0.
            labels: (M,), int64, in 0..V-1.
            head: rows of states to logits, row by row.

        Returns:
            A scalar, fp32.
        """
        if not len(states):
            return states.sum().float()
        count = -(-len(states) // max(1, self.memory // self.row_bytes(states, head)))
        edges = [i * len(states) // count for i in range(count + 1)]
        trains = torch.is_grad_enabled()
        value = torch.zeros((), device=states.device)
        rows: list[Tensor] = []
        others: dict[Tensor, Tensor] = {}
        for start, end in pairwise(edges):
            loss, gradients = _of_chunk(states[start:end], labels[start:end], head, trains)
            value += loss
            rows += [gradients.pop(None)] if None in gradients else []
            for leaf, gradient in gradients.items():
                assert leaf is not None
                others[leaf] = others[leaf] + gradient if leaf in others else gradient.float()
        known = {**({states: torch.cat(rows)} if rows else {}), **others}
        return _Known.apply(value, list(known.values()), *known) if known else value  # type: ignore[return-value]

    def row_bytes(self, states: Tensor, head: Head) -> int:
        """Bytes that one row takes at its peak, gradient included; counted once, on two rows."""
        device = states.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (states.dtype, device, autocast)
        if key not in self._row_bytes:
            pair = states[:1].detach().repeat(2, 1).requires_grad_()
            gpus = [torch.cuda.current_device()] if device == "cuda" else []
            # No random number that the run would draw; with a graph: autocast would keep weights that it cast without.
            with torch.random.fork_rng(gpus), torch.enable_grad():
                size = head(pair).numel()
                with _Counted(size) as counted:
                    _of_chunk(pair, torch.zeros(2, dtype=torch.long, device=states.device), head, True)
            self._row_bytes[key] = max(1, counted.peak // 2)
        return self._row_bytes[key]


def _of_chunk(states: Tensor, labels: Tensor, head: Head, trains: bool) -> tuple[Tensor, dict[Tensor | None, Tensor]]:
    """The loss of some rows, and its gradient `_UP` times: of the rows under None, and of every leaf in the head."""
    rows = states.detach().requires_grad_(trains and states.requires_grad)
    logits = head(rows)
    dtype, edge = logits.dtype, get_gradient_edge(logits) if logits.requires_grad else None
    z = logits.detach().to(torch.float32, copy=True)
    del logits  # its memory is free unless the head has kept it
    labels = labels.unsqueeze(1)
    z -= z.amax(dim=1, keepdim=True)
    own = z.gather(1, labels)
    total = z.exp_().sum(dim=1, keepdim=True)
    loss = (total.log() - own).sum()
    if edge is None:
        return loss, {}
    z /= total
    z.scatter_add_(1, labels, torch.full_like(own, -1.0))
    z *= _UP
    z = z.to(dtype)
    leaves = {leaf: None if leaf is rows else leaf for leaf in _leaves(edge.node)}
    gradients = torch.autograd.grad((edge,), list(leaves), (z,))
    return loss, dict(zip(leaves.values(), gradients, strict=True))


def _leaves(node: Any) -> list[Tensor]:
    """What a gradient that begins at `node` reaches, in a fixed order."""
    found: dict[Any, Tensor] = {}
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            found[node] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return list(found.values())


class _Known(torch.autograd.Function):
    """A value, and a gradient that is known already, `_UP` times, for every tensor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        factor = upstream / _UP
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((gradient * factor).to(dtype) for gradient, dtype in pairs)


class _Counted(TorchDispatchMode):
    """Inside, counts the bytes of living tensors of `size` elements that operators have made, and their peak."""

    def __init__(self, size: int):
        super().__init__()
        self._size, self._now, self.peak = size, 0, 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() == self._size:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._living:
            self._living.add(place)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._living.discard(place)
        self._now -= size
