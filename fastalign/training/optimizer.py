"""What the optimizer keeps of the adapter."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from fastalign.config import Config
from fastalign.model.skeleton import Skeleton


def optimizer_bytes(size: Skeleton, config: Config) -> int:
    """Bytes of the optimizer's state, as it makes it itself; of one that runs only with weights as many as AdamW's."""
    chosen = {name: config.training[name] for name in ("optim", "optim_args") if config.training.get(name)}
    if "optim" in chosen:  # a paged state counts: nobody knows whether it will be paged out
        chosen["optim"] = str(chosen["optim"]).replace("paged_", "")
    return _state_bytes(size, json.dumps(chosen))


@functools.lru_cache(maxsize=32)
def _state_bytes(size: Skeleton, chosen: str) -> int:
    try:
        optimizer: Any = _optimizer(size, json.loads(chosen))
    except Exception:  # an optimizer may look at the values, which are not there
        return 8 * size.trainable
    found: dict[int, int] = {}
    parts: list[Any] = [optimizer.state]
    while parts:
        part = parts.pop()
        if isinstance(part, torch.Tensor):
            found[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
        elif isinstance(part, dict):
            parts += part.values()
    return sum(found.values())


def _optimizer(size: Skeleton, chosen: dict[str, Any]) -> Any:
    """The optimizer of the adapter on the meta device, after a step."""
    from transformers import Trainer, TrainingArguments

    weights = [torch.nn.Parameter(torch.empty_like(w)) for w in size.model.parameters() if w.requires_grad]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", use_cpu=True, **chosen))
    if "fused" in options:
        options["fused"] = False  # keeps the same, and there is no fused kernel for what has no content
    optimizer: Any = kind(weights, **options)
    if not hasattr(optimizer, "init_state"):
        optimizer.step()
        return optimizer
    for i, group in enumerate(optimizer.param_groups):  # bitsandbytes, whose kernels need content
        for j, weight in enumerate(group["params"]):
            optimizer.init_state(group, weight, i, j)
    return optimizer
