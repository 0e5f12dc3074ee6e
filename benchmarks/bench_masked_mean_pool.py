"""Masked mean-pooling of token states: ours against eager PyTorch and torch.compile.

A case is NxTxD and words, as in 256x128x4096:bf16:full. N rows of T tokens of D numbers, and of the words at most one
of each kind (the first is the default):
- bf16, fp32, fp16: of the states; the means are fp32.
- full: every token counts. ragged: rows of 1 to T tokens, padded on the right. left: on the left. holes: any three
  quarters of the tokens. flat: as ragged, but the rows in one array without padding, and cu_seqlens in place of a mask.
- mean, unit: unit divides the means by their norms.
Eager is the plain formula: cast to fp32, times the mask, sum, divide; on flat rows an index_add. Gradients are for a
random gradient of the means.

Bytes, for b bytes a number and K tokens that count of K' there are: forward b K D + 4 N D, backward b K' D + 4 N D,
both their sum. So `roofline` is the share of the copy rate, and more work than one read and one write shows.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

# Threads that spin while they wait make a step take seconds where others use the machine, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from harness import DEVICE
from kernel_bench import Benchmark, parser, run
from kernel_cases import DTYPES, OURS, Case, Compiled, Provider, Target, read_name
from torch import Tensor

from fastalign_kernels import masked_mean_pool

LAYOUTS = ("full", "ragged", "left", "holes", "flat")
FLOOR, LOOSE = 1e-6, 1e-2  # a bf16 gradient is rounded: 2e-3


@dataclass(frozen=True)
class Shape:
    rows: int
    tokens: int
    width: int
    dtype: str
    layout: str
    scaling: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}x{self.width}:{self.dtype}:{self.layout}:{self.scaling}"


def read(name: str) -> Shape:
    sizes, words = read_name(name, (3,), (tuple(DTYPES), LAYOUTS, ("mean", "unit")))
    return Shape(sizes[0], sizes[1], sizes[2], words[0], words[1], words[2])


class Batch:
    """States (N, T, D) with `mask` (N, T), or (tokens, D) with `cu_seqlens`.

    `kept` holds for each row the positions of those that count, in all tokens of the batch.
    """

    mask: Any = None
    cu_seqlens: Any = None

    def __init__(self, rows: int, tokens: int, width: int, dtype: str, layout: str):
        random = torch.Generator().manual_seed(0)
        lengths = torch.full((rows,), tokens)
        if layout != "full":
            lengths = torch.randint(1, tokens + 1, (rows,), generator=random)
        places = torch.arange(tokens)
        mask = places < lengths[:, None]
        if layout == "left":
            mask = mask.flip(1)
        elif layout == "holes":
            mask = torch.rand(rows, tokens, generator=random) < 0.75
            mask[:, tokens // 2] = True
        self.mask = mask.to(DEVICE)
        self.kept = [row.nonzero().squeeze(1) + number * tokens for number, row in enumerate(self.mask)]
        shape = (rows, tokens, width)
        if layout == "flat":
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
            starts = cu_seqlens.tolist()
            self.mask, self.cu_seqlens, shape = None, cu_seqlens.to(DEVICE), (starts[-1], width)
            self.kept = [torch.arange(*ends, device=DEVICE) for ends in itertools.pairwise(starts)]
        torch.manual_seed(0)
        self.hidden = torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]).requires_grad_()
        self.size = {"tokens": self.hidden.numel() // width, "kept": sum(map(len, self.kept))}

    def truth(self, scaling: str, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled rows and the gradient of the states, row by row in fp64."""
        tokens = self.hidden.detach().flatten(0, -2)
        gradient = torch.zeros(tokens.shape, dtype=torch.float64, device=DEVICE)
        pooled = []
        for kept, one in zip(self.kept, upstream, strict=True):
            mean = tokens[kept].double().mean(0).requires_grad_()
            pooled.append(F.normalize(mean, dim=0) if scaling == "unit" else mean * 1)
            (slope,) = torch.autograd.grad(pooled[-1], mean, one.double())
            gradient[kept] = slope / len(kept)
        return torch.stack(pooled).detach(), gradient.view(self.hidden.shape)


