"""A case of a kernel's benchmark: its inputs, who computes it, the truth that all are held against, its targets."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from harness import ON_GPU, Step
from torch import Tensor

MODES = ("forward", "both", "backward")
OURS = "triton" if ON_GPU else "torch"  # the backend of `ours`
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Skip(Exception):
    """Why something is left out, in one line."""


class Provider:
    """One way to compute. `function` takes the inputs and returns the output; all inputs want gradients."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor):
        self.function, self.inputs, self.upstream = function, inputs, upstream

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        """The output, then the gradients."""
        output = self.function(*self.inputs)
        return output.detach(), *torch.autograd.grad(output, self.inputs, self.upstream)

    def backward(self) -> Step:
        """The backward of a graph that is made here and kept as long as the step."""
        output = self.function(*self.inputs)
        return lambda: torch.autograd.grad(output, self.inputs, self.upstream, retain_graph=True)

    def step(self, mode: str) -> Step:
        return self.backward() if mode == "backward" else getattr(self, mode)


class Compiled(Provider):
    """torch.compile of a plain formula, for the shapes of this case."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor):
        if not ON_GPU and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
            raise Skip("no C++ compiler was found")
        torch.compiler.reset()
        super().__init__(torch.compile(function, dynamic=False), inputs, upstream)

    def backward(self) -> Step:
        """Compiled again: as it is compiled for training, a backward may overwrite the graph and runs only once."""
        import torch._functorch.config as config

        torch.compiler.reset()
        with config.patch(donated_buffer=False):
            step = super().backward()
            step()
        return step


@dataclass
class Case:
    """One shape of a benchmark."""

    columns: dict[str, Any]  # of the CSV
    inputs: Sequence[Tensor]
    upstream: Tensor  # gradient of the output
    truth: Callable[[], Sequence[Tensor]]  # output and gradients, exact
    providers: Mapping[str, Callable[[Sequence[Tensor], Tensor], Provider]]  # `eager` is one of them
    floor: float
    loose: float
    bytes: Mapping[str, float]  # by mode
    flops: Mapping[str, float] = field(default_factory=dict)
    gemm: str = "fp32"  # the rate that `flops` are held against
    modes: Sequence[str] = MODES
    strict: Sequence[str] = ("ours", "twin")  # held to the errors of eager
    capturable: bool = True  # as a CUDA graph


@dataclass(frozen=True)
class Target:
    """What the cell `column` of (case, provider, mode) should reach, divided by `over`."""

    name: str
    case: str
    provider: str
    column: str
    mode: str = "both"
    least: float = -math.inf
    most: float = math.inf
    over: float = 1.0

    def verdict(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """One line; None where nothing was measured."""
        wanted = (self.case, self.provider, self.mode)
        found = [row for row in rows if (row["case"], row["provider"], row["mode"]) == wanted]
        if not found or found[0][self.column] == "":
            return None
        value = found[0][self.column] / self.over
        bound = f">={self.least:g}" if self.least > -math.inf else f"<={self.most:g}"
        return f"target {self.name}{bound} reached {value:.2f}: {'yes' if self.least <= value <= self.most else 'no'}"


def read_name(name: str, sizes: Sequence[int], words: Sequence[Sequence[str]]) -> tuple[list[int], list[str]]:
    """`8192x4096:bf16:fast` as sizes and words: at most one of each group, in any order; the first is the default."""
    first, *rest = name.split(":")
    numbers = [int(size) if size.isdecimal() else 0 for size in first.split("x")]
    if len(numbers) not in sizes or min(numbers) < 1:
        raise ValueError(f"{name}: {first} is not {' or '.join(map(str, sizes))} sizes above 0")
    chosen = [[word for word in rest if word in group] or [group[0]] for group in words]
    if unknown := [word for word in rest if not any(word in group for group in words)]:
        raise ValueError(f"{name}: {unknown[0]} is none of {', '.join(word for group in words for word in group)}")
    if max(map(len, chosen)) > 1:
        raise ValueError(f"{name}: two words of one kind")
    return numbers, [found[0] for found in chosen]


def relative(actual: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where the shapes differ.

    A loss below 1 is compared as if it were 1: it is a difference of logits, and they are what is rounded.
    """
    if actual.shape != truth.shape:
        return math.inf
    size = float(truth.double().norm())
    if truth.dim() == 0:
        size = max(size, 1.0)
    return float((actual.double() - truth.double()).norm()) / (size or 1.0)


def errors(provider: Provider, truth: Sequence[Tensor]) -> tuple[float, float]:
    """Of the output, in both ways to get it, and of the worst gradient."""
    output, *gradients = provider.both()
    if [gradient.dtype for gradient in gradients] != [tensor.dtype for tensor in provider.inputs]:
        return math.nan, math.nan
    of_output = [relative(output, truth[0]), relative(provider.forward(), truth[0])]
    of_gradients = [relative(*pair) for pair in zip(gradients, truth[1:], strict=True)]
    return float(np.max(of_output)), float(np.max(of_gradients))  # unlike max(), a NaN stays one
