"""InfoNCE on cosines: ours against eager PyTorch, torch.compile, inf-cl and the chunked loss of sentence-transformers.

A case is NxD (or NxMxD: M targets, the first N of them the positives) and words, as in 8192x4096:bf16:fast:one, of
the words at most one of each kind (the first is the default):
- bf16, fp32, fp16: of the inputs, and of the gradients.
- fast, exact: matrix products of bf16 operands, or in fp32 without TF32.
- one, symmetric: source to target, or the mean of both directions.
Targets are noise and half their source; temperature 0.1. Everybody gets the same inputs and gives gradients of
both, the normalisation is part of the work. Eager is F.normalize in fp32, one matrix product (of bf16 casts if fast)
and F.cross_entropy. The peers:
- inf-cl: `cal_flash_loss` on rows normalised in fp32; it computes with TF32 whatever the case says. Symmetric is two
  calls, as its own ring loss does it. CUDA only, D a multiple of 256.
- sentence-transformers: `CachedMultipleNegativesRankingLoss.calculate_loss` on the embeddings cast to fp32, 1024 rows
  at a time, each chunk with its backward at once; so it has no backward alone.
Ours makes the gradient in the forward when it is wanted, and its backward alone is one multiplication: compare `both`.

FLOPs: forward 2 N M D. Both: 6 N M D, or 8 N M D if symmetric (the columns' sums need the logits once more). Bytes,
for b bytes a number: b (N + M) D read, and the same written if gradients are wanted. None for backward alone.

On the CPU the last line compares ours (there the PyTorch twin) with eager, forward and backward, at 8192x512:
ratio_time is the median of ours / eager within a round, ratio_memory that of the extra peaks.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

# Threads that spin while they wait make a step take seconds where others use the machine, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from harness import DEVICE, ON_GPU, Step
from kernel_bench import Benchmark, Row, parser, run
from kernel_cases import DTYPES, MODES, OURS, Case, Compiled, Provider, Skip, Target, read_name
from torch import Tensor

from fastalign_kernels import info_nce

TEMPERATURE = 0.1
LARGE = 1 << 28  # more logits than that: not by the slow peers
ONLY_BOTH = LARGE if ON_GPU else 1 << 24  # more than that: no other mode
CHUNK = 1024  # rows at a time, of the truth and of sentence-transformers
EXACT_FLOPS = 2e13  # more than that take minutes in fp64 on a GPU without units for it
LOOSE = {"exact": 1e-2, "fast": 5e-2}  # wide enough for TF32, too narrow for a missing term


@dataclass(frozen=True)
class Shape:
    sources: int
    targets: int
    width: int
    dtype: str
    precision: str
    direction: str

    def __str__(self) -> str:
        between = "" if self.targets == self.sources else f"x{self.targets}"
        return f"{self.sources}{between}x{self.width}:{self.dtype}:{self.precision}:{self.direction}"

    @property
    def symmetric(self) -> bool:
        return self.direction == "symmetric"


def read(name: str) -> Shape:
    sizes, words = read_name(name, (2, 3), (tuple(DTYPES), ("fast", "exact"), ("one", "symmetric")))
    shape = Shape(sizes[0], sizes[-2], sizes[-1], words[0], words[1], words[2])
    if shape.targets < shape.sources or (shape.symmetric and shape.targets != shape.sources):
        raise ValueError(f"{name}: needs at least as many targets as sources, and as many if symmetric")
    return shape


def eager(source: Tensor, target: Tensor, *, fast: bool, symmetric: bool) -> Tensor:
    rows, columns = F.normalize(source.float(), dim=1), F.normalize(target.float(), dim=1)
    if fast:
        rows, columns = rows.bfloat16(), columns.bfloat16()
    logits = (rows @ columns.T).float() / TEMPERATURE
    positives = torch.arange(len(rows), device=rows.device)
    loss = F.cross_entropy(logits, positives)
    return (loss + F.cross_entropy(logits.T, positives)) / 2 if symmetric else loss


def truth(source: Tensor, target: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients in fp64, a chunk of rows at a time; in fp32 where fp64 would take too long."""
    flops = 12 * len(source) * len(target) * source.shape[1]
    dtype = torch.float64 if flops <= EXACT_FLOPS else torch.float32
    source, target = (tensor.detach().to(dtype).requires_grad_() for tensor in (source, target))
    total = torch.zeros((), dtype=dtype, device=source.device)
    for anchors, others in [(source, target), (target, source)][: 1 + symmetric]:
        for begin in range(0, len(anchors), CHUNK):
            rows = F.normalize(anchors[begin : begin + CHUNK], dim=1)
            positives = torch.arange(begin, begin + len(rows), device=rows.device)
            logits = rows @ F.normalize(others, dim=1).T / TEMPERATURE
            loss = F.cross_entropy(logits, positives, reduction="sum") / len(anchors) / (1 + symmetric)
            loss.backward()
            total += loss.detach()
    assert source.grad is not None and target.grad is not None
    return total, source.grad, target.grad


