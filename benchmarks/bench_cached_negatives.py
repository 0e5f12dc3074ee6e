"""Negatives beyond a micro-batch: what cached gradients cost, in memory and in time.

A step is forward and backward of the symmetric InfoNCE of N pairs on the mean-pooled states of layer l, for LoRA
adapters (r 8, every linear layer but the head) on a frozen Llama with random weights; fp32 on the CPU, bf16 on a GPU.
No optimizer, no padding. The ways:
- cached: the alignment stream as the trainer runs it, N pairs in micro-batches; every pair is every other's negative.
- checkpointed: one batch of N pairs with gradient checkpointing, each block recomputed in the backward.
- plain: one batch of N pairs that keeps all activations. Only at the smallest N.

First, at the smallest N and in fp32, loss and every gradient of cached and checkpointed are compared with plain's,
within 1e-5 relative, else no numbers and exit code 1. Peak memory is what tensors hold at once during a step, as
PyTorch's allocators count it: `peak_bytes` above the weights, `total_bytes` with them. A ratio of times is the
median of cached / checkpointed within a round. The last line is
`memory_1024_64=1.xx time_checkpointed=1.xx`: total bytes of cached at the largest N against the smallest, and time of
cached against checkpointed at --timed pairs. Rows go to the end of results/<device>/cached_negatives.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow down a shared machine

import numpy as np
import torch
from harness import DEVICE, HERE, ON_GPU, append_rows, interleaved_ms, peak_bytes, provenance, take_gradients
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.config import AlignmentConfig
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import MicroBatch

TOLERANCE = 1e-5
SECONDS = 60.0  # for the rounds: on a busy machine there are fewer
DEFAULTS = {"layers": 8, "hidden": 256, "vocab": 8000, "tokens": 32, "micro": 32, "timed": 256, "rounds": 9}
if ON_GPU:
    DEFAULTS |= {"layers": 16, "hidden": 2048, "vocab": 32000, "rounds": 30}


class Case:
    """The adapted model, and a batch of any number of pairs, the same every time."""

    def __init__(self, options: argparse.Namespace):
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=options.layers,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 11 // 4,
            num_attention_heads=max(1, options.hidden // 64),
            vocab_size=options.vocab,
        )
        # not the usual start, where B and with it the gradient of A is zero
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, init_lora_weights=False)
        with DEVICE:
            self.model = get_peft_model(LlamaForCausalLM(config), lora).train()  # type: ignore[arg-type]
        self.options, self.layer = options, options.layers // 2
        self.trained = {name: w for name, w in self.model.named_parameters() if w.requires_grad}

    def batch(self, pairs: int, size: int) -> list[MicroBatch]:
        ids = torch.randint(
            3, self.options.vocab, (2, pairs, self.options.tokens), generator=torch.Generator().manual_seed(1)
        )
        parts = []
        for part in ids.split(size, dim=1):
            tokens = part.flatten(0, 1).to(DEVICE)
            inputs = {name: torch.ones_like(tokens) for name in ("attention_mask", "pool_mask")}
            inputs |= {"input_ids": tokens, "meaning": torch.arange(part.shape[1], device=DEVICE)}
            inputs["meaning"] += size * len(parts)
            parts.append(MicroBatch(inputs, tokens=tokens.numel(), items=part.shape[1]))
        return parts

    def step(self, way: str, pairs: int) -> torch.Tensor:
        """The loss; the gradients stay until `gradients` takes them."""
        size = self.options.micro if way == "cached" else pairs
        nothing: Any = None  # neither data nor tokenizer: the batch is here
        config = AlignmentConfig(batch_size=pairs, micro_batch_size=size)
        stream = AlignmentStream([], [], nothing, nothing, config, [self.layer], accumulation=1)
        if way == "checkpointed":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        micro_batches = self.batch(pairs, size)
        stream.begin_step(self.model, micro_batches)
        total = torch.zeros((), device=DEVICE)
        for micro_batch in micro_batches:
            loss = stream.loss(self.model, micro_batch)
            loss.backward()
            total += loss.detach()
        if way == "checkpointed":
            self.model.gradient_checkpointing_disable()  # type: ignore[operator]
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        return take_gradients(self.trained)

    def disagreements(self, pairs: int) -> list[str]:
        """Where a loss or a gradient differs from that of plain by more than the tolerance."""
        expected, wrong = {"loss": self.step("plain", pairs), **self.gradients()}, []
        for way in ("cached", "checkpointed"):
            actual = {"loss": self.step(way, pairs), **self.gradients()}
            for name in expected:
                error = (actual.pop(name, float("nan")) - expected[name]).norm() / expected[name].norm()
                if not error <= TOLERANCE:  # NaN is wrong, too, or a gradient that is not there
                    wrong.append(f"{way}: {name} is off by {error:.1e}")
            wrong += [f"{way}: {name} is not in plain" for name in actual]
        return wrong


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cached gradients: memory and time by the number of negatives.")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256, 1024], help="default: 64 256 1024")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="for <device>/cached_negatives.csv")
    options = parser.parse_args(arguments)
    options.pairs = sorted(options.pairs)
    if options.layers < 2 or options.pairs[0] <= options.micro or options.timed not in options.pairs:
        parser.error("--layers must be 2 or more, every number of --pairs above --micro, --timed one of --pairs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    case, few, many = Case(options), options.pairs[0], options.pairs[-1]
    if wrong := case.disagreements(few):  # on the CPU this is also the warm-up
        print("no numbers, because not all ways compute the same:", *wrong[:9], sep="\n  ", file=sys.stderr)
        return 1
    if ON_GPU:
        for weight in case.model.parameters():
            weight.data = weight.data.bfloat16()
    weights = sum(weight.numel() * weight.element_size() for weight in case.model.parameters())
    ways = [("plain", few), *(("cached", pairs) for pairs in options.pairs)]
    ways += [("checkpointed", pairs) for pairs in sorted({few, options.timed})]
    peaks = {way: peak_bytes(partial(case.step, *way), case.gradients) for way in ways}
    timed = {way: partial(case.step, way, options.timed) for way in ("cached", "checkpointed")}
    times = interleaved_ms(timed, case.gradients, options.rounds, SECONDS)
    ratio = float(np.median(np.divide(times["cached"], times["checkpointed"])))

    about = provenance() | {"dtype": str(next(case.model.parameters()).dtype).removeprefix("torch.")}
    about |= {name: getattr(options, name) for name in DEFAULTS} | {"rounds": len(times["cached"])}
    rows = []
    for way, pairs in ways:
        row = {"case": f"{pairs} pairs", "provider": way, **about, "pairs": pairs}
        row |= {"peak_bytes": peaks[way, pairs], "total_bytes": peaks[way, pairs] + weights}
        ms = times[way] if way in times and pairs == options.timed else None
        row["median_ms"] = round(float(np.median(ms)), 3) if ms else None
        row["time_ratio"] = round(ratio, 4) if ms and way == "cached" else None
        rows.append(row)
    path = append_rows("cached_negatives", rows, options.out)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(*(f"{key}={value}" for key, value in about.items()), f"\nrows appended to {path}\n")
    print(f"{'':14}{'pairs':>6}{'peak MB':>10}{'with weights':>14}{'median ms':>11}")
    for row in rows:
        print(f"{row['provider']:14}{row['pairs']:6}{row['peak_bytes'] / 1e6:10.1f}", end="")
        print(f"{row['total_bytes'] / 1e6:14.1f}{row['median_ms'] or '':>11}")
    memory = (peaks["cached", many] + weights) / (peaks["cached", few] + weights)
    print(f"memory_{many}_{few}={memory:.3f} time_checkpointed={ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
