"""One rule for parameters that a step did not reach: they get a zero gradient.

An alignment step at layer l leaves the adapters above l without a gradient. What an optimizer makes of that differs:
on one process AdamW skips such a parameter, DDP refuses the step or looks for unused parameters, and DeepSpeed
(ZeRO-2 with CPU offload, ZeRO-3) updates it with the gradient of the *previous* step. A zero gradient, by contrast,
means the same everywhere: momentum and weight decay go on. So the last loss of every step gets a term of zero value
that touches all trainable parameters. ZeRO-3 partitions them, which that term cannot cross; it is refused.
"""

from __future__ import annotations

import torch
from torch import nn

from fastalign.errors import ConfigError

NO_ZERO3 = (
    "training.deepspeed: ZeRO-3 is not supported yet, because layers above the aligned one would be updated with stale "
    "gradients; use ZeRO-2"
)


def zero_term(model: nn.Module) -> torch.Tensor:
    """A scalar 0 whose gradient is zero, not None, for every trainable parameter."""
    parts = [parameter.sum().float() for parameter in model.parameters() if parameter.requires_grad]
    return 0.0 * torch.stack(parts).sum()


def refuse_zero3(deepspeed: bool) -> None:
    """ConfigError under ZeRO-3: layers that a step skips would be trained on stale gradients, in silence."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if deepspeed and is_deepspeed_zero3_enabled():
        raise ConfigError(NO_ZERO3)