def floor(precision: str, sources: int, width: int) -> float:
    """What a loss may always err: eager is right by luck more often the fewer terms its roundings average over."""
    if precision == "exact":
        return 1e-6
    return max(1e-4, 2**-9 / TEMPERATURE / math.sqrt(sources * width))


def flops(sources: int, targets: int, width: int, symmetric: bool) -> dict[str, int]:
    product = 2 * sources * targets * width
    return {"forward": product, "both": (4 if symmetric else 3) * product}


def bytes_moved(sources: int, targets: int, width: int, itemsize: int) -> dict[str, int]:
    once = itemsize * (sources + targets) * width
    return {"forward": once, "both": 2 * once}


def inf_cl(shape: Shape, inputs: Sequence[Tensor], upstream: Tensor) -> Provider:
    if importlib.util.find_spec("inf_cl") is None:
        raise Skip("not installed (package inf-cl)")
    if not ON_GPU:
        raise Skip("needs a CUDA device")
    if shape.sources * shape.targets > LARGE:
        raise Skip(f"takes too long at {shape}")
    if shape.width % 256:
        raise Skip("needs D to be a multiple of 256")
    loss = importlib.import_module("inf_cl").cal_flash_loss

    def function(source: Tensor, target: Tensor) -> Tensor:
        rows, columns = F.normalize(source.float(), dim=1), F.normalize(target.float(), dim=1)
        forth = loss(rows, columns, scale=1 / TEMPERATURE).mean()
        return (forth + loss(columns, rows, scale=1 / TEMPERATURE).mean()) / 2 if shape.symmetric else forth

    return Provider(function, inputs, upstream)


class SentenceTransformers(Provider):
    """Its loss on embeddings as they are; the model that it wants is never called."""

    def __init__(self, shape: Shape, inputs: Sequence[Tensor], upstream: Tensor):
        if importlib.util.find_spec("sentence_transformers") is None:
            raise Skip("not installed (package sentence-transformers)")
        if shape.targets != shape.sources:
            raise Skip("has no targets that are nobody's positive in one tensor")
        if shape.sources * shape.targets > LARGE:
            raise Skip(f"takes too long at {shape}")
        settings: dict[str, Any] = {"scale": 1 / TEMPERATURE, "mini_batch_size": CHUNK}
        if shape.symmetric:
            settings |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = importlib.import_module("sentence_transformers.losses")
        model = torch.nn.Sequential(torch.nn.Identity())
        self.loss = losses.CachedMultipleNegativesRankingLoss(model, **settings)
        super().__init__(self.loss_of, inputs, upstream)

    def loss_of(self, source: Tensor, target: Tensor) -> Tensor:
        return self.loss.calculate_loss([[source.float()], [target.float()]])

    def both(self) -> tuple[Tensor, ...]:
        leaves: list[Any] = [tensor.detach().float().requires_grad_() for tensor in self.inputs]
        loss = self.loss.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
        return loss, *(leaf.grad.to(tensor.dtype) for leaf, tensor in zip(leaves, self.inputs, strict=True))

    def backward(self) -> Step:
        raise Skip("makes its gradient in the forward, without a graph")


def make(shape: Shape) -> Case:
    torch.manual_seed(0)
    source = torch.randn(shape.sources, shape.width, device=DEVICE)
    target = torch.randn(shape.targets, shape.width, device=DEVICE)
    target[: shape.sources] += source / 2
    inputs = [tensor.to(DTYPES[shape.dtype]).requires_grad_() for tensor in (source, target)]
    ours = partial(info_nce, temperature=TEMPERATURE, symmetric=shape.symmetric, precision=shape.precision)
    plain = partial(eager, fast=shape.precision == "fast", symmetric=shape.symmetric)
    sizes = (shape.sources, shape.targets, shape.width)
    return Case(
        columns=vars(shape),
        inputs=inputs,
        upstream=torch.ones((), device=DEVICE),
        truth=partial(truth, *inputs, shape.symmetric),
        providers={
            "ours": partial(Provider, partial(ours, backend=OURS)),
            "twin": partial(Provider, partial(ours, backend="torch")),
            "eager": partial(Provider, plain),
            "compile": partial(Compiled, plain),
            "inf-cl": partial(inf_cl, shape),
            "sentence-transformers": partial(SentenceTransformers, shape),
        },
        floor=floor(shape.precision, shape.sources, shape.width),
        loose=LOOSE[shape.precision],
        bytes=bytes_moved(*sizes, inputs[0].element_size()),
        flops=flops(*sizes, shape.symmetric),
        gemm="bf16" if shape.precision == "fast" else "fp32",
        modes=MODES if shape.sources * shape.targets <= ONLY_BOTH else ("both",),
    )


