"""The whole alignment objective on token states: masked mean, normalisation and InfoNCE, ours against eager PyTorch.

A case is NxTxD and words, as in 64x64x4096:bf16:exact:one:full: N pairs, so 2N rows of T tokens, the sources first;
of the words at most one of each kind (the first is the default): bf16, fp32, fp16; exact, fast; one, symmetric; and
full, ragged, left, holes: which tokens count. They mean what they mean in bench_masked_mean_pool.py and
bench_info_nce.py, whose plain formulas, one after the other, are eager. Temperature 0.1.

Bytes: those of pooling 2N rows, forward and backward. FLOPs: those of InfoNCE of N pairs. None for backward alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

# Threads that spin while they wait make a step take seconds where others use the machine, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import bench_info_nce as loss
import bench_masked_mean_pool as pool
import torch
from harness import DEVICE
from kernel_bench import Benchmark, parser, run
from kernel_cases import DTYPES, OURS, Case, Compiled, Provider, Target, read_name
from torch import Tensor

from fastalign_kernels import pooled_info_nce

LAYOUTS = ("full", "ragged", "left", "holes")


@dataclass(frozen=True)
class Shape:
    pairs: int
    tokens: int
    width: int
    dtype: str
    precision: str
    direction: str
    layout: str

    def __str__(self) -> str:
        words = (self.dtype, self.precision, self.direction, self.layout)
        return ":".join((f"{self.pairs}x{self.tokens}x{self.width}", *words))


def read(name: str) -> Shape:
    sizes, words = read_name(name, (3,), (tuple(DTYPES), ("exact", "fast"), ("one", "symmetric"), LAYOUTS))
    return Shape(sizes[0], sizes[1], sizes[2], words[0], words[1], words[2], words[3])


def eager(hidden: Tensor, mask: Tensor, fast: bool, symmetric: bool) -> Tensor:
    source, target = pool.eager_padded(hidden, mask).chunk(2)
    return loss.eager(source, target, fast=fast, symmetric=symmetric)


def truth(batch: pool.Batch, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The loss of the exact means, and its gradient spread to the tokens, in fp64."""
    tokens = batch.hidden.detach().flatten(0, -2)
    means = torch.stack([tokens[kept].double().mean(0) for kept in batch.kept])
    value, source, target = loss.truth(means[: len(means) // 2], means[len(means) // 2 :], symmetric)
    return value, batch.truth("mean", torch.cat((source, target)))[1]


def make(shape: Shape) -> Case:
    batch = pool.Batch(2 * shape.pairs, shape.tokens, shape.width, shape.dtype, shape.layout)
    fast, symmetric = shape.precision == "fast", shape.direction == "symmetric"
    with torch.no_grad():  # a target has something of its source, so that there is something to find
        batch.hidden[shape.pairs :] += batch.hidden[: shape.pairs] / 2
    ours = partial(
        pooled_info_nce, mask=batch.mask, temperature=loss.TEMPERATURE, symmetric=symmetric, precision=shape.precision
    )
    plain = partial(eager, mask=batch.mask, fast=fast, symmetric=symmetric)
    moved = pool.bytes_moved(
        **batch.size, rows=2 * shape.pairs, width=shape.width, itemsize=batch.hidden.element_size()
    )
    return Case(
        columns=vars(shape) | {"kept": batch.size["kept"]},
        inputs=[batch.hidden],
        upstream=torch.ones((), device=DEVICE),
        truth=partial(truth, batch, symmetric),
        providers={
            "ours": partial(Provider, partial(ours, backend=OURS)),
            "twin": partial(Provider, partial(ours, backend="torch")),
            "eager": partial(Provider, plain),
            "compile": partial(Compiled, plain),
        },
        floor=loss.floor(shape.precision, shape.pairs, shape.width),
        loose=loss.LOOSE[shape.precision],
        bytes={mode: moved[mode] for mode in ("forward", "both")},
        flops=loss.flops(shape.pairs, shape.pairs, shape.width, symmetric),
        gemm="bf16" if fast else "fp32",
    )


SMALL = "64x64x4096:bf16:exact:one:full"
BENCH = Benchmark(
    name="pooled_info_nce",
    doc=__doc__ or "",
    grammar=f"cases NxTxD[:bf16|fp32|fp16][:exact|fast][:one|symmetric][:{'|'.join(LAYOUTS)}]",
    gpu=(
        SMALL,
        "64x64x4096:bf16:fast:one:full",
        "64x64x4096:bf16:exact:symmetric:ragged",
        "256x128x4096:bf16:exact:one:full",
        "1024x32x4096:bf16:fast:symmetric:ragged",
        "32x32x2048:fp32:exact:one:ragged",
    ),
    cpu=("64x64x512:fp32:exact:one:full", "64x64x512:bf16:fast:symmetric:ragged", "32x32x2048:fp32:exact:one:ragged"),
    quick=("3x5x16:fp32:exact:symmetric:ragged", "4x6x32:bf16:fast:one:left"),
    providers=("ours", "twin", "eager", "compile"),
    read=read,
    make=make,
    targets=(
        Target("pooled_launches", SMALL, "ours", "launches", most=6),
        Target("pooled_time_of_eager", SMALL, "eager", "time_ratio", most=0.25),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCH, parser(BENCH).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
