"""Peak memory of a training step on a base in 4 bits: ours, two other ways, and what was predicted.

The base is a Llama with random NF4 weights (double quantisation), made layer by layer so that the whole never exists
in 16 bits, with LoRA (r 8, every linear layer but the head) and non-reentrant checkpointing; of the shape of an 8B
model and under bf16 autocast on a GPU, small and in fp32 on the CPU. A step is forward and backward of one micro-batch
without padding. The ways, for the alignment stream (InfoNCE on the pooled states of layer l) and for the task:
- ours: the streams as the trainer runs them.
- reference: the way of Liu & Niehues (2025, arXiv 2502.14830), as bench_alignment_step.py has it: two forwards that
  stop after layer l, and the head on the states of one side. Alignment only, on the same base as ours.
- prepared: what peft and transformers offer: `prepare_model_for_kbit_training`, which copies embedding, head and norms
  to fp32; all layers with `output_hidden_states=True`, or the model's own loss.

First the alignment losses and gradients of all ways are compared; where they differ there are no numbers and the exit
code is 1. `peak_bytes` is what tensors hold at once above what they held before the step, as PyTorch's allocators count
it, `total_bytes` with the model; `predicted_bytes` is what fastalign/training/needs.py says of the latter, from the
model's config alone. On a GPU a mixed run follows: 20 optimizer steps, task and alignment in turn, in a process that
may take no more than --limit GiB; it reports what was allocated, what was reserved, and what the driver took beside.
The targets are printed as reached or not. Rows go to the end of results/<device>/memory.csv; the last line is
`memory_reference=0.xx memory_prepared=0.xx predicted=1.xx` at the largest alignment batch: ours / theirs of the total
bytes, and predicted / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow down a shared machine

import numpy as np
import torch
from bench_alignment_step import TEMPERATURE, all_layers, reference
from harness import DEVICE, HERE, ON_GPU, append_rows, interleaved_ms, peak_bytes, provenance, take_gradients
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaConfig

from fastalign.config import AdapterConfig, AlignmentConfig
from fastalign.model.loading import add_adapter
from fastalign.model.quantization import nf4
from fastalign.model.skeleton import skeleton
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import MicroBatch
from fastalign.streams.task import TaskStream
from fastalign.training.needs import Needs, Shape, Target

TOLERANCE = 0.05 if ON_GPU else 1e-3  # of losses and of gradients as a whole, relative
ROOM, STEPS = 8e9, 20  # bytes that an alignment step of 4,096 tokens may take; steps of the mixed run
DEFAULTS = {"layers": 8, "hidden": 256, "inner": 704, "heads": 4, "keys": 2, "vocab": 8000, "layer": 4}
DEFAULTS |= {"width": 32, "task_width": 128, "rounds": 3}
TOKENS = {"alignment": [256, 1024], "task": [256, 1024]}
if ON_GPU:
    DEFAULTS |= {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "keys": 8, "vocab": 128256, "layer": 16}
    DEFAULTS |= {"width": 128, "task_width": 1024, "rounds": 5}
    TOKENS = {"alignment": [1024, 4096], "task": [1024, 4096]}


class Case:
    """The adapted model, what is predicted of it, and batches of any size."""

    def __init__(self, options: argparse.Namespace):
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.options = options
        hf_config = LlamaConfig(
            num_hidden_layers=options.layers,
            hidden_size=options.hidden,
            intermediate_size=options.inner,
            num_attention_heads=options.heads,
            num_key_value_heads=options.keys,
            vocab_size=options.vocab,
            pad_token_id=0,
        )
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        packed = nf4(dtype, sharded=False)
        adapt: Callable[[Any], Any] = partial(add_adapter, config=AdapterConfig())
        computes = Target(dtype, torch.bfloat16 if ON_GPU else None, ON_GPU)
        self.needs = Needs(skeleton(hf_config, dtype, adapt, quantization=packed), computes, checkpointing=True)
        base = skeleton(hf_config, dtype, lambda model: model, quantization=packed).model
        fill(base, hf_config)
        self.model: Any = adapt(base).train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, weight in self.trained.items():
            if "lora_B" in name:  # which starts as zero, and with it the gradient of A
                nn.init.normal_(weight, std=0.02)
        nothing: Any = None  # neither data nor order: the batches are made here
        tokenizer: Any = SimpleNamespace(max_length=options.task_width)
        settings = AlignmentConfig(
            batch_size=2, temperature=TEMPERATURE, direction="source_to_target", mask_equal_meaning=False
        )
        self.streams = {
            "alignment": AlignmentStream([], [], nothing, nothing, settings, [options.layer], accumulation=1),
            "task": TaskStream(
                [],
                [],
                tokenizer,
                nothing,
                micro_batch_size=1,
                accumulation=1,
                eval_batch_size=1,
                logits_memory=256 * 10**6,
            ),
        }

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def batch(self, stream: str, tokens: int) -> MicroBatch:
        """Of the task, a quarter of each row is an answer."""
        width = self.options.width if stream == "alignment" else min(self.options.task_width, tokens)
        ids = torch.randint(3, self.options.vocab, (tokens // width, width), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if stream == "alignment":
            inputs |= {"pool_mask": torch.ones_like(ids), "meaning": torch.arange(len(ids) // 2)}
            return MicroBatch(inputs, tokens, len(ids) // 2).to(DEVICE)
        labels = ids.clone()
        labels[:, : width - width // 4] = -100
        return MicroBatch({**inputs, "labels": labels}, tokens, int((labels != -100).sum())).to(DEVICE)

    def shape(self, stream: str, tokens: int) -> Shape:
        batch = self.batch(stream, tokens)
        rows, width = batch.inputs["input_ids"].shape
        blocks = self.options.layer if stream == "alignment" else None
        return Shape(rows, rows, width, blocks, labels=batch.items if blocks is None else None)

    def step(self, way: str, stream: str, batch: MicroBatch) -> torch.Tensor:
        """The loss; the gradients stay until `gradients` takes them."""
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=ON_GPU):
            if way == "ours":
                self.streams[stream].begin_step(self.model, [batch])
                loss = self.streams[stream].loss(self.model, batch)
            elif stream == "task":
                loss = self.model(**batch.inputs, use_cache=False).loss
            else:
                inputs = {name: part for name, part in batch.inputs.items() if name != "meaning"}
                loss = {"reference": reference, "prepared": all_layers}[way](self.model, inputs, self.options.layer)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        return take_gradients(self.trained)

    def held(self) -> int:
        """Bytes of the model: weights, what belongs to them, and adapter."""
        found: dict[int, int] = {}
        for weight in self.model.parameters():
            state = getattr(weight, "quant_state", None)
            parts = [weight]
            if state is not None:
                parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            found |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        return sum(found.values())

    def result(self, way: str) -> torch.Tensor:
        """Loss and all gradients of a small alignment batch, in one vector, to compare ways."""
        loss = self.step(way, "alignment", self.batch("alignment", self.options.tokens_alignment[0]))
        found = self.gradients()
        parts = [found[name].flatten().float() for name in sorted(found)]
        return torch.cat([loss.reshape(1).float(), *parts])


def fill(model: Any, hf_config: Any) -> None:
    """Random weights for a model on the meta device, one after the other; those of 4-bit layers are packed at once."""
    from bitsandbytes.nn import modules

    params: Any = modules.Params4bit  # its __new__ is not typed
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # as fastalign.model.loading does
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            made = torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
            made = made.fill_(1.0) if weight.dim() == 1 else made.normal_(std=0.02)
            if isinstance(weight, params):
                packed = params(made, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module)
                module._parameters[name] = packed.to(DEVICE)
            else:
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
            del made
    with DEVICE:
        model.model.rotary_emb = LlamaRotaryEmbedding(hf_config)


def measure(case: Case, way: str, stream: str, tokens: int, rounds: int) -> dict[str, Any]:
    """A row of the table; its bytes are None where memory ran out."""
    batch = case.batch(stream, tokens)
    step = partial(case.step, way, stream, batch)
    row: dict[str, Any] = {"provider": way, "stream": stream, "tokens": tokens, "held_bytes": case.held()}
    predicted = None
    if way == "ours":
        size = case.needs.skeleton
        predicted = size.weights + 2 * size.adapter + case.needs.above(case.shape(stream, tokens))["peak"]
    try:
        step()  # what is made only once
        case.gradients()
        row["peak_bytes"] = peak_bytes(step, case.gradients)
        times = interleaved_ms({way: step}, case.gradients, rounds, 20.0)[way]
        row["median_ms"] = round(float(np.median(times)), 3)
    except torch.OutOfMemoryError:
        row |= {"peak_bytes": None, "median_ms": None}
    case.gradients()
    row["total_bytes"] = None if row["peak_bytes"] is None else row["peak_bytes"] + row["held_bytes"]
    row["predicted_bytes"] = predicted
    known = predicted is not None and row["total_bytes"]
    row["predicted_ratio"] = round(predicted / row["total_bytes"], 4) if known else None  # type: ignore[operator]
    return row


def mixed_run(case: Case, limit: float) -> dict[str, Any]:
    """20 optimizer steps of task and alignment in turn, with so many GiB at most. Only on a GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free, whole = torch.cuda.mem_get_info()
    context = whole - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(limit * 2**30 / whole)
    optimizer = torch.optim.AdamW(case.trained.values(), lr=1e-4)
    work = [("task", 1024), ("alignment", 4096)]
    row: dict[str, Any] = {"provider": "mixed run", "stream": "both", "tokens": 4096, "context_bytes": context}
    try:
        for index in range(STEPS):
            stream, tokens = work[index % 2]
            case.step("ours", stream, case.batch(stream, tokens))
            optimizer.step()
            optimizer.zero_grad()
        row["steps"] = STEPS
    except torch.OutOfMemoryError:
        row["steps"] = index
    torch.cuda.set_per_process_memory_fraction(1.0)
    row |= {"total_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of a step on a 4-bit base, beside what was predicted.")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    for stream, default in TOKENS.items():
        told = " ".join(map(str, default))
        parser.add_argument(f"--tokens-{stream}", type=int, nargs="+", default=default, help=f"default {told}")
    parser.add_argument("--limit", type=float, default=7.5, help="GiB of the mixed run, on a GPU (default 7.5)")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="for <device>/memory.csv")
    options = parser.parse_args(arguments)
    if not 1 <= options.layer < options.layers:
        parser.error("--layer must be 1 or more and below --layers (the last hidden state is normed)")
    if any(count % (2 * options.width) for count in options.tokens_alignment):
        parser.error("--tokens-alignment must be multiples of two rows of --width")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    case = Case(options)
    expected = case.result("ours")
    wrong = _difference("reference", case.result("reference"), expected)
    cells = [(stream, tokens) for stream in TOKENS for tokens in getattr(options, f"tokens_{stream}")]
    rows = []
    if not wrong:
        rows = [measure(case, "ours", *cell, options.rounds) for cell in cells]
        rows += [measure(case, "reference", *cell, options.rounds) for cell in cells if cell[0] == "alignment"]
        mixed = mixed_run(case, options.limit) if ON_GPU else None
        # the weights that are not packed grow here, for good
        prepare_model_for_kbit_training(case.model, gradient_checkpointing_kwargs={"use_reentrant": False})
        for weight_name, weight in case.model.named_parameters():
            weight.requires_grad_("lora_" in weight_name)
        wrong = _difference("prepared", case.result("prepared"), expected)
    if wrong:
        print(f"no numbers, because not all ways compute the same: {wrong}", file=sys.stderr)
        return 1
    rows += [measure(case, "prepared", *cell, options.rounds) for cell in cells]
    ours = {(row["stream"], row["tokens"]): row for row in rows if row["provider"] == "ours"}
    about = provenance() | {name: getattr(options, name) for name in DEFAULTS}
    for row in rows:
        beside = ours[row["stream"], row["tokens"]]
        row["memory_ratio"] = _ratio(beside["total_bytes"], row["total_bytes"])
        row["time_ratio"] = _ratio(beside["median_ms"], row["median_ms"])
    if mixed:
        rows.append({**dict.fromkeys(rows[0]), **mixed})
    columns = dict.fromkeys(("context_bytes", "reserved_bytes", "steps"))
    path = append_rows(
        "memory", [{"provider": row["provider"], **about, **columns, **row} for row in rows], options.out
    )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    _tell(rows, about, path)
    last = max(options.tokens_alignment)
    found = {row["provider"]: row for row in rows if (row["stream"], row["tokens"]) == ("alignment", last)}
    ratios = [f"memory_{way}={found[way]['memory_ratio'] or 0:.2f}" for way in ("reference", "prepared")]
    print(*ratios, f"predicted={found['ours']['predicted_ratio'] or 0:.3f}")
    return 0