def eager_padded(hidden: Tensor, mask: Tensor, unit: bool = False) -> Tensor:
    mean = (hidden.float() * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(mean, dim=1) if unit else mean


def eager_flat(hidden: Tensor, cu_seqlens: Tensor, unit: bool = False) -> Tensor:
    lengths = cu_seqlens.diff()
    rows = torch.repeat_interleave(lengths, output_size=len(hidden))
    mean = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
    mean = mean.index_add(0, rows, hidden.float()) / lengths.unsqueeze(1)
    return F.normalize(mean, dim=1) if unit else mean


def bytes_moved(tokens: int, kept: int, rows: int, width: int, itemsize: int) -> dict[str, int]:
    """By mode: each number that counts read once, each gradient written once, the (N, D) fp32 rows beside them."""
    forward, backward = (itemsize * count * width + 4 * rows * width for count in (kept, tokens))
    return {"forward": forward, "backward": backward, "both": forward + backward}


def make(shape: Shape) -> Case:
    batch = Batch(shape.rows, shape.tokens, shape.width, shape.dtype, shape.layout)
    unit = shape.scaling == "unit"
    eager = partial(eager_padded, mask=batch.mask, unit=unit)
    if batch.cu_seqlens is not None:
        eager = partial(eager_flat, cu_seqlens=batch.cu_seqlens, unit=unit)
    ours = partial(masked_mean_pool, mask=batch.mask, cu_seqlens=batch.cu_seqlens, normalize=unit)
    upstream = torch.randn(shape.rows, shape.width, device=DEVICE)
    return Case(
        columns=vars(shape) | batch.size,
        inputs=[batch.hidden],
        upstream=upstream,
        truth=partial(batch.truth, shape.scaling, upstream),
        providers={
            "ours": partial(Provider, partial(ours, backend=OURS)),
            "twin": partial(Provider, partial(ours, backend="torch")),
            "eager": partial(Provider, eager),
            "compile": partial(Compiled, eager),
        },
        floor=FLOOR,
        loose=LOOSE,
        capturable=batch.cu_seqlens is None,  # which are read back to be checked
        bytes=bytes_moved(**batch.size, rows=shape.rows, width=shape.width, itemsize=batch.hidden.element_size()),
    )


LARGE = "256x128x4096:bf16:full:mean"
BENCH = Benchmark(
    name="masked_mean_pool",
    doc=__doc__ or "",
    grammar="cases NxTxD[:bf16|fp32|fp16][:full|ragged|left|holes|flat][:mean|unit]",
    gpu=(
        LARGE,
        "64x64x4096:bf16:full:mean",
        "64x512x4096:bf16:full:mean",
        "2x16384x4096:bf16:full:mean",
        "256x128x4096:bf16:ragged:mean",
        "256x128x4096:bf16:flat:mean",
        "256x128x4096:bf16:holes:mean",
        "256x128x4096:bf16:left:unit",
        "64x64x4096:bf16:ragged:unit",
        "256x128x4096:fp32:full:mean",
    ),
    cpu=(
        "64x64x1024:fp32:full:mean",
        "64x64x1024:bf16:ragged:mean",
        "64x64x1024:bf16:flat:mean",
        "2x4096x1024:bf16:full:unit",
    ),
    quick=("3x7x33:fp32:ragged:mean", "3x7x33:bf16:left:unit", "4x5x32:bf16:flat:mean", "4x5x32:bf16:holes:mean"),
    providers=("ours", "twin", "eager", "compile"),
    read=read,
    make=make,
    targets=(
        Target("pool_forward", LARGE, "ours", "roofline", mode="forward", least=0.85),
        Target("pool_backward", LARGE, "ours", "roofline", mode="backward", least=0.80),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCH, parser(BENCH).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
