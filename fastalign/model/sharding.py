"""Parameters that DeepSpeed's ZeRO-3 parts among the ranks: outside of a forward there is only this rank's shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 holds a parameter in shards, which lie flat in `parameter.ds_tensor`."""
    return hasattr(parameter, "ds_tensor")


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter is in shards."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def on_this_rank(parameter: Any) -> torch.Tensor:
    """The parameter, detached; of one in shards what lies on this rank, flat, which may be nothing."""
    if not is_sharded(parameter):
        return parameter.detach()
    shard = parameter.ds_tensor.detach().flatten()
    first = shard.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    return shard[: max(0, parameter.ds_numel - first)]  # what is behind is padding, which nobody fills
