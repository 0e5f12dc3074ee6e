"""The task's loss from the final states: ours in chunks of few logits, and with all of them.

A step is value and gradient of the summed cross-entropy of M labelled rows of states (M, D) under a frozen plain head
(V, D); fp32 on the CPU, bf16 on a GPU. The decoder below it is the same for all, and not here. The ways:
- ours: `ChunkedCrossEntropy`, as the trainer, with --memory for its logits (the trainer's default: 256 MB).
- whole: what the trainer does under `task.logits_memory: whole`, and everyone who takes a model's logits: those of
  all --positions tokens of each labelled one, then the labelled rows in fp32 into `F.cross_entropy`.
- labels: as whole, but only the labelled rows reach the head.
- linear: `F.linear_cross_entropy` of PyTorch 2.13, in chunks of as many rows as ours has; empty where it is not there.
  Its value has the dtype of the states, so in bf16 it is rounded to three digits.

All ways must give the value and the gradient of labels in fp32, within 1e-4 relative (bf16, where only the gradient is
compared: 2e-2), else no speeds and exit code 1. A ratio of times is the median of ours / theirs within a round. Peak
memory is what tensors hold at once above what they held before the step, as PyTorch allocates it.
The last line is `ratio_whole=0.xx ratio_labels=0.xx ratio_linear=0.xx` of the last shape, the one before it the same
for memory; with --json, stdout is JSON only. Rows go to the end of results/<device>/cross_entropy.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a step take seconds where others use the machine, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from harness import DEVICE, HERE, ON_GPU, append_rows, peak_bytes, provenance, times_ms

from fastalign.config import parse_memory
from fastalign.objectives.cross_entropy import ChunkedCrossEntropy

# (M, D, V): the heads of Qwen 2.5 0.5B, Llama 3.2 1B and Llama 3 8B on a GPU, smaller ones of their form on the CPU
SHAPES = ["2048,896,151936", "2048,2048,128256", "4096,4096,128256"] if ON_GPU else ["256,256,16000", "512,512,32000"]
MEMORY = "256MB" if ON_GPU else "16MB"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Case:
    """States, labels and a head of one shape: the same every time."""

    def __init__(self, shape: str, options: argparse.Namespace):
        self.rows, self.width, self.size = map(int, shape.split(","))
        generator = torch.Generator(DEVICE).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=DEVICE)
        self.weight = (normal(self.size, self.width) * self.width**-0.5).to(DTYPE)
        tokens = normal(self.rows * options.positions, self.width).to(DTYPE)
        self.answer = torch.zeros(len(tokens), dtype=torch.bool, device=DEVICE)
        self.answer[:: options.positions] = True
        self.states = tokens.requires_grad_()
        self.labels = torch.randint(0, self.size, (self.rows,), generator=generator, device=DEVICE)
        self.memory = parse_memory(options.memory, "--memory", least=10**4)
        self.in_chunks = ChunkedCrossEntropy(self.memory)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight)

    def ours(self) -> torch.Tensor:
        return self.in_chunks(self.states[self.answer], self.labels, self.head)

    def whole(self) -> torch.Tensor:
        return F.cross_entropy(self.head(self.states)[self.answer].float(), self.labels, reduction="sum")

    def labels_only(self) -> torch.Tensor:
        return F.cross_entropy(self.head(self.states[self.answer]).float(), self.labels, reduction="sum")

    def linear(self) -> torch.Tensor:
        at_once = max(1, self.memory // self.in_chunks.row_bytes(self.states, self.head))
        settings = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=at_once, chunking_method=None)  # type: ignore[attr-defined]
        loss: Callable[..., Any] = F.linear_cross_entropy  # type: ignore[attr-defined]
        return loss(self.states[self.answer], self.weight, self.labels, reduction="sum", options=settings)

    def ways(self) -> dict[str, Callable[[], torch.Tensor]]:
        found = {"ours": self.ours, "whole": self.whole, "labels": self.labels_only}
        return found | ({"linear": self.linear} if hasattr(F, "linear_cross_entropy") else {})

    def step(self, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and gradient of the states."""
        loss = self.ways()[way]()
        (gradient,) = torch.autograd.grad(loss, self.states)
        return loss.detach(), gradient

    def disagreements(self) -> list[str]:
        exact = self.states.detach()[self.answer].float().requires_grad_()
        value = F.cross_entropy(exact @ self.weight.float().T, self.labels, reduction="sum")
        expected = {"loss": value.detach(), "gradient": torch.autograd.grad(value, exact)[0]}
        wrong = []
        for way in self.ways():
            loss, gradient = self.step(way)
            for name, found in (("loss", loss), ("gradient", gradient[self.answer])):
                if name == "loss" and found.dtype != torch.float32:
                    continue
                error = float((found.float() - expected[name]).norm() / expected[name].norm())
                if not error <= TOLERANCE[DTYPE]:  # NaN is wrong, too
                    wrong.append(f"{way}: {name} is off by {error:.1e}")
            if bool(gradient[~self.answer].any()):
                wrong.append(f"{way}: rows without a label have a gradient")
        return wrong


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The task's loss: ours in chunks, and with all logits.")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help=f"M,D,V; default: {' '.join(SHAPES)}")
    parser.add_argument("--memory", default=MEMORY, help=f"that logits of ours may take, default {MEMORY}")
    parser.add_argument("--positions", type=int, default=2, help="tokens per label in whole, default 2")
    parser.add_argument("--rounds", type=int, default=50 if ON_GPU else 7)
    parser.add_argument("--seconds", type=float, default=40.0, help="for all rounds, default 40")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="for <device>/cross_entropy.csv")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        case = Case(shape, options)
        if wrong := case.disagreements():
            print(f"no speeds for {shape}, because not all ways compute the same:", *wrong, sep="\n  ", file=sys.stderr)
            return 1
        steps = {way: partial(case.step, way) for way in case.ways()}
        peaks = {way: peak_bytes(step, lambda: None) for way, step in steps.items()}
        times = times_ms(steps, options.rounds, options.seconds / len(options.shapes))
        about = provenance() | {"dtype": str(DTYPE).removeprefix("torch."), "rows": case.rows, "hidden": case.width}
        about |= {
            "vocab": case.size,
            "positions": options.positions,
            "memory": case.memory,
            "rounds": len(times["ours"]),
        }
        for way, ms in times.items():
            low, middle, high = (round(float(q), 3) for q in np.quantile(ms, (0.1, 0.5, 0.9)))
            numbers = {"median_ms": middle, "p10_ms": low, "p90_ms": high, "peak_bytes": peaks[way]}
            numbers["time_ratio"] = round(float(np.median(np.divide(times["ours"], ms))), 4)
            numbers["memory_ratio"] = round(peaks["ours"] / peaks[way], 4)
            rows.append({"case": shape, "provider": way, **about, **numbers})
    path = append_rows("cross_entropy", rows, options.out)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(*(f"{key}={value}" for key, value in provenance().items()), f"\nrows appended to {path}\n")
    print(
        f"{'M,D,V':18}{'':8}{'median ms':>10}{'p10':>9}{'p90':>9}{'peak MB':>9}   ours / this: {'time':>5}{'memory':>8}"
    )
    for row in rows:
        print(f"{row['case']:18}{row['provider']:8}{row['median_ms']:10.1f}{row['p10_ms']:9.1f}", end="")
        print(f"{row['p90_ms']:9.1f}{row['peak_bytes'] / 1e6:9.1f}", end="")
        print(f"{row['time_ratio']:21.2f}{row['memory_ratio']:8.2f}")
    last = [row for row in rows if row["case"] == options.shapes[-1] and row["provider"] != "ours"]
    print(*(f"memory_{row['provider']}={row['memory_ratio']:.2f}" for row in last))
    print(*(f"ratio_{row['provider']}={row['time_ratio']:.2f}" for row in last))
    return 0


if __name__ == "__main__":
    sys.exit(main())