def ratios(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if (row["case"], row["provider"], row["mode"]) == (CPU, "eager", "both") and row["time_ratio"] != "":
            yield f"ratio_time={row['time_ratio']:.2f} ratio_memory={row['memory_ratio']:.2f}"


def forced(regime: str, function: Any, *inputs: Tensor) -> Tensor:
    with importlib.import_module("fastalign_kernels.info_nce").forced_regime(regime):
        return function(*inputs)


def make_regimes(shape: Shape, regimes: Sequence[str]) -> Case:
    """The case with every regime as a provider; only eager and ours, which picks one, beside them."""
    case = make(shape)
    ours = partial(info_nce, temperature=TEMPERATURE, symmetric=shape.symmetric, precision=shape.precision)
    providers = {regime: partial(Provider, partial(forced, regime, partial(ours, backend=OURS))) for regime in regimes}
    case.providers = {"ours": case.providers["ours"], **providers, "eager": case.providers["eager"]}
    case.strict, case.modes = ("ours", *regimes), ("both",)
    return case


def fastest(rows: Sequence[Row], regimes: Sequence[str]) -> Iterator[str]:
    """Per case, by replays as a graph where all have them: at small sizes that is what the kernels themselves take."""
    for name in dict.fromkeys(row["case"] for row in rows):
        times: dict[str, Mapping[str, Any]] = {row["provider"]: row for row in rows if row["case"] == name}
        found = [regime for regime in regimes if regime in times and times[regime]["p50_ms"] != ""]
        if found:
            column = "graph_ms" if all(times[regime]["graph_ms"] != "" for regime in found) else "p50_ms"
            best = min(found, key=lambda regime: times[regime][column])
            yield f"{name}: fastest {best} " + " ".join(f"{regime}={times[regime][column]}" for regime in found)


ONE, BOTH, MEMORY = "8192x4096:bf16:fast:one", "8192x4096:bf16:fast:symmetric", "32768x4096:bf16:fast:symmetric"
CPU = "8192x512:fp32:exact:one"
BENCH = Benchmark(
    name="info_nce",
    doc=__doc__ or "",
    grammar="cases N[xM]xD[:bf16|fp32|fp16][:fast|exact][:one|symmetric]",
    gpu=(
        ONE,
        BOTH,
        MEMORY,
        "64x4096:bf16:fast:one",
        "64x4096:bf16:exact:one",
        "8192x4096:bf16:exact:one",
        "1024x4096:bf16:fast:symmetric",
        "2048x16384x4096:bf16:fast:one",
        "4096x1024:fp32:exact:symmetric",
    ),
    cpu=(CPU, "256x1024:bf16:fast:symmetric", "1024x2048x512:fp32:exact:one"),
    quick=("5x16:fp32:exact:symmetric", "6x9x24:bf16:fast:one"),
    providers=("ours", "twin", "eager", "compile", "inf-cl", "sentence-transformers"),
    read=read,
    make=make,
    targets=(
        Target("one_direction_of_gemm", ONE, "ours", "roofline", least=0.6),
        Target("symmetric_of_gemm", BOTH, "ours", "roofline", least=0.6),
        Target("one_direction_time_of_inf_cl", ONE, "inf-cl", "time_ratio", most=1 / 3),
        Target("symmetric_time_of_inf_cl", BOTH, "inf-cl", "time_ratio", most=1 / 3),
        Target("memory_gb", MEMORY, "ours", "peak_bytes", most=1, over=1e9),
        Target("cpu_time_of_eager", CPU, "eager", "time_ratio", most=1.2),
        Target("cpu_memory_of_eager", CPU, "eager", "memory_ratio", most=1 / 3),
    ),
    last=lambda rows: [*ratios(rows)],
)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments_parser = parser(BENCH)
    arguments_parser.add_argument(
        "--regimes", action="store_true", help="on a GPU: time each regime of ours by size instead, into its own CSV"
    )
    options = arguments_parser.parse_args(arguments)
    if not options.regimes:
        return run(BENCH, options)
    if not ON_GPU:
        print("--regimes needs a GPU: the twin has one way for all sizes", file=sys.stderr)
        return 0
    regimes = importlib.import_module("fastalign_kernels.info_nce").REGIMES
    sweep = [f"{2**power}x4096:bf16:{kind}:one" for power in range(4, 13) for kind in ("fast", "exact")]
    return run(
        replace(
            BENCH,
            name="info_nce_regimes",
            gpu=sweep,
            providers=("ours", *regimes, "eager"),
            make=partial(make_regimes, regimes=regimes),
            last=lambda rows: [*fastest(rows, regimes)],
        ),
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
