"""What a run will need in memory and time, from the model's config alone: no weights are read.

Memory is as training/needs.py counts it. Seconds are a rough number: FLOPs over the rate at which this machine does a
linear layer of the model's shape, with nothing else running.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from fastalign.config import Config
from fastalign.errors import ModelError
from fastalign.model.skeleton import Skeleton
from fastalign.training.arguments import checkpointing
from fastalign.training.needs import Shape, memory, needs_of, target

PROBED = 0.3  # seconds
BESIDE = 1.5  # of a step over its linear layers; seen on one CPU core: 0.8 to 1.8 at widths 128 to 512, 3 to 5 at 64


def step_flops(config: Config, size: Skeleton, shape: Shape, *, contrastive: bool) -> float:
    """Floating-point operations of one optimizer step of a stream.

    The base is frozen, so that its backward costs what its forward does; the adapter's costs twice that.

    Args:
        contrastive: the rows are each other's negatives, so that several forwards need each row once more.
    """
    text = size.text_config
    blocks = shape.blocks or text.num_hidden_layers
    width = shape.usual_width or shape.width
    base = blocks * size.block + (size.head_weights if shape.blocks is None else 0)
    adapter = size.trainable * blocks / text.num_hidden_layers
    attention = 4 * width * text.hidden_size * blocks  # scores and their product with the values
    forward = 2 * (base + adapter) + attention
    again = checkpointing(config.training) + (contrastive and shape.rows_per_forward < shape.rows_per_step)
    return shape.rows_per_step * width * (forward * (1 + again) + 2 * base + 4 * adapter + 2 * attention)


def forecast(
    config: Config,
    hf_config: Any,
    shapes: Mapping[str, Shape],
    steps: Mapping[str, int],
    device: torch.device,
    *,
    ranks: int = 1,
    blocks: int | None = None,
) -> dict[str, Any]:
    """What a run will need; see the module on how far to believe it.

    Args:
        config: of the run.
        hf_config: of the whole model, from transformers.
        shapes: of each stream. steps: optimizer steps of each.
        device: that will train; it is kept busy for a moment for each stream.
        ranks: of the run. blocks: that are loaded; None: all, and the head.

    Returns:
        ``{"memory": as `memory` says, or None, "unknown": why it is None, "seconds", "streams": {name: seconds},
        "trainable": numbers in the adapter}``.
    """
    computes = target(config, device)
    needs = needs_of(config, hf_config, computes, blocks)
    size, seconds = needs.skeleton, {}
    for name, shape in shapes.items():
        tokens = round(shape.rows_per_forward * (shape.usual_width or shape.width))
        work = steps[name] * step_flops(config, size, shape, contrastive=name == "alignment")
        rate = _flops_per_second(size.text_config, config.adapter.r, tokens, computes.dtype, device)
        seconds[name] = BESIDE * work / rate
    held, unknown = None, None
    try:
        held = memory(config, needs, shapes, ranks)
    except ModelError as error:  # a family whose code does not run without weights can be trained
        unknown = str(error)
    return {
        "memory": held,
        "unknown": unknown,
        "seconds": sum(seconds.values()),
        "streams": seconds,
        "trainable": size.trainable,
    }


def _flops_per_second(text_config: Any, rank: int, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of the forward and backward of a frozen linear layer with its adapter, on so many tokens or fewer.

    With its backward and the adapter's small products, so that it shows what a small model spends on its many calls.
    """
    hidden = text_config.hidden_size
    inner = getattr(text_config, "intermediate_size", None) or 4 * hidden
    weight = torch.randn(inner, hidden, dtype=dtype, device=device)
    down, up = (torch.randn(*size, device=device, requires_grad=True) for size in ((rank, hidden), (inner, rank)))
    tokens, some = max(tokens, 1), min(max(tokens, 1), 16)

    def run(times: int) -> float:
        states = torch.randn(some, hidden, dtype=dtype, device=device, requires_grad=True)
        started = time.perf_counter()
        for _ in range(times):
            out = states @ weight.T + (states @ down.to(dtype).T) @ up.to(dtype).T
            out.backward(out.detach())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / times

    run(1)  # what is made only once
    while some < tokens and run(1) < PROBED / 10:  # a small part of the batch will do where the machine is slow
        some = min(tokens, 2 * some)
    each = min(run(max(1, round(PROBED / 3 / run(1)))) for _ in range(3))
    return some * (4 * hidden * inner + 6 * rank * (hidden + inner)) / each
