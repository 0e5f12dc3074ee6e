"""Cached gradients: a loss over the rows of many micro-batches, exact, in the memory of one micro-batch.

A contrastive loss couples all rows of a batch, so it is no sum over micro-batches. But it sees a row only through
its vector. Hence (Gao et al. 2021, GradCache, arXiv 2101.06983, section 3):

1. embed every micro-batch without a graph, and keep the vectors E;
2. take the loss L(E) and its gradient G = dL/dE once;
3. embed each micro-batch again, with a graph, and let sum(E * G) stand for the loss: by the chain rule its gradient
   is that micro-batch's part of the gradient of L.

The second forward replays the random state of the first, so that dropout drops the same. It costs one forward more
than a batch that fits at once, which is what gradient checkpointing costs, and holds one micro-batch's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastalign.streams.base import MicroBatch


class GradientCache:
    """The vectors' gradients of one optimizer step, from `fill` until each micro-batch has had its `loss`.

    Args:
        embed: (model, micro-batch) to its vectors (..., n, D), n being its rows.
        objective: vectors (..., N, D) of all micro-batches and these to a scalar, the mean over the N rows.
    """

    def __init__(
        self,
        embed: Callable[[nn.Module, MicroBatch], torch.Tensor],
        objective: Callable[[torch.Tensor, Sequence[MicroBatch]], torch.Tensor],
    ):
        self._embed, self._objective = embed, objective
        self._cached: dict[int, tuple[_RandomState, torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        """Forget what a step that was broken off has left."""
        self._cached = {}

    def fill(self, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
        """Steps 1 and 2, for all micro-batches of the optimizer step."""
        self.clear()
        states, vectors = [], []
        with torch.no_grad():
            for micro_batch in micro_batches:
                states.append(_RandomState(micro_batch.inputs["input_ids"].device))
                vectors.append(self._embed(model, micro_batch))
        rows = [part.shape[-2] for part in vectors]
        everything = torch.cat(vectors, dim=-2).requires_grad_()
        with torch.enable_grad():
            loss = self._objective(everything, micro_batches)
        (gradient,) = torch.autograd.grad(loss, [everything])
        for micro_batch, state, part in zip(micro_batches, states, gradient.split(rows, dim=-2), strict=True):
            share = loss.detach() * (part.shape[-2] / sum(rows))
            self._cached[id(micro_batch)] = (state, part, share)

    def __contains__(self, micro_batch: MicroBatch) -> bool:
        """Whether the micro-batch was among those of the last `fill` and had no `loss` yet."""
        return id(micro_batch) in self._cached

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Step 3: a scalar whose gradient is the micro-batch's part of the loss's, and whose value its share of it."""
        state, gradient, share = self._cached.pop(id(micro_batch))
        state.restore()
        surrogate = (self._embed(model, micro_batch) * gradient).sum()
        return surrogate + (share - surrogate).detach()


class _RandomState:
    """Of the generators that dropout draws from: the CPU's and, where it is used, the GPU's."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
