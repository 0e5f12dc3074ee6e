"""What a run will need in memory and time, from the model's config alone: no weights are read.

Memory is bytes of tensors on one rank, right within about a third: what training holds, and neither evaluation nor
what the driver keeps for itself (about half a gigabyte on a GPU). Seconds are a rough number: FLOPs over the rate at
which this machine does a linear layer of the model's shape, with nothing else running.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastalign.config import Config
from fastalign.model.loading import add_adapter, compute_dtype
from fastalign.training.memory import activation_bytes

NF4_BITS = 4 + 0.127  # a weight, and its share of the quantised scales of blocks of 64
ADAPTER_BYTES = 4  # of a number of the adapter and of its gradient
HALF = 1.3  # norms and casts stay in fp32 beside activations of 16 bits; seen under autocast on a CPU: 1.1 to 1.9
PROBED = 0.3  # seconds
BESIDE = 1.5  # of a step over its linear layers; seen on one CPU core: 0.8 to 1.8 at widths 128 to 512, 3 to 5 at 64


@dataclass(frozen=True)
class Shape:
    """What one optimizer step of a stream puts through the model, on one rank; a sentence pair is two rows.

    Attributes:
        rows_per_step: rows of an optimizer step. rows_per_forward: of a forward, at most.
        width: tokens of the widest padded row: decides the memory.
        blocks: that run, from below; None: all, and the head.
        usual_width: tokens of an average padded row: decides the time; `width` if not given.
    """

    rows_per_step: int
    rows_per_forward: int
    width: int
    blocks: int | None = None
    usual_width: float | None = None


@dataclass(frozen=True)
class Size:
    """Of a model in its adapter.

    Attributes:
        text_config: of its decoder.
        base: bytes of the frozen weights. adapter: trainable numbers. itemsize: bytes of an activation's number.
        block: weights by which a block multiplies each token, on average. head: those of the output layer.
    """

    text_config: Any
    base: int
    adapter: int
    itemsize: int
    block: float
    head: int


def size_of(config: Config, hf_config: Any, dtype: torch.dtype) -> Size:
    """Measures the model on PyTorch's meta device, where tensors have a shape and no content.

    Args:
        config: its adapter and quantisation.
        hf_config: of the model, from transformers.
        dtype: the number format of the base.

    Raises:
        ConfigError: the adapter fits no module.
    """
    from transformers import AutoModelForCausalLM

    text_config = hf_config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(hf_config), dtype=dtype, trust_remote_code=config.model.trust_remote_code
        )
        head: Any = model.get_output_embeddings()
        head_weight = getattr(head, "weight", None)
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)} | {id(head_weight)}
        linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)} - tables
        base = multiplied = 0.0
        for name, weight in model.named_parameters():
            in_4_bits = config.model.quantization == "nf4" and id(weight) in linear
            base += weight.numel() * (NF4_BITS / 8 if in_4_bits else dtype.itemsize)
            if weight.dim() >= 2 and id(weight) not in tables:
                multiplied += weight.numel() * (_active_share(text_config) if ".experts." in name else 1)
        adapted = add_adapter(model, config.adapter)
    return Size(
        text_config=text_config,
        base=round(base),
        adapter=sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad),
        itemsize=dtype.itemsize,
        block=multiplied / text_config.num_hidden_layers,
        head=0 if head_weight is None else head_weight.numel(),
    )


def memory(config: Config, size: Size, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Bytes by what holds them.

    Returns:
        ``{"base", "adapter", "gradients", "optimizer", "activations": {stream: bytes}, "peak"}``; streams take turns,
        so that `peak` has the largest of their activations.
    """
    parts = {
        "base": size.base,
        "adapter": ADAPTER_BYTES * size.adapter,
        "gradients": ADAPTER_BYTES * size.adapter,
        "optimizer": (2 if "8bit" in str(config.training.get("optim", "")) else 8) * size.adapter,
    }
    activations = {}
    for name, shape in shapes.items():
        predicted = activation_bytes(
            size.text_config,
            shape.rows_per_forward,
            shape.width,
            shape.blocks or size.text_config.num_hidden_layers,
            size.itemsize,
            checkpointing=_checkpointing(config),
            logits=shape.blocks is None,
        )
        activations[name] = round(predicted * (HALF if size.itemsize == 2 else 1))
    return {**parts, "activations": activations, "peak": sum(parts.values()) + max(activations.values(), default=0)}


def step_flops(config: Config, size: Size, shape: Shape, *, contrastive: bool) -> float:
    """Floating-point operations of one optimizer step of a stream.

    The base is frozen, so that its backward costs what its forward does; the adapter's costs twice that.

    Args:
        contrastive: the rows are each other's negatives, so that several forwards need each row once more.
    """
    text = size.text_config
    blocks = shape.blocks or text.num_hidden_layers
    width = shape.usual_width or shape.width
    base = blocks * size.block + (size.head if shape.blocks is None else 0)
    adapter = size.adapter * blocks / text.num_hidden_layers
    attention = 4 * width * text.hidden_size * blocks  # scores and their product with the values
    forward = 2 * (base + adapter) + attention
    again = _checkpointing(config) + (contrastive and shape.rows_per_forward < shape.rows_per_step)
    return shape.rows_per_step * width * (forward * (1 + again) + 2 * base + 4 * adapter + 2 * attention)


def forecast(
    config: Config, hf_config: Any, shapes: Mapping[str, Shape], steps: Mapping[str, int], device: torch.device
) -> dict[str, Any]:
    """What a run will need; see the module on how far to believe it.

    Args:
        config: of the run.
        hf_config: of the model, from transformers.
        shapes: of each stream. steps: optimizer steps of each.
        device: that will train; it is kept busy for a moment for each stream.

    Returns:
        ``{"memory": as `memory` says, "seconds", "streams": {name: seconds}, "trainable": numbers in the adapter}``.
    """
    dtype = compute_dtype(config.model, device)
    size = size_of(config, hf_config, dtype)
    seconds = {}
    for name, shape in shapes.items():
        tokens = round(shape.rows_per_forward * (shape.usual_width or shape.width))
        work = steps[name] * step_flops(config, size, shape, contrastive=name == "alignment")
        seconds[name] = BESIDE * work / _flops_per_second(size.text_config, config.adapter.r, tokens, dtype, device)
    total = sum(seconds.values())
    return {"memory": memory(config, size, shapes), "seconds": total, "streams": seconds, "trainable": size.adapter}


def _checkpointing(config: Config) -> bool:
    return bool(config.training.get("gradient_checkpointing"))


def _active_share(text_config: Any) -> float:
    """Of its experts that a token runs through."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(text_config, name, None))), None)
    used = getattr(text_config, "num_experts_per_tok", None)
    return used / experts if experts and used else 1.0


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
