"""What a run holds in memory on one rank, item by item: counted from the model's structure, no weights are read.

Weights, adapter, gradients and optimizer are exact to the byte. What the streams need above them follows the course
of memory through the model's own code (training/course.py). Not counted are evaluation, what the allocator holds back
and cannot use (`SPARE`), and what the driver keeps for itself (`CONTEXT`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastalign.config import AdapterConfig, Config, ModelConfig, TaskConfig, logits_bytes
from fastalign.model.loading import add_adapter, compute_dtype, packing
from fastalign.model.skeleton import Skeleton, skeleton
from fastalign.training.arguments import checkpointing
from fastalign.training.course import Course, Mode, course
from fastalign.training.optimizer import optimizer_bytes
from fastalign.training.zero import deepspeed_settings, parted

CONTEXT = 500 * 10**6  # bytes of a GPU that driver and libraries take before a tensor is there; assumed, not counted
SPARE = {True: 0.05, False: 0.15}  # of what is left on a GPU or not: for what the allocator cannot use, and others take
SIDES = {"alignment": 2}  # of a stream: rows of a forward that an item of its micro-batch is
DEFAULT_LOGITS = logits_bytes(TaskConfig())  # where there is no config to ask


@dataclass(frozen=True)
class Shape:
    """What one optimizer step of a stream puts through the model, on one rank; a sentence pair is two rows.

    Attributes:
        rows_per_step: rows of an optimizer step. rows_per_forward: of a forward, at most.
        width: tokens of the widest padded row: decides the memory.
        blocks: that run, from below; None: all, and the head.
        usual_width: tokens of an average padded row: decides the time; `width` if not given.
        labels: tokens of a forward that the loss is taken of, at most; all if not given.
    """

    rows_per_step: int
    rows_per_forward: int
    width: int
    blocks: int | None = None
    usual_width: float | None = None
    labels: int | None = None


@dataclass(frozen=True)
class Target:
    """What computes: `dtype` of the base, `autocast` to which 16-bit format, if any, and whether it is a GPU."""

    dtype: torch.dtype
    autocast: torch.dtype | None
    on_gpu: bool


def target(config: Config, device: torch.device) -> Target:
    """Of a run on this device.

    Args:
        config: with the effective ``training`` section.
    """
    return Target(compute_dtype(config.model, device), _autocast(config.training), device.type == "cuda")


def _autocast(training: Mapping[str, Any]) -> torch.dtype | None:
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for key, dtype in formats.items() if training.get(key)), None)


def gpu_target(config: Config) -> Target:
    """Of a run on a GPU that is not here: one that has bfloat16, as all have since 2020."""
    training = {"bf16": not config.training.get("fp16"), **config.training}
    found = target(Config(model=config.model, training=training), torch.device("cpu"))
    return Target(torch.bfloat16 if config.model.dtype == "auto" else found.dtype, found.autocast, on_gpu=True)


def usable(memory: int, on_gpu: bool) -> int:
    """Bytes of a memory that tensors can have."""
    return round((1 - SPARE[on_gpu]) * max(0, memory - (CONTEXT if on_gpu else 0)))


def memory_for(peak: int, on_gpu: bool) -> int:
    """Bytes of the smallest memory in which tensors can have `peak`."""
    return round(peak / (1 - SPARE[on_gpu])) + (CONTEXT if on_gpu else 0)


class Needs:
    """What a model in its adapter needs, whatever the batches; every part of it is looked at only once.

    Args:
        skeleton: of the model. target: what computes. checkpointing: blocks are recomputed.
    """

    def __init__(self, skeleton: Skeleton, target: Target, checkpointing: bool):
        self.skeleton, self._target, self.checkpointing = skeleton, target, checkpointing

    def above(self, shape: Shape, logits_limit: int | None = DEFAULT_LOGITS) -> dict[str, int]:
        """Bytes above weights, gradients and optimizer of a stream's forward and backward.

        Returns:
            ``{"activations", "logits", "workspace", "peak"}``: what autograd keeps where most is held; logits, which
            are gone again when the blocks' backward needs its workspace: gradients of activations, a recomputed
            block, an unpacked weight; and the most that is held at once.
        """
        rows, width = shape.rows_per_forward, shape.width
        run = self._course(shape.blocks, self.checkpointing)
        kept, peak = run.kept(rows, width), run.peak(rows, width)
        live = self._course(shape.blocks, False).block(rows, width) if self.checkpointing else 0
        logits = 0
        if shape.blocks is None:
            labels = rows * width if shape.labels is None or logits_limit is None else shape.labels
            logits = logits_at_once(labels, self.skeleton.text_config, self.skeleton.itemsize, logits_limit)
        elif rows < shape.rows_per_step:  # the gradient of all vectors of the step, from the first pass
            gradients = 4 * shape.rows_per_step * self.skeleton.text_config.hidden_size
            kept, peak = kept + gradients, peak + gradients
        activations = min(kept + live, peak)
        return {
            "activations": activations,
            "logits": logits,
            "workspace": peak - activations,
            "peak": max(kept + logits, peak),
        }

    def _course(self, blocks: int | None, checkpointing: bool) -> Course:
        return _course(self.skeleton, blocks, Mode(self._target.autocast, self._target.on_gpu, checkpointing))


def needs_of(config: Config, hf_config: Any, target: Target, blocks: int | None = None) -> Needs:
    """Looks at the model on the meta device; a second look at the same one costs nothing.

    Args:
        config: its adapter, quantisation and checkpointing.
        hf_config: of the model, from transformers.
        blocks: that are loaded; None: all, and the head.

    Raises:
        ConfigError: the adapter fits no module, or bitsandbytes is missing.
    """
    built = _skeleton(_Key(hf_config, config.model, config.adapter, target.dtype, blocks))
    return Needs(built, target, checkpointing(config.training))


def needs_of_model(model: Any, args: Any) -> Needs:
    """Looks at what is like a model that is in training.

    Args:
        model: with or without an adapter, but nothing else around it. args: `transformers.TrainingArguments`.
    """
    from peft import get_peft_model

    weight = model.get_input_embeddings().weight
    adapters = getattr(model, "peft_config", None)
    packed = getattr(model, "is_loaded_in_4bit", False)
    built = skeleton(
        model.config,
        weight.dtype,
        lambda bare: bare if not adapters else get_peft_model(bare, copy.deepcopy(next(iter(adapters.values())))),
        quantization=model.config.quantization_config if packed else None,
        attention=model.config._attn_implementation or "auto",
    )
    computes = Target(weight.dtype, _autocast(vars(args)), args.device.type == "cuda")
    return Needs(built, computes, checkpointing(vars(args)))


def memory(config: Config, needs: Needs, shapes: Mapping[str, Shape], ranks: int = 1) -> dict[str, Any]:
    """Bytes on one rank by what holds them.

    Returns:
        ``{"items": {item: bytes}, "streams": {name: as `Needs.above`}, "peak", "zero"}``. The items add up to `peak`;
        streams take turns, so that what they need is that of the one that needs most. zero: ``{"stage", "saved"}``
        where DeepSpeed parts something among the ranks, or keeps it in the CPU's memory, else None.
    """
    size = needs.skeleton
    gradients, optimizer = size.adapter, optimizer_bytes(size, config)
    if config.schedule.mode == "joint" and ranks == 1:
        gradients *= 2  # those of the first stream are kept aside, to tell the norms apart
    items = {"base": size.base, "embedding": size.embedding, "head": size.head, "adapter": size.adapter}
    settings = deepspeed_settings(config.training) if ranks > 1 else None
    zero = None if settings is None else settings["zero_optimization"]
    stage = None if zero is None else zero["stage"]
    if zero is not None and _autocast(config.training):  # DeepSpeed's own way: 16 bits, and a copy in fp32
        items["adapter"] = gradients = 2 * size.trainable
        optimizer += 4 * size.trainable
    items |= {"gradients": gradients, "optimizer": optimizer}
    whole = sum(items.values())
    if zero is not None:
        items = parted(items, zero, ranks, size.itemsize)
    elif ranks > 1:
        items["buckets"] = size.adapter  # DDP copies the gradients into them
    saved = whole - sum(count for name, count in items.items() if name not in ("buckets", "gathered"))
    limit = logits_bytes(config.task)
    if stage == 3 and limit is not None:
        limit = 2**62  # those of all answers of a forward are there at once
    streams = {name: needs.above(shape, limit) for name, shape in shapes.items()}
    if ranks > 1 and config.alignment.negatives == "world" and "alignment" in streams:
        layers = len(config.alignment.layer) if isinstance(config.alignment.layer, list) else 1
        others = 4 * layers * (ranks - 1) * shapes["alignment"].rows_per_step * size.text_config.hidden_size
        for name in ("workspace", "peak"):  # the vectors of the other ranks, in fp32
            streams["alignment"][name] += others
    worst = max(streams.values(), key=lambda part: part["peak"], default=None)
    items |= _at_worst(worst) if worst else {}
    return {
        "items": items,
        "streams": streams,
        "peak": sum(items.values()),
        "zero": None if not stage else {"stage": stage, "saved": saved},
    }


def _at_worst(stream: Mapping[str, int]) -> dict[str, int]:
    """The items of a stream at the moment when most is held: the loss with its logits, or the blocks' backward."""
    if stream["peak"] <= stream["activations"] + stream["workspace"]:
        return {"activations": stream["activations"], "logits": 0, "workspace": stream["workspace"]}
    return {"activations": stream["peak"] - stream["logits"], "logits": stream["logits"], "workspace": 0}