def _difference(way: str, found: torch.Tensor, expected: torch.Tensor) -> str:
    """What differs of loss and gradients, by more than the tolerance."""
    if found.shape != expected.shape:  # above the layer, all layers leave no gradient
        return f"{way} gives {len(found)} numbers, not {len(expected)}"
    error = float((found - expected).norm() / expected.norm())
    return "" if error <= TOLERANCE else f"{way} is off by {error:.1e}"


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if not ours or not theirs else round(ours / theirs, 4)


def _tell(rows: Sequence[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    print(*(f"{key}={value}" for key, value in about.items()), f"\nrows appended to {path}\n")
    print(
        f"{'':12}{'stream':12}{'tokens':>7}{'total GB':>10}{'predicted':>11}{'median ms':>11}   ours/this: memory  time"
    )
    for row in rows:
        if row["provider"] == "mixed run":
            continue
        total = "no memory" if row["total_bytes"] is None else f"{row['total_bytes'] / 1e9:.3f}"
        said = f"{row['predicted_bytes'] / 1e9:.3f}" if row["predicted_bytes"] else ""
        print(f"{row['provider']:12}{row['stream']:12}{row['tokens']:7,}{total:>10}{said:>11}", end="")
        print(f"{row['median_ms'] or '':>11}{row['memory_ratio'] or '':>20}{row['time_ratio'] or '':>8}")
    ratios = [row["predicted_ratio"] for row in rows if row["predicted_ratio"]]
    close = all(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(f"\ntarget: predictions within 10%: {_reached(close)} ({min(ratios):.3f} to {max(ratios):.3f})")
    for row in rows:
        if ON_GPU and (row["provider"], row["stream"], row["tokens"]) == ("ours", "alignment", 4096):
            fits = row["total_bytes"] is not None and row["total_bytes"] <= ROOM
            print(f"target: alignment step of 4,096 tokens in at most 8 GB: {_reached(fits)}")
        if row["provider"] == "mixed run":
            print(
                f"target: mixed run of {STEPS} steps: {_reached(row['steps'] == STEPS)}, {row['steps']} steps;", end=""
            )
            parts = {"allocated": "total_bytes", "reserved": "reserved_bytes", "context": "context_bytes"}
            print(*(f" {name} {row[key] / 2**30:.2f} GiB" for name, key in parts.items()), sep=",")


def _reached(yes: bool) -> str:
    return "reached" if yes else "not reached"


if __name__ == "__main__":
    sys.exit(main())
