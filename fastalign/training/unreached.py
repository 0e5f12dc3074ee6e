"""One rule for parameters that a step did not reach: they get a zero gradient.

An alignment step at layer l leaves the adapters above l without a gradient. What an optimizer makes of that differs:
on one process AdamW skips such a parameter, DDP refuses the step or looks for unused parameters, and DeepSpeed
(ZeRO-1 and 2 with the optimizer on the CPU, ZeRO-3 always) updates it with the gradient of the *previous* step:
docs/deepspeed-stale-gradients/ has a reproduction. A zero gradient, by contrast, means the same everywhere: momentum
and weight decay go on. There are two ways to it, and every step takes both:

- Whole parameters (one process, DDP, ZeRO-1 and 2): the first and the last loss of a step get `zero_term`. The last,
  because that is when gradients are exchanged; the first, because ZeRO-2 with the optimizer on the CPU adds what is
  reached only later to what it has of the previous step.
- Parameters in shards (ZeRO-3), which such a term cannot cross: `clear_gradients` before the first backward. With the
  optimizer on the CPU it also takes a last backward that reaches what an earlier one did, or DeepSpeed loses the
  gradient of that one: hence the order within a joint step (`Schedule.at`). An expert that only an earlier micro-batch
  of a step reaches does lose it there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastalign.model.sharding import is_sharded


def zero_term(model: nn.Module) -> torch.Tensor:
    """A scalar 0 whose gradient is zero, not None, for every trainable parameter that is not sharded."""
    whole = [p.sum().float() for p in model.parameters() if p.requires_grad and not is_sharded(p)]
    return 0.0 * torch.stack(whole).sum() if whole else torch.zeros(())


def clear_gradients(model: nn.Module) -> None:
    """Zero what DeepSpeed still holds of the last step's gradients of sharded parameters; others are left alone.

    Call it before the first backward of a step, on every rank, once the model is in DeepSpeed's engine.
    """
    sharded: list[Any] = [p for p in model.parameters() if p.requires_grad and is_sharded(p)]
    if not sharded:
        return
    from deepspeed.utils import safe_set_local_grad

    for parameter in sharded:  # what the optimizer reads
        safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
    # What micro-batches add up in: with the optimizer on the CPU not the same, and one that is reached only in the
    # second micro-batch (an expert, say) would be added to it.
    sharded[0]._z3_optimizer.grad_partitions_flat_buffer.zero_()