def logits_at_once(label_rows: int, text_config: Any, itemsize: int, limit: int | None) -> int:
    """Bytes of the logits of a forward at once, with their copy in fp32 and their gradient, as far as they are limited.

    Args:
        label_rows: of a forward: those with a label, or all where there is no limit.
        text_config: of the decoder. itemsize: of a number of the logits. limit: as `config.logits_bytes` gives it.
    """
    if limit is None:  # as transformers makes them: the gradient, too, is that of all
        return label_rows * text_config.vocab_size * (2 * itemsize + 4)
    each = 4 + itemsize
    if getattr(text_config, "final_logit_softcapping", None):  # keeps what it was given, and what it gave
        each = max(4 + 2 * itemsize, 4 * itemsize)
    return min(label_rows * text_config.vocab_size * each, limit)


class _Key:
    """What a skeleton is built from; two are the same if all of it is."""

    def __init__(
        self, hf_config: Any, model: ModelConfig, adapter: AdapterConfig, dtype: torch.dtype, blocks: int | None
    ):
        self.hf_config, self.model, self.adapter, self.dtype, self.blocks = hf_config, model, adapter, dtype, blocks
        self._text = f"{hf_config.to_json_string(use_diff=False)} {model} {adapter} {dtype} {blocks}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@functools.lru_cache(maxsize=8)
def _skeleton(key: _Key) -> Skeleton:
    return skeleton(
        key.hf_config,
        key.dtype,
        lambda model: add_adapter(model, key.adapter),
        blocks=key.blocks,
        quantization=packing(key.model, key.hf_config, key.dtype, key.blocks),
        attention=key.model.attn_implementation,
        trust_remote_code=key.model.trust_remote_code,
    )


@functools.lru_cache(maxsize=64)
def _course(size: Skeleton, blocks: int | None, mode: Mode) -> Course:
    return course(size, blocks, mode)
